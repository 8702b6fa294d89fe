"""The bracket holds the dense truth, whatever it leaves out."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bayes.row_storage.stored import KeptDense
from lightning_bayes.structures.base import Budget, Problem
from lightning_bayes.structures.blocks import BlockCurvature
from lightning_bayes.structures.blocks_budget import num_landmarks
from lightning_bayes.structures.bracket import bracket
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.registry import STRUCTURES
from tests.cases import make_case
from tests.refusals import refuses

NETWORKS = ["linear", "mlp", "conv", "batch_norm", "sequence", "called_twice", "shared_weight"]
ENGINE = settings.get_profile("engine")
networks, losses = st.sampled_from(NETWORKS), st.sampled_from(["classification", "binary_3", "regression"])
reference = functools.cache(
    lambda network, loss, precision, examples=7: make_case(network, loss, examples).reference(precision)
)
precisions = st.sampled_from([0.03, 1.0, 30.0])
SMALL = Budget(marked_rows=3, marked_share=2, bracket_share=math.inf, bracket_trace=8)
"""Everything that large problems do, at the size of the tests."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(STRUCTURES, "full", BracketCurvature)


@settings(ENGINE)
@given(networks, losses, precisions, st.floats(1e-4, 30.0))
def test_bracket_holds_the_truth_within_its_tolerance(network, loss, precision, tolerance):
    evidence = make_case(network, loss).evidence(
        SMALL, structure="full", prior_precision=precision, tolerance=tolerance
    )
    expected = reference(network, loss, precision)
    assert evidence.lower <= expected.log_evidence <= evidence.upper
    assert evidence.lower <= evidence.log_evidence <= evidence.upper
    assert evidence.upper - evidence.lower <= tolerance * (1 + 1e-9)
    truth = expected.newton_decrement
    assert (
        truth * (1 - bracket.DECREMENT_TOLERANCE) - 1e-9
        <= evidence.newton_decrement
        <= truth * (1 + 1e-9) + 1e-9
    )


@settings(ENGINE)
@given(networks, precisions, st.floats(1e-2, 30.0))
def test_bracket_holds_the_truth_in_float32(network, precision, tolerance):
    case = make_case(network, "classification", 12)
    single = replace(case, model=case.model.float(), inputs=case.inputs.float())
    evidence = single.evidence(SMALL, structure="full", prior_precision=precision, tolerance=tolerance)
    expected = reference(network, "classification", precision, 12)
    # The rows themselves, and the likelihood, come from a network in float32.
    slack = 1e-5 * abs(expected.log_evidence)
    assert evidence.lower - slack <= expected.log_evidence <= evidence.upper + slack


few_rows = st.integers(1, 24)


@settings(ENGINE)
@given(networks, losses, precisions, few_rows, st.integers(1, 12), st.integers(1, 8), st.integers(1, 40))
def test_blocks_hold_the_truth(network, loss, precision, kept, landmarks, batch_size, pool):
    budget = Budget(least_kept=kept, kept_flop=0.0, landmarks=landmarks, pool_rows=pool)
    evidence = make_case(network, loss).evidence(
        budget, structure="blocks", prior_precision=precision, batch_size=batch_size
    )
    expected = reference(network, loss, precision)
    assert evidence.lower <= expected.log_evidence <= evidence.upper
    assert evidence.lower <= evidence.log_evidence <= evidence.upper
    assert evidence.newton_decrement >= expected.newton_decrement * (1 - 1e-9)


@settings(ENGINE)
@given(networks, few_rows, st.integers(1, 12))
def test_blocks_hold_the_truth_in_float32(network, kept, landmarks):
    case = make_case(network, "classification", 12)
    single = replace(case, model=case.model.float(), inputs=case.inputs.float())
    budget = Budget(least_kept=kept, kept_flop=0.0, landmarks=landmarks)
    evidence = single.evidence(budget, structure="blocks")
    expected = reference(network, "classification", 1.0, 12)
    slack = 1e-5 * abs(expected.log_evidence)
    assert evidence.lower - slack <= expected.log_evidence <= evidence.upper + slack


@pytest.mark.parametrize("network", ["mlp", "conv", "batch_norm"])
def test_blocks_with_every_row_kept_are_exact(network):
    evidence = make_case(network).evidence(structure="blocks", prior_precision=0.5)
    expected = reference(network, "classification", 0.5)
    assert evidence.upper - evidence.lower < 1e-9
    for field in ("log_evidence", "effective_parameters", "newton_decrement"):
        assert getattr(evidence, field) == pytest.approx(getattr(expected, field), rel=1e-8), field


def trained():
    """Logistic regression of 60 examples, many of which it is sure of: a spectrum with a tail."""
    case = make_case("linear", "classification", 60)
    with torch.no_grad():
        case.model.weight.mul_(12.0)
    return case


