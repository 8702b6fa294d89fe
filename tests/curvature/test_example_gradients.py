"""Sums over per-example gradients, against gradients that are formed one example at a time."""

import warnings
from dataclasses import replace

import pytest
import torch

from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.likelihoods import resolve_likelihood
from lightning_bayes.rows import example_gradients
from lightning_bayes.rows.example_gradients import ExampleGradientReader
from tests.cases import NETWORKS, make_case
from tests.refusals import refuses

EXACT = {"rtol": 1e-10, "atol": 1e-13}


def sums(case, keep_totals=False, batches=1):
    network = throw_away_copy(case.model)
    likelihood = resolve_likelihood(case.loss.likelihood(case.class_dim))
    reader = ExampleGradientReader(network, case.names)

    def forward():
        outputs, targets = likelihood.prepare(network(case.inputs), case.targets)
        return outputs, likelihood.unit_loss(outputs, targets)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that take a backward pass for each example
        for _ in range(batches):
            found = reader.sums(forward, keep_totals)
    return found


def one_by_one(case):
    """Gradients [N, p] of each parameter."""
    likelihood = resolve_likelihood(case.loss.likelihood(case.class_dim))
    model, parameters = case.model.eval(), list(case.model.parameters())
    rows = []
    for example in range(len(case.inputs)):
        one = slice(example, example + 1)
        loss = likelihood.unit_loss(*likelihood.prepare(model(case.inputs[one]), case.targets[one]))
        rows.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    return [torch.stack([row.flatten() for row in column]) for column in zip(*rows, strict=True)]


def check(case, found):
    gradients = one_by_one(case)
    squares = torch.stack([g.square().sum() for g in gradients])
    squared_totals = torch.stack([g.sum(0).square().sum() for g in gradients])
    torch.testing.assert_close(torch.tensor(found.squares, dtype=torch.float64), squares, **EXACT)
    torch.testing.assert_close(
        torch.tensor(found.squared_totals, dtype=torch.float64), squared_totals, **EXACT
    )
    for total, rows in zip(found.totals or [], gradients, strict=False):
        torch.testing.assert_close(total, rows.sum(0), **EXACT)
    assert found.num_gradients == found.inverse_sizes == len(case.inputs)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(network):
    case = make_case(network)
    check(case, sums(case))


@pytest.mark.parametrize("network", ["mlp", "conv", "embedding", "attention", "sequence_output", "unpooled"])
def test_totals(network):
    case = make_case(network)
    found = sums(case, keep_totals=True)
    assert [total.numel() for total in found.totals] == [p.numel() for p in case.model.parameters()]
    check(case, found)


@pytest.mark.parametrize("network", ["mlp", "conv", "lstm"])
def test_later_batches_and_those_at_which_the_plan_is_tried_again(network):
    case = make_case(network)
    check(case, sums(case, batches=3))


@pytest.mark.parametrize("few", [0, 2**23])
@pytest.mark.parametrize("network", ["mlp", "conv", "sequence", "one_position"])
def test_both_ways_to_square_a_sum(network, few, monkeypatch):
    monkeypatch.setattr(example_gradients, "FEW", few)
    case = make_case(network, num_examples=40)
    check(case, sums(case))


def test_long_gradients_one_example_at_a_time(monkeypatch):
    monkeypatch.setattr(example_gradients, "MAX_ROWS", 1)
    for network in ("attention", "layer_norm", "bare_parameter"):
        case = make_case(network)
        check(case, sums(case))


def test_a_loss_that_is_not_finite_is_unavailable():
    case = make_case("mlp")
    with torch.no_grad():
        next(case.model.parameters()).fill_(torch.nan)
    with refuses("the loss", error=EvidenceUnavailableError):
        sums(case)


@pytest.mark.parametrize("network", ["lstm", "frames"])
def test_a_batch_of_one_is_forgotten_before_the_next(network):
    """It does not tell which axis is the examples', and many an epoch ends with one."""
    case = make_case(network)
    likelihood = resolve_likelihood(case.loss.likelihood(case.class_dim))
    model = throw_away_copy(case.model)
    reader = ExampleGradientReader(model, case.names)
    for some in (slice(0, 3), slice(3, 6), slice(6, 7), slice(0, 7)):
        part = replace(case, inputs=case.inputs[some], targets=case.targets[some])

        def forward(part=part):
            outputs, targets = likelihood.prepare(model(part.inputs), part.targets)
            return outputs, likelihood.unit_loss(outputs, targets)

        check(part, reader.sums(forward))
