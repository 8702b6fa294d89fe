"""What a reader is told: the likelihood that targets belong to, and the screen of an evidence."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from lightning_bayes import evidence_curve, laplace_evidence
from tests.refusals import refuses

N = 20
LABELS = torch.arange(N) % 3


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "words"),
    [
        ("classification", 1, (LABELS > 0).float(), 'likelihood="binary"'),
        ("classification", 1, (LABELS > 0).double().unsqueeze(1), 'likelihood="binary"'),
        ("classification", 3, LABELS.float(), "targets.long()"),
        ("classification", 3, LABELS.unsqueeze(1), "targets.squeeze(1).long()"),
        ("classification", 3, one_hot(LABELS, 3), "targets.float()"),
        ("classification", 3, torch.ones(N, 3), 'likelihood="binary"'),
        ("classification", 3, torch.linspace(0.0, 1.0, N), 'likelihood="regression"'),
        ("regression", 3, LABELS, 'likelihood="classification"'),
        ("binary", 3, LABELS, 'likelihood="classification"'),
        ("binary", 1, LABELS, 'likelihood="classification"'),
        ("binary", 1, torch.linspace(-1.0, 1.0, N), 'likelihood="regression"'),
    ],
)
def test_targets_of_another_kind_name_the_way_out(likelihood, outputs, targets, words):
    with refuses(words):
        laplace_evidence(nn.Linear(4, outputs), (torch.randn(N, 4), targets), likelihood=likelihood)


def test_the_ways_out_work():
    x = torch.randn(N, 4)
    laplace_evidence(nn.Linear(4, 1), (x, (LABELS > 0).float()), likelihood="binary")
    laplace_evidence(nn.Linear(4, 3), (x, LABELS.float().long()))
    laplace_evidence(nn.Linear(4, 3), (x, LABELS.unsqueeze(1).squeeze(1).long()))
    laplace_evidence(nn.Linear(4, 3), (x, one_hot(LABELS, 3).float()))
    laplace_evidence(nn.Linear(4, 3), (x, torch.ones(N, 3)), likelihood="binary")


def test_a_sampling_error_is_that_of_its_structure():
    sampled = laplace_evidence(nn.Linear(4, 3), (torch.randn(N, 4), LABELS), num_samples=16)
    assert re.search(r"± \S+ from sampling; kron's own error is not known, ", str(sampled))
    unknown = replace(sampled, log_evidence_stderr=math.inf)
    assert "error of sampling not known; kron's own error is not known" in str(unknown)


def test_nothing_is_believed_away_from_a_minimum():
    torch.manual_seed(0)
    evidence = laplace_evidence(nn.Linear(4, 3), (torch.randn(N, 4), LABELS))
    for ratio, words in ((5.0, "above guessing, if"), (-5.0, "below guessing, if")):
        text = str(replace(evidence, log_evidence_ratio=ratio, newton_decrement=1e3))
        assert words in text
        assert "believe" not in text
    assert "the data believe the model" in str(
        replace(evidence, log_evidence_ratio=5.0, newton_decrement=0.0)
    )


def test_the_parts_add_up_as_their_signs_say():
    evidence = laplace_evidence(nn.Linear(4, 3), (torch.randn(N, 4), LABELS))
    numbers = [float(line[22:38]) for line in str(evidence).splitlines()[1:5]]
    assert numbers[0] == pytest.approx(numbers[1] - numbers[2] + numbers[3], abs=1e-3)
    assert "- weight penalty  -" not in re.sub(r" +", "  ", str(evidence))


@pytest.mark.parametrize("grid", [[30.0, 200.0], [0.01, 30.0, 1000.0]], ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_curve_of_the_hessian_at_given_priors(seed, grid):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(N, 4).double(), torch.randint(0, 3, (N,))
    curve = evidence_curve(net, data, grid, curvature="hessian")
    assert math.isnan(curve.best) and math.isnan(curve.best_log_evidence)
    for precision, got, lower in zip(grid, curve.log_evidence.tolist(), curve.lower.tolist(), strict=True):
        if precision < 1.0:  # negative curvature
            assert math.isnan(got)
            continue
        one = laplace_evidence(net, data, prior_precision=precision, curvature="hessian")
        assert got == lower == pytest.approx(one.log_evidence, abs=1e-8)
    curve.plot()
