"""The estimate by random vectors against the exact log-evidence: no bias, an error that is one, bounds that hold."""

import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.evidence.curve import curve_of, evidence_curve
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.evidence.totals import Totals
from lightning_bayes.numerics.nystrom import nystrom_sketch
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.lanczos import estimate, parameter_space, row_space
from tests.cases import Case, make_case
from tests.refusals import refuses

PRECISION, SEEDS = 0.1, 24
STORED, REREAD, BY_PRODUCTS = Budget(), Budget(stored_bytes=0.0), Budget(columns=0)
FORMS = pytest.mark.parametrize("budget", [STORED, REREAD, BY_PRODUCTS], ids=["stored", "reread", "products"])
PER_PATTERN = {"*weight": 0.05, "*bias": 3.0}


@pytest.fixture(autouse=True)
def _a_tenth_is_selected(monkeypatch):
    """Of so few rows all would be selected, and a sketch of so few parameters would be all of G."""
    monkeypatch.setattr(row_space, "num_selected", lambda problem: max(1, problem.num_rows // 10))
    monkeypatch.setattr(parameter_space, "SKETCHED", 6)


def lanczos(case: Case, budget: Budget = STORED, **arguments) -> Evidence:
    """By batches of 16, the last one incomplete."""
    arguments = {"prior_precision": PRECISION, "batch_size": 16} | arguments
    return case.evidence(budget, structure="lanczos", **arguments)


def computation(case: Case, budget: Budget = STORED, **arguments) -> Computation:
    arguments = {"prior_precision": PRECISION, "batch_size": 16} | arguments
    return Computation(
        structure="lanczos", likelihood=case.loss.likelihood(case.class_dim), budget=budget, **arguments
    )


def by_seeds(case: Case, seeds: int, budget: Budget = STORED, **arguments) -> list[Evidence]:
    """One evidence for each seed, all from one pass."""

    def every(totals: Totals) -> Iterator[Evidence]:
        problem = totals.curved.problem
        for seed in range(seeds):
            totals.curved.problem = replace(problem, seed=seed)
            totals.curved._answers.clear()
            yield evidence_of(totals)

    conclude: Callable[[Totals], list[Evidence]] = lambda totals: list(every(totals))  # noqa: E731
    return computation(case, budget, **arguments).run(case.model, (case.inputs, case.targets), conclude)


CASES = [
    ("mlp", "classification", 50, {}),
    ("conv", "weighted_smoothed", 30, {"prior_precision": 1.0}),
    ("language_model", "ignored", 20, {}),
    ("mlp", "classification", 50, {"prior_precision": PER_PATTERN}),
]


@pytest.mark.parametrize(("network", "loss", "size", "arguments"), CASES)
def test_there_is_no_bias_and_the_errors_are_the_spread(network, loss, size, arguments):
    case = make_case(network, loss, size)
    exact = case.evidence(structure="full", **{"prior_precision": PRECISION} | arguments)
    every = by_seeds(case, SEEDS, num_probes=4, **arguments)
    for name in ("log_evidence", "effective_parameters"):
        values = [getattr(one, name) for one in every]
        stated = math.sqrt(statistics.mean(getattr(one, f"{name}_stderr") ** 2 for one in every))
        error = statistics.stdev(values) / math.sqrt(SEEDS)
        assert abs(statistics.mean(values) - getattr(exact, name)) < 4 * error, name
        # A variance has a relative error of sqrt(2/23) = 0.3, and its root half of that.
        assert statistics.stdev(values) == pytest.approx(stated, rel=0.35), name
    for one in every:
        assert one.lower <= exact.log_evidence <= one.upper
        assert (one.lower, one.upper) == (every[0].lower, every[0].upper)
        assert one.log_likelihood == pytest.approx(exact.log_likelihood, rel=1e-12)
        missing = exact.newton_decrement - one.newton_decrement
        assert -1e-9 * exact.newton_decrement <= missing <= one.newton_decrement_error * (1 + 1e-9)
    inside = [one.interval[0] <= exact.log_evidence <= one.interval[1] for one in every]
    assert sum(inside) >= 0.8 * SEEDS


def test_the_error_is_the_spread_within_a_quarter():
    many = lanczos(make_case("mlp", "classification", 50), num_probes=200)
    samples = torch.tensor(many.samples, dtype=torch.float64)
    assert samples.mean().item() == pytest.approx(many.log_evidence, rel=1e-12)
    assert samples.std().item() / 200**0.5 == pytest.approx(many.log_evidence_stderr, rel=0.25)


def test_the_error_is_the_spread_where_one_step_is_enough():
    many = lanczos(make_case("mlp", "classification", 50), num_probes=100, prior_precision=1e4)
    samples = torch.tensor(many.samples, dtype=torch.float64)
    assert samples.std().item() / 100**0.5 == pytest.approx(many.log_evidence_stderr, rel=0.25)


@pytest.mark.parametrize(
    ("network", "loss"),
    [("mlp", "classification"), ("conv", "binary_3"), ("attention", "ignored"), ("gru", "gaussian_nll")],
)
def test_rows_that_are_read_again_are_those_that_are_stored(network, loss):
    case = make_case(network, loss, 40)
    stored, reread = (lanczos(case, budget, num_probes=3) for budget in (STORED, REREAD))
    for name in (
        "log_evidence",
        "log_evidence_stderr",
        "lower",
        "upper",
        "effective_parameters",
        "effective_parameters_stderr",
    ):
        assert getattr(reread, name) == pytest.approx(getattr(stored, name), rel=1e-8, abs=1e-8), name
    # Conjugate gradients make more of rounding.
    assert reread.newton_decrement == pytest.approx(stored.newton_decrement, rel=1e-6)
    assert stored.lower < stored.log_evidence < stored.upper


@pytest.mark.parametrize("network", ["mlp", "language_model"])
def test_products_with_g_give_the_same_number(network):
    case = make_case(network, "classification", 30)
    exact = case.evidence(structure="full", prior_precision=1.0)
    every = by_seeds(case, 16, BY_PRODUCTS, prior_precision=1.0, num_probes=3)
    for name in ("log_evidence", "effective_parameters"):
        values = [getattr(one, name) for one in every]
        error = statistics.stdev(values) / 4
        assert abs(statistics.mean(values) - getattr(exact, name)) < 4 * error, name
        stated = math.sqrt(statistics.mean(getattr(one, f"{name}_stderr") ** 2 for one in every))
        assert statistics.stdev(values) == pytest.approx(stated, rel=0.5), name
    for one in every:
        assert one.lower == -math.inf
        assert exact.log_evidence <= one.upper
        missing = exact.newton_decrement - one.newton_decrement
        assert -1e-9 * exact.newton_decrement <= missing <= one.newton_decrement_error * (1 + 1e-9)


def test_a_sketch_of_all_of_g_is_exact(monkeypatch):
    monkeypatch.setattr(parameter_space, "SKETCHED", 96)
    case = make_case("mlp", "classification", 30)
    found = lanczos(case, BY_PRODUCTS)
    exact = case.evidence(structure="full", prior_precision=PRECISION)
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-6)
    assert found.log_evidence_stderr < 1e-6


@pytest.mark.parametrize("precision", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("budget", [STORED, REREAD], ids=["stored", "reread"])
def test_all_rows_selected_are_exact(budget, precision, monkeypatch):
    monkeypatch.setattr(row_space, "num_selected", lambda problem: problem.num_rows)
    case = make_case("mlp", "classification", 30)
    exact = case.evidence(structure="full", prior_precision=precision)
    found = lanczos(case, budget, prior_precision=precision)
    assert (found.log_evidence_stderr, found.effective_parameters_stderr) == (0.0, 0.0)
    assert found.log_evidence == pytest.approx(exact.log_evidence, rel=1e-9)
    assert found.effective_parameters == pytest.approx(exact.effective_parameters, rel=1e-8)
    assert found.newton_decrement == pytest.approx(exact.newton_decrement, rel=1e-3)
    assert found.interval == (found.log_evidence, found.log_evidence)
    assert found.upper - found.lower < 1e-6


@FORMS
def test_one_vector(budget):
    case = make_case("mlp", "classification", 30)
    exact = case.evidence(structure="full", prior_precision=1.0)
    every = by_seeds(case, 24, budget, prior_precision=1.0, num_probes=1)
    assert {len(one.samples) for one in every} == {1}
    off = [one.log_evidence - exact.log_evidence for one in every]
    assert abs(statistics.mean(off)) < 4 * statistics.stdev(off) / math.sqrt(24)
    # A bound on average.
    assert statistics.pvariance(off) < 1.5 * statistics.mean(one.log_evidence_stderr**2 for one in every)


@FORMS
def test_vectors_are_added_until_the_error_is_met(budget, caplog):
    case = make_case("mlp", "classification", 30)
    arguments = {"num_probes": 4, "prior_precision": 1.0}
    few = lanczos(case, budget, **arguments)
    wanted = 0.7 * few.log_evidence_stderr
    with caplog.at_level(logging.INFO, "lightning_bayes"):
        more = lanczos(case, budget, max_stderr=wanted, **arguments)
    assert more.log_evidence_stderr <= wanted < few.log_evidence_stderr
    assert more.samples[:4] == pytest.approx(few.samples, rel=1e-6)
    assert 4 < len(more.samples) < 32
    said = [record.message for record in caplog.records if "standard error of" in record.message]
    assert len(said) == 1
    assert "random vectors in the place of 4" in said[0]
    as_it_was = lanczos(case, budget, max_stderr=10.0 * few.log_evidence_stderr, **arguments)
    assert as_it_was.samples == pytest.approx(few.samples)


def test_an_error_that_two_vectors_misjudge_is_met_or_said_not_to_be():
    case = make_case("mlp", "classification", 30)
    arguments = {"num_probes": 2, "prior_precision": 1.0}
    wanted = 0.5 * lanczos(case, BY_PRODUCTS, **arguments).log_evidence_stderr
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = lanczos(case, BY_PRODUCTS, max_stderr=wanted, **arguments)
    assert found.log_evidence_stderr <= wanted or caught


def test_beyond_a_thousand_vectors_the_cost_is_said_and_not_paid():
    case = make_case("mlp", "classification", 30)
    with pytest.warns(
        UserWarning, match=r"stays at its 2 vectors.*random vectors.*beyond 1,024.*num_probes="
    ):
        found = lanczos(case, num_probes=2, max_stderr=1e-3)
    assert len(found.samples) == 2


def test_vectors_take_turns_where_their_bases_do_not_fit():
    case = make_case("mlp", "classification", 30)
    at_once, in_turn = (lanczos(case, budget, num_probes=5) for budget in (STORED, Budget(basis_bytes=0.0)))
    # Each turn ends by its own gap.
    assert in_turn.log_evidence == pytest.approx(at_once.log_evidence, abs=0.1 * at_once.log_evidence_stderr)
    assert in_turn.log_evidence_stderr == pytest.approx(at_once.log_evidence_stderr, rel=0.05)
    assert len(in_turn.samples) == 5


def test_too_few_steps_are_said_and_in_the_error(monkeypatch):
    monkeypatch.setattr(estimate, "MAX_STEPS", 1)
    case = make_case("mlp", "classification", 50)
    exact = case.evidence(structure="full", prior_precision=1e-4)
    with pytest.warns(UserWarning, match="not converged in 1 steps.*larger prior precision"):
        found = lanczos(case, prior_precision=1e-4, num_probes=64)
    assert abs(found.log_evidence - exact.log_evidence) < 4 * found.log_evidence_stderr


def test_seeds_are_vectors_and_nothing_else():
    case = make_case("mlp", "classification", 30)
    first, second = (computation(case, seed=seed) for seed in (0, 1))
    values = [one.run(case.model, (case.inputs, case.targets), evidence_of) for one in (first, second, first)]
    torch.manual_seed(99)
    assert values[0].samples == values[2].samples == lanczos(case).samples
    assert not set(values[0].samples) & set(values[1].samples)
    assert values[0].upper == values[1].upper


# The noise, the prior, the curve.


def test_the_noise_is_found():
    case = make_case("mlp", "regression", 60)
    exact = case.evidence(structure="full", prior_precision=1.0)
    found = lanczos(case, prior_precision=1.0)
    assert found.noise_variance == pytest.approx(exact.noise_variance, rel=0.05)
    assert found.log_evidence_ratio is None
    assert abs(found.log_evidence - exact.log_evidence) < 4 * found.log_evidence_stderr
    assert found.newton_decrement == pytest.approx(exact.newton_decrement, rel=0.05)


@pytest.mark.parametrize(
    ("network", "loss", "size"),
    [("mlp", "classification", 50), ("conv", "weighted", 40), ("mlp", "regression", 60)],
)
def test_the_best_prior_is_nearly_the_best(network, loss, size):
    case = make_case(network, loss, size)
    best = case.evidence(structure="full", prior_precision="optimize")
    found = lanczos(case, prior_precision="optimize")
    there = case.evidence(structure="full", prior_precision=found.prior_precision)
    assert found.prior_optimized
    assert best.log_evidence - 0.1 < there.log_evidence <= best.log_evidence + 1e-6
    assert abs(found.log_evidence - there.log_evidence) < 4 * found.log_evidence_stderr
    assert found.log_evidence_best_prior == found.log_evidence
    assert found.best_prior_precision == found.prior_precision


@FORMS
def test_the_curve(budget):
    case = make_case("mlp", "classification", 40)
    grid = [0.01, 0.1, 1.0]
    arguments = {"likelihood": "classification", "budget": budget, "batch_size": 16, "num_probes": 8}
    curve = evidence_curve(case.model, (case.inputs, case.targets), grid, structure="lanczos", **arguments)
    exact = evidence_curve(case.model, (case.inputs, case.targets), grid, structure="full")
    torch.testing.assert_close(curve.log_likelihood, exact.log_likelihood)
    torch.testing.assert_close(curve.weight_penalty, exact.weight_penalty)
    off = (curve.log_evidence - exact.log_evidence).abs()
    assert bool((off < 4 * curve.log_evidence_stderr).all())
    for precision, value, stderr in zip(grid, curve.log_evidence, curve.log_evidence_stderr, strict=True):
        alone = lanczos(case, budget, prior_precision=precision, num_probes=8)
        assert value.item() == pytest.approx(alone.log_evidence, rel=1e-8)
        assert stderr.item() == pytest.approx(alone.log_evidence_stderr, rel=1e-6)
    if budget == BY_PRODUCTS:
        assert curve.lower is curve.upper is None
    else:
        assert bool(((curve.lower <= exact.log_evidence) & (exact.log_evidence <= curve.upper)).all())


def test_the_default_grid_and_the_error_of_differences():
    case = make_case("mlp", "classification", 50)
    arguments = {"structure": "lanczos", "likelihood": "classification", "batch_size": 16, "num_probes": 8}
    curve = evidence_curve(case.model, (case.inputs, case.targets), **arguments)
    steps = (curve.prior_precisions / curve.best).log10()
    torch.testing.assert_close(steps, torch.linspace(-1.5, 1.5, 7, dtype=torch.float64))
    exact = evidence_curve(
        case.model,
        (case.inputs, case.targets),
        [*curve.prior_precisions.tolist(), curve.best],
        structure="full",
    )
    at_best = exact.log_evidence[exact.prior_precisions == curve.best][0]
    right = exact.log_evidence[exact.prior_precisions != curve.best]
    if len(right) == 6:  # the middle of the grid is the best itself
        right = exact.log_evidence[[0, 1, 2, 3, 5, 6, 7]]
    differences = curve.log_evidence - curve.best_log_evidence
    assert curve.difference_stderr[3] < 1e-6
    beside = curve.difference_stderr[[2, 4]]
    assert bool((beside < 0.6 * curve.log_evidence_stderr[[2, 4]]).all())
    off = (differences - (right - at_best)).abs()
    assert bool((off <= 4 * curve.difference_stderr + 0.2 * curve.log_evidence_stderr).all())


def test_above_pairs_the_vectors():
    case = make_case("mlp", "classification", 50)
    one, other = (lanczos(case, prior_precision=precision) for precision in (0.1, 0.11))
    exact = [case.evidence(structure="full", prior_precision=precision) for precision in (0.1, 0.11)]
    difference, stderr = one.above(other)
    assert difference == pytest.approx(one.log_evidence - other.log_evidence, rel=1e-9)
    assert stderr < 0.2 * one.log_evidence_stderr
    right = exact[0].log_evidence - exact[1].log_evidence
    # The steps end at a tenth of the error.
    assert abs(difference - right) < 4 * stderr + 0.2 * one.log_evidence_stderr
    assert one.above(one) == (0.0, 0.0)
    sides = one.above(exact[1])
    assert sides == (one.log_evidence - exact[1].log_evidence, one.log_evidence_stderr)


# Options.


@pytest.mark.parametrize("name", ["num_probes", "max_stderr"])
@pytest.mark.parametrize("structure", ["full", "blocks", "kron", "diag"])
def test_vectors_are_those_of_lanczos(name, structure):
    with refuses((f"`{name}` to be None", f"beside structure='{structure}'"), 3, 'structure="lanczos"'):
        make_case().evidence(structure=structure, **{name: 3})


@pytest.mark.parametrize(
    ("arguments", "words", "got", "remedy"),
    [
        ({"num_probes": 0}, "`num_probes`", 0, "at least 1"),
        ({"num_probes": 2.5}, "`num_probes`", 2.5, "whole number"),
        ({"max_stderr": 0.0}, "`max_stderr`", 0.0, "a finite number above 0"),
        ({"max_stderr": math.nan}, "`max_stderr`", math.nan, "a finite number above 0"),
        ({"tolerance": 1.0}, "`tolerance` to be None", 1.0, 'structure="full"'),
        ({"num_samples": 4}, "`num_samples` to be None", 4, 'structure="kron"'),
        ({"num_blocks": 8}, "`num_blocks` to be None", 8, 'structure="blocks"'),
        ({"curvature": "hessian"}, "`structure`", "lanczos", 'curvature="ggn"'),
    ],
)
def test_what_does_not_go_with_it_is_refused(arguments, words, got, remedy):
    with refuses(words, got, remedy):
        lanczos(make_case(), **arguments)


@pytest.mark.parametrize("curvature", ["hessian", "hessian_positive"])
def test_a_hessian_has_no_vectors(curvature):
    with refuses(("`num_probes` to be None", f"curvature='{curvature}'"), 4, 'curvature="ggn"'):
        make_case().evidence(curvature=curvature, num_probes=4)


@pytest.mark.parametrize("words", ["optimize_per_layer", "optimize_per_parameter"])
def test_several_priors_are_not_found(words):
    with refuses(('structure="lanczos"', "several"), remedy='prior_precision="optimize"'):
        lanczos(make_case(), prior_precision=words)


def test_what_is_printed():
    found = lanczos(make_case("mlp", "classification", 50))
    text = str(found)
    reach = found.interval[1] - found.log_evidence
    assert f"± {found.log_evidence_stderr:.2g} (95 %: ± {reach:.2g})" in text
    assert f"certified in [{found.lower:,.2f}, {found.upper:,.2f}]" in text
    assert f"± {found.effective_parameters_stderr:.2g} of {found.num_parameters:,}" in text


# Nyström's sketch.


def positive(size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    root *= 10.0 ** (-2.0 * torch.rand(rank, 1, generator=generator, dtype=torch.float64))
    return root.mT @ root


@settings(settings.get_profile("engine"))
@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_a_sketch_is_below_and_exact_where_the_rank_suffices(size, rank, sketched, at_once, seed):
    matrix = positive(size, rank, seed)
    sketched = min(sketched, size)
    calls = []

    def product(vectors):
        calls.append(len(vectors))
        return vectors @ matrix

    sketch = nystrom_sketch(product, matrix[0], sketched, at_once, seed)
    assert max(calls) <= at_once
    assert sum(calls) == sketched
    low = (sketch.vectors.mT * sketch.values) @ sketch.vectors
    slack = 1e-7 * matrix.diagonal().sum().item()
    assert torch.linalg.eigvalsh(matrix - low).min().item() > -slack
    assert bool((sketch.values >= 0.0).all())
    eye = torch.eye(len(sketch.vectors), dtype=torch.float64)
    torch.testing.assert_close(sketch.vectors @ sketch.vectors.mT, eye, rtol=0.0, atol=1e-9)
    if sketched >= rank:
        torch.testing.assert_close(low, matrix, rtol=0.0, atol=slack)


@given(st.integers(2, 8), st.integers(0, 99), st.floats(0.01, 100.0), st.sampled_from([-1.0, -0.5, 0.5, 1.0]))
def test_powers_of_a_shifted_sketch(size, seed, scale, power):
    matrix = positive(size, size, seed)
    sketch = nystrom_sketch(lambda vectors: vectors @ matrix, matrix[0], max(1, size // 2), 3, seed)
    shifted = torch.eye(size).double() + (sketch.vectors.mT * sketch.values) @ sketch.vectors / scale
    values, basis = torch.linalg.eigh(shifted)
    vectors = torch.randn(3, size, dtype=torch.float64)
    expected = vectors @ ((basis * values**power) @ basis.mT)
    torch.testing.assert_close(sketch.shifted_power(vectors, scale, power), expected, rtol=1e-7, atol=1e-7)


@FORMS
@pytest.mark.parametrize("precision", [1e-12, 1e-6, 1e12])
def test_float32_at_extreme_priors_gives_a_number_or_says_why(budget, precision):
    case = make_case("mlp", "classification", 30)
    case = replace(case, model=case.model.float(), inputs=case.inputs.float())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = lanczos(case, budget, prior_precision=precision)
        except EvidenceUnavailableError as error:
            assert "larger prior precision" in str(error)
            return
    assert math.isfinite(found.log_evidence)
    assert math.isfinite(found.log_evidence_stderr)
    double = make_case("mlp", "classification", 30).evidence(structure="full", prior_precision=precision)
    most = found.newton_decrement + found.newton_decrement_error
    assert most >= 0.99 * double.newton_decrement


def test_a_curve_of_different_numbers_of_vectors():
    case = make_case("mlp", "classification", 30)
    single = lanczos(case).log_evidence_stderr
    curve = computation(case, max_stderr=0.5 * single, prior_precision="optimize").run(
        case.model, (case.inputs, case.targets), lambda totals: curve_of(totals, [0.01, 0.1, 10.0])
    )
    assert bool((curve.log_evidence_stderr <= 0.5 * single).all())
    assert bool(curve.difference_stderr.isfinite().all())


def test_differences_of_different_numbers_of_vectors_are_those_of_the_common_ones():
    case = make_case("mlp", "classification", 30)
    few, many = lanczos(case, num_probes=4), lanczos(case, num_probes=12)
    difference, stderr = many.above(few)
    assert abs(difference) < 1e-6
    assert stderr < 1e-6


def test_a_decrement_that_may_be_larger_is_not_a_minimum():
    sure = lanczos(make_case("mlp", "classification", 30))
    unsure = replace(sure, newton_decrement=0.5, newton_decrement_error=1e6)
    assert not unsure.at_minimum
    assert "at most" in str(unsure)


def test_auto_with_vectors_and_many_outputs_says_that_they_have_no_effect(monkeypatch):
    case = make_case("mlp", "classification", 30)
    automatic = Computation(
        structure="auto", num_probes=4, likelihood="classification", budget=Budget(columns=1, seconds=0.0)
    )
    with pytest.warns(UserWarning, match="num_probes= and max_stderr= are those of"):
        found = automatic.run(case.model, (case.inputs, case.targets), evidence_of)
    assert found.structure == "kron"
