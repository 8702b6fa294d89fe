"""Priors: patterns on names, weight decay, and what is held fixed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bayes.priors.prior import (
    Prior,
    fixed_prior,
    prior_from,
    require_prior_precision,
    trainable_names,
    weight_decay_prior,
)
from tests.cases import make_case
from tests.reference import assert_agrees
from tests.refusals import refuses


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


def test_one_number_is_for_all():
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert fixed_prior(network(), 2).precision(100) == dict.fromkeys(names, 2.0)


def test_the_first_pattern_that_matches_counts():
    prior = fixed_prior(network(), {"0.bias": 3, "*.bias": 0.5, "*": 2.0})
    assert prior.precision(100) == {"0.weight": 2.0, "0.bias": 3.0, "1.weight": 2.0, "1.bias": 0.5}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"*.weight": 1.0}, ("no pattern for ['0.bias', '1.bias']", "Add '*'")),
        ({"*": 1.0, "*.bias": 2.0}, ("patterns ['*.bias']", "decide no trainable parameter")),
        ({"*": 1.0, "2.*": 2.0}, "patterns ['2.*']"),
        ({"*": 0.0}, ("prior precision 0", "no prior is proper")),
    ],
)
def test_patterns_that_do_not_fit_the_network(patterns, message):
    with refuses(message):
        fixed_prior(network(), patterns)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("how", ["zero", "frozen"])
def test_parameters_without_a_prior_are_conditioned_on(structure, how):
    case = make_case("mlp", "classification")
    precision = dict.fromkeys(case.names, 0.7)
    held = ("0.bias", "2.weight")
    for name in held:
        del precision[name]
        if how == "frozen":
            case.model.get_parameter(name).requires_grad_(False)
    argument = 0.7 if how == "frozen" else dict.fromkeys(held, 0.0) | {"*": 0.7}
    evidence = case.evidence(structure=structure, prior_precision=argument)
    assert_agrees(evidence, case.reference(precision, structure))
    assert evidence.fixed_parameters == held
    assert evidence.prior_precision == 0.7
    assert "0.bias, 2.weight" in str(evidence)


def test_different_precisions_are_reported_by_name():
    evidence = make_case("linear").evidence(prior_precision={"weight": 1, "bias": 2})
    assert evidence.prior_precision == {"weight": 1.0, "bias": 2.0}


def test_weight_decay_is_a_precision_in_proportion_to_the_data():
    """λ = N · weight_decay / s; decay 0 means no prior."""
    prior = weight_decay_prior({"a": 1e-3, "b": 0.0})
    assert prior == Prior({"a": 1e-3}, ("b",), per_example=True)
    assert prior.precision(5000) == pytest.approx({"a": 5.0})
    assert prior.precision(5000, loss_scale=0.1) == pytest.approx({"a": 50.0})
    with refuses("weight decay 0", remedy="weight_decay, or name the prior: prior_precision="):
        weight_decay_prior({"a": 0.0})


def test_weight_decay_is_the_map_prior_of_the_training_loss():
    """Where loss + wd/2 ‖ω‖² is stationary, so is C = H + ½ λ‖ω‖²: the gradients are proportional."""
    case = make_case("mlp", "regression")
    decay, sigma, (num_examples, num_outputs) = 0.03, 0.3, case.targets.shape
    parameters = list(case.model.parameters())
    penalty = sum(p.square().sum() for p in parameters)
    residual = case.model(case.inputs) - case.targets
    training = torch.autograd.grad(
        residual.square().mean() + decay / 2 * penalty, parameters, retain_graph=True
    )
    scale = 2 * sigma**2 / num_outputs
    precision = weight_decay_prior({"*": decay}).precision(num_examples, scale)["*"]
    bayes = torch.autograd.grad(
        residual.square().sum() / (2 * sigma**2) + precision / 2 * penalty, parameters
    )
    for ours, theirs in zip(bayes, training, strict=True):
        torch.testing.assert_close(ours, num_examples / scale * theirs)


@pytest.mark.parametrize(
    "value", [0, -1.0, math.nan, math.inf, True, "auto", None, [], {}, torch.tensor(1.0)]
)
def test_values_that_are_no_precision(value):
    with refuses("argument `prior_precision`", remedy=("positive, finite number", "weight_decay")):
        require_prior_precision(value)


@pytest.mark.parametrize("value", [{"*": -1.0}, {"*": math.nan}, {"*": None}, {3: 1.0}, {"*": True}])
def test_mappings_that_hold_no_precision(value):
    with pytest.raises(ValueError, match=r"argument `prior_precision` to map.*got {"):
        require_prior_precision(value)


def test_words_are_for_those_who_know_them():
    for word in ("auto", "optimize", "optimize_per_layer", "optimize_per_parameter"):
        require_prior_precision(word, also=("auto",))
    with refuses("'optimize', 'optimize_per_layer'", "auto"):
        require_prior_precision("auto")
    with pytest.raises(ValueError, match=r"numbers or 'optimize', got {'b': 'optimize_per_layer'}"):
        require_prior_precision({"a": "optimize", "b": "optimize_per_layer", "*": 1.0})


@pytest.mark.parametrize(
    ("argument", "groups"),
    [
        ("optimize", (("0.weight", "0.bias", "1.weight", "1.bias"),)),
        ("optimize_per_layer", (("0.weight", "0.bias"), ("1.weight", "1.bias"))),
        ("optimize_per_parameter", (("0.weight",), ("0.bias",), ("1.weight",), ("1.bias",))),
        ({"*.weight": "optimize", "*": 2.0}, (("0.weight", "1.weight"),)),
        (
            {"0.bias": 0.0, "*.bias": "optimize", "*": "optimize"},
            (("1.bias",), ("0.weight", "1.weight")),
        ),
        ({"*": 2.0}, ()),
    ],
    ids=str,
)
def test_groups_whose_precision_is_to_be_found(argument, groups):
    prior = prior_from(network(), argument)
    assert set(prior.optimized) == set(groups)
    assert not set(prior.fixed_parameters) & {name for group in groups for name in group}
    assert set(prior.strengths) | set(prior.fixed_parameters) == set(trainable_names(network()))


def test_a_subset_needs_no_patterns_for_the_rest():
    prior = prior_from(network(), {"1.weight": 2.0, "1.bias": "optimize"}, subset=["1.weight", "1.bias"])
    assert prior == Prior({"1.weight": 2.0, "1.bias": 1.0}, optimized=(("1.bias",),))
    # A pattern that decides parameters outside the subset alone is not idle.
    prior = prior_from(network(), {"0.*": 3.0, "*": "optimize"}, subset=["0.weight"])
    assert prior == Prior({"0.weight": 3.0})
    with refuses("No parameter of the subset ['0.weight'] has a prior above 0"):
        prior_from(network(), {"0.*": 0.0, "*": 1.0}, subset=["0.weight"])


@pytest.mark.parametrize("value", [1, 0.5, np.float64(2.0), {"*": 0}])
def test_values_that_are_precisions(value):
    require_prior_precision(value)


def test_a_network_without_trainable_parameters():
    frozen = network().requires_grad_(False)
    assert trainable_names(network()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for model in (frozen, nn.ReLU()):
        with refuses("has no trainable parameter"):
            fixed_prior(model, 1.0)