def test_little_is_kept_where_much_may_be_left_out(monkeypatch):
    sizes = []
    original = bracket.factor_of

    def spy(selection, *rest):
        sizes.append(len(selection.chosen))
        return original(selection, *rest)

    monkeypatch.setattr(bracket, "factor_of", spy)
    case = trained()
    expected = case.reference(1.0)
    estimates = []
    for tolerance in (0.01, 1.0, 5.0):
        evidence = case.evidence(SMALL, structure="full", tolerance=tolerance)
        estimates.append((evidence.log_evidence, evidence.effective_parameters))
        assert evidence.upper - evidence.lower <= tolerance
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]
    # The sampled rest brings the middle one far closer than its bracket says.
    assert estimates[1][0] == pytest.approx(expected.log_evidence, abs=0.2)
    assert estimates[1][1] == pytest.approx(expected.effective_parameters, rel=0.1)


def test_exact_where_leaving_out_saves_nothing():
    evidence = trained().evidence(replace(SMALL, bracket_share=0.0), structure="full", tolerance=1.0)
    assert evidence.lower == evidence.upper == evidence.log_evidence


def test_a_tolerance_below_the_rounding_of_float32_takes_float64():
    case = trained()
    expected = case.reference(1.0)
    single = replace(case, model=case.model.float(), inputs=case.inputs.float())
    evidence = single.evidence(SMALL, structure="full", tolerance=1e-6)
    assert evidence.upper - evidence.lower <= 1e-6
    assert evidence.log_evidence == pytest.approx(expected.log_evidence, rel=1e-5)


def test_float64_is_not_begun_where_the_exact_answer_costs_less(monkeypatch):
    def unwanted(*args):
        raise AssertionError("rows were chosen for nothing")

    monkeypatch.setattr(bracket, "select", unwanted)
    case = trained()
    single = replace(case, model=case.model.float(), inputs=case.inputs.float())
    evidence = single.evidence(replace(SMALL, bracket_share=0.8), structure="full", tolerance=1e-6)
    assert evidence.lower == evidence.upper


def own_directions(examples, large, small):
    """Rows of each example in a subspace of its own, their eigenvalues far apart: [C, N, p] float32."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([large, small, small], dtype=torch.float64).sqrt()
    rows = torch.zeros(3, examples, 3 * examples, dtype=torch.float64)
    for i in range(examples):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
        rows[:, i, 3 * i : 3 * i + 3] = turn * scales
    return rows.float()


@pytest.mark.parametrize(
    ("examples", "large", "small", "tolerance"),
    # The tolerance asks for float64; the factor does, since float32 would lose the identity.
    [(300, 1.0, 1e-8, 2e-6), (300, 100.0, 1e-6, 2e-4), (200, 1e5, 1e-3, 389.0)],
)
def test_bounds_hold_where_small_eigenvalues_stand_beside_large_ones(examples, large, small, tolerance):
    rows = own_directions(examples, large, small)
    shape = torch.Size([rows.shape[2]])
    sizes = {"num_examples": examples, "rank": 3, "kept_width": len(shape), "gram_width": 1, "map_width": 1}
    curvature = BracketCurvature(problem(dtype=torch.float32, tolerance=tolerance, **sizes))
    curvature._layers = lambda precision: [KeptDense(rows, "w", shape)]
    summary = curvature.at({"w": 1.0}, {"w": torch.zeros(shape)})
    whole = rows.double().flatten(0, 1)
    truth = torch.linalg.eigvalsh(whole @ whole.mT).clamp(min=0).log1p().sum().item()
    assert summary.bounds[0] <= truth <= summary.bounds[1]
    assert summary.bounds[1] - summary.bounds[0] <= 2 * tolerance * (1 + 1e-9)


def problem(**changes):
    shapes = {"w": torch.Size([3]), "b": torch.Size([1])}
    sizes = {"num_examples": 5, "rank": 2, "batch_size": 5, "kept_width": 4, "gram_width": 4, "map_width": 8}
    place = {"dtype": torch.float64, "device": torch.device("cpu"), "budget": SMALL}
    return Problem(shapes, **(sizes | place | changes))


def test_more_data_get_fewer_landmarks():
    numbers = [num_landmarks(problem(num_examples=n)) for n in (10, 10**5, 10**6, 10**8)]
    assert numbers == [20, 1024, 256, 128]


def test_blocks_answer_only_in_the_proportions_they_were_made_for():
    curvature = BlockCurvature(problem(strengths={"w": 1.0, "b": 2.0}))
    with refuses("fixed proportions"):
        curvature.log_det_and_gamma({"w": 1.0, "b": 1.0})
