"""The choice of a structure, and laws that all structures keep."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bayes.structures import registry
from lightning_bayes.structures.base import Budget, Problem
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.primal import PrimalCurvature
from lightning_bayes.structures.registry import STRUCTURES, choose_structure, full_cost, full_curvature
from tests.cases import LOSSES, make_case
from tests.refusals import refuses

ENGINE = settings.get_profile("engine")
networks = st.sampled_from(["linear", "mlp", "batch_norm", "called_twice"])
losses = st.sampled_from(list(LOSSES))
kinds = st.sampled_from(list(STRUCTURES))


def problem(num_parameters, num_examples, rank=9, width=10, dtype=torch.float32):
    shapes = {"w": torch.Size([num_parameters])}
    return Problem(shapes, num_examples, rank, 32, width, width, num_parameters, dtype, torch.device("cpu"))


@pytest.fixture
def rate(monkeypatch):
    """Makes the machine one of so many multiplications a second."""
    return lambda value: monkeypatch.setattr(registry, "rate", lambda dtype, device: value)


def test_sizes():
    sizes = problem(24, 100)
    assert (sizes.num_parameters, sizes.num_rows) == (24, 900)


@settings(ENGINE)
@given(networks, losses, kinds, st.floats(-4, 4))
def test_signs_and_ranges(network, loss, structure, log_precision):
    """ln det(I + PSD) ≥ 0, 0 ≤ γ ≤ p, 0 ≤ decrement; the bracket holds the value; the parts add up."""
    evidence = make_case(network, loss).evidence(structure=structure, prior_precision=10**log_precision)
    assert evidence.log_occam_factor <= 1e-12
    assert -1e-9 <= evidence.effective_parameters <= evidence.num_parameters
    assert evidence.newton_decrement >= 0
    assert evidence.lower <= evidence.log_evidence <= evidence.upper
    parts = evidence.log_likelihood - evidence.weight_penalty + evidence.log_occam_factor
    assert evidence.log_evidence == pytest.approx(parts, rel=1e-12)


@settings(ENGINE)
@given(networks, losses, kinds, st.floats(-3, 2), st.floats(1.1, 30))
def test_more_prior_precision_means_fewer_effective_parameters(
    network, loss, structure, log_precision, factor
):
    """ln det(I + G/λ) and γ fall with λ, and ½ λ‖ω‖² grows in proportion."""
    case, precision = make_case(network, loss), 10**log_precision
    broad = case.evidence(structure=structure, prior_precision=precision)
    narrow = case.evidence(structure=structure, prior_precision=precision * factor)
    assert narrow.log_occam_factor > broad.log_occam_factor
    assert narrow.effective_parameters < broad.effective_parameters
    assert narrow.weight_penalty == pytest.approx(factor * broad.weight_penalty, rel=1e-12)
    assert narrow.log_likelihood == broad.log_likelihood


@settings(ENGINE)
@given(networks, losses, kinds, st.integers(1, 9), st.permutations(range(7)))
def test_order_and_batching_do_not_matter(network, loss, structure, batch_size, order):
    case = make_case(network, loss)
    once = case.evidence(structure=structure, batch_size=7)
    order = torch.tensor(order)
    object.__setattr__(case, "inputs", case.inputs[order])
    object.__setattr__(case, "targets", case.targets[order])
    again = case.evidence(structure=structure, batch_size=batch_size)
    for field in ("log_evidence", "log_likelihood", "effective_parameters", "newton_decrement"):
        assert getattr(again, field) == pytest.approx(getattr(once, field), rel=1e-10), field


@settings(ENGINE)
@given(networks, kinds)
def test_repeated_examples_count_as_often_as_they_are_given(network, structure):
    """Twice the data: twice the likelihood and the curvature, so the same γ at twice the precision."""
    case = make_case(network, "classification")
    once = case.evidence(structure=structure, prior_precision=0.5)
    object.__setattr__(case, "inputs", torch.cat([case.inputs, case.inputs]))
    object.__setattr__(case, "targets", torch.cat([case.targets, case.targets]))
    twice = case.evidence(structure=structure, prior_precision=1.0)
    assert twice.num_examples == 2 * once.num_examples
    assert twice.log_likelihood == pytest.approx(2 * once.log_likelihood, rel=1e-12)
    assert twice.log_occam_factor == pytest.approx(once.log_occam_factor, rel=1e-9)
    assert twice.effective_parameters == pytest.approx(once.effective_parameters, rel=1e-9)
    assert twice.newton_decrement == pytest.approx(2 * once.newton_decrement, rel=1e-9)


def test_full_cost_is_that_of_the_cheaper_side():
    memory, flop = full_cost(problem(24, 1000))
    assert memory < 4 * 8 * 24**2 + 32 * 9 * 24 * 16 + 1
    assert flop < 4 * 9000 * 24**2
    # the 784-800-10 net of the paper at N = 1000: one float32 matrix of 9,000 rows, and the rows' factors
    memory, flop = full_cost(problem(636_010, 1000, width=810))
    assert memory == 4 * 9000**2 + 9000 * 810 * 16
    assert flop == pytest.approx(9000**2 * 810 + 9000**3 / 3)


def test_logistic_regression_goes_through_the_dual(rate):
    """Fewer parameters (7,850) than rows (9,000), but rows that are kept as their ten output gradients."""
    assert type(full_curvature(problem(7850, 1000, width=10))) is DualCurvature
    assert type(full_curvature(problem(785, 10_000, rank=1, width=1))) is PrimalCurvature
    rate(1e11)
    assert choose_structure("auto", problem(7850, 1000, width=10))[0] == "full"


@pytest.mark.parametrize(
    ("num_parameters", "num_examples", "expected"),
    [(636_010, 1000, "full"), (636_010, 10_000, "lanczos"), (636_010, 10**6, "kron")],
)
def test_auto_takes_what_fits_and_says_why(num_parameters, num_examples, expected, rate):
    rate(1e11)
    structure, why = choose_structure("auto", problem(num_parameters, num_examples, width=810))
    assert structure == expected
    assert f"{9 * num_examples:,} rows" in why
    assert ("within" if expected == "full" else "beyond") in why


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_by_name_is_kept(name):
    assert choose_structure(name, problem(100, 10))[0] == name


def test_slow_is_announced_with_what_is_faster(rate):
    rate(1e10)
    with pytest.warns(UserWarning, match='will be slow.*structure="kron".*max_examples='):
        choose_structure("full", problem(636_010, 2000, width=810))


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "total_memory", lambda device: 1e9)
    with refuses("does not fit on cpu", remedy='structure="diag"'):
        choose_structure("full", problem(10**9, 10**4))


def test_auto_falls_back_in_the_evidence_itself():
    assert make_case().evidence(Budget(memory=1.0)).structure == "lanczos"
    assert make_case().evidence(Budget(seconds=0.0)).structure == "kron"
    several = make_case().evidence(Budget(memory=1.0), prior_precision="optimize_per_parameter")
    assert several.structure == "kron"
    assert make_case().evidence(Budget(memory=math.inf)).structure == "full"


def test_sampled_columns_have_no_exact_matrix():
    sampled = replace(problem(100, 10), sampled=True)
    assert choose_structure("auto", sampled)[0] == "kron"
    for name in ("full", "blocks"):
        with refuses("sampled", remedy='structure="kron"'):
            choose_structure(name, sampled)
