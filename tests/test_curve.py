"""The evidence over λ is, point by point, the evidence at that λ."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch

from lightning_bayes import EvidenceCurve, Gaussian, evidence_curve
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.registry import STRUCTURES
from tests.cases import make_case
from tests.refusals import refuses

mpl.use("Agg")

GRID = [1e-3, 0.2, 1.0, 7.0, 1e3]


def curve_of(case, *grid, **arguments):
    arguments = {"likelihood": case.loss.likelihood(case.class_dim), "batch_size": 3} | arguments
    return evidence_curve(case.model, (case.inputs, case.targets), *grid, **arguments)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("loss", ["classification", "regression", "regression_given_noise"])
def test_each_point_is_an_evidence(loss, structure):
    case = make_case("mlp", loss)
    curve = curve_of(case, GRID, structure=structure)
    assert curve.prior_precisions.tolist() == GRID
    for i, precision in enumerate(GRID):
        reference = case.reference(precision, structure)
        for name in (
            "log_evidence",
            "log_likelihood",
            "weight_penalty",
            "log_occam_factor",
            "effective_parameters",
        ):
            assert getattr(curve, name)[i].item() == pytest.approx(getattr(reference, name), rel=1e-8)
    optimum = case.evidence(structure=structure, prior_precision="optimize")
    assert curve.best == pytest.approx(optimum.prior_precision, rel=1e-9)
    assert curve.best_log_evidence == pytest.approx(optimum.log_evidence, rel=1e-12)


def test_noise_that_is_optimized_is_optimized_at_each_point():
    case = make_case("mlp", "regression", 20)
    curve = curve_of(case, GRID, likelihood=Gaussian(sigma="optimize"))
    for i, precision in enumerate(GRID):
        one = case.evidence(likelihood=Gaussian(sigma="optimize"), prior_precision=precision)
        assert curve.log_evidence[i].item() == pytest.approx(one.log_evidence, rel=1e-9)
    best = case.evidence(likelihood=Gaussian(sigma="optimize"), prior_precision="optimize")
    assert curve.best_log_evidence == pytest.approx(best.log_evidence, rel=1e-9)


def test_the_default_grid_lies_about_the_best():
    curve = curve_of(make_case("mlp"), subset_of_weights="last_layer")
    assert len(curve.prior_precisions) == 61
    assert curve.prior_precisions[30].item() == pytest.approx(curve.best)
    assert curve.log_evidence.argmax() == 30
    assert (curve.prior_precisions[-1] / curve.prior_precisions[0]).item() == pytest.approx(1e6)


def test_a_hessian_has_a_curve_by_the_papers_convention():
    case = make_case("mlp", "classification", 30)
    curve = curve_of(case, GRID, curvature="hessian_positive")
    for i, precision in enumerate(GRID):
        one = case.evidence(curvature="hessian_positive", prior_precision=precision)
        assert curve.log_evidence[i].item() == pytest.approx(one.log_evidence, rel=1e-9)


def test_one_pass_over_the_data():
    case, calls = make_case("mlp", num_examples=9), []
    case.model[0].register_forward_hook(lambda *_: calls.append(1))
    curve_of(case, torch.logspace(-3, 3, 50))
    assert (
        len(calls) <= 10
    )  # three batches, each whole and in two halves, and two examples looked at beforehand


@pytest.mark.parametrize("given", [True, False])
def test_figure(given):
    from matplotlib import pyplot as plt  # noqa: PLC0415

    curve = curve_of(make_case("mlp"), GRID)
    mine = plt.subplots()[1]
    ax = curve.plot(mine) if given else curve.plot()
    assert (ax is mine) is given
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("prior precision λ", "nats", "log")
    x, y = ax.get_lines()[0].get_data()
    np.testing.assert_allclose(x, GRID)
    np.testing.assert_allclose(y, curve.log_evidence)
    assert f"best, λ = {curve.best:.3g}" in [text.get_text() for text in ax.get_legend().get_texts()]
    plt.close("all")


@pytest.mark.parametrize("grid", [[], [0.0], [1.0, -1.0], [math.nan], ["1"]])
def test_what_is_no_grid(grid):
    with refuses("`prior_precisions`"):
        curve_of(make_case(), grid)


def test_other_arguments_are_those_of_laplace_evidence():
    with refuses("takes `prior_precisions`"):
        curve_of(make_case(), prior_precision=1.0)
    with refuses("argument `structure`"):
        curve_of(make_case(), structure="dense")
    assert isinstance(curve_of(make_case(), [3.0, 1.0]), EvidenceCurve)


@pytest.mark.parametrize("tolerance", [0.3, 3.0])
def test_a_bracket_holds_the_whole_curve(tolerance, monkeypatch):
    """The rows of the smallest λ leave out less at every larger one."""
    case = make_case("mlp", "classification", 30)
    exact = curve_of(case, GRID, structure="full")
    assert torch.equal(exact.lower, exact.upper)
    monkeypatch.setitem(STRUCTURES, "full", BracketCurvature)
    budget = Budget(bracket_share=math.inf)
    curve = curve_of(case, GRID, structure="full", tolerance=tolerance, budget=budget)
    assert (curve.lower <= exact.log_evidence + 1e-9).all()
    assert (exact.log_evidence <= curve.upper + 1e-9).all()
    assert (curve.upper - curve.lower <= tolerance * (1 + 1e-9)).all()


def test_blocks_have_a_curve_of_bounds():
    case, budget = make_case("mlp", "classification", 30), Budget(least_kept=25, kept_flop=0.0)
    exact = curve_of(case, GRID, structure="full")
    curve = curve_of(case, GRID, structure="blocks", budget=budget)
    assert (curve.lower <= exact.log_evidence + 1e-9).all()
    assert (exact.log_evidence <= curve.upper + 1e-9).all()
    assert (curve.lower <= curve.log_evidence).all()
    assert (curve.log_evidence <= curve.upper).all()
    kept = case.evidence(budget, structure="blocks", prior_precision="optimize")
    assert curve.best == pytest.approx(kept.prior_precision, rel=1e-6)
    assert curve.best_log_evidence == pytest.approx(kept.log_evidence, rel=1e-9)
    assert curve.best_log_evidence >= curve.log_evidence.max().item() - 1e-6
    assert curve_of(case, [1.0], structure="kron").lower is None
