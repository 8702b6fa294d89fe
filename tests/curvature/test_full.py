"""The exact structure against dense Jacobians, through either side of Sylvester's identity."""

import functools
from dataclasses import replace

import pytest
import torch

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.numerics.cholesky import diagonal_of_inverse
from lightning_bayes.structures import dual, dual_system
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.primal import PrimalCurvature
from lightning_bayes.structures.registry import STRUCTURES
from tests.cases import make_case
from tests.reference import assert_agrees
from tests.refusals import refuses

SIDES = {"primal": PrimalCurvature, "dual": DualCurvature}
reference = functools.cache(lambda network, loss, precision: make_case(network, loss).reference(precision))


@pytest.fixture(params=SIDES)
def side(request, monkeypatch):
    monkeypatch.setitem(STRUCTURES, "full", SIDES[request.param])
    return request.param


@pytest.mark.parametrize("curvature", [PrimalCurvature, DualCurvature])
@pytest.mark.parametrize(
    ("network", "loss", "num_examples"),
    [
        ("mlp", "classification", 30),
        ("mlp", "classification", 5),
        ("linear", "binary", 9),
        ("linear", "binary", 3),
        ("mlp", "regression", 25),
        ("mlp", "binary_3", 6),
    ],
)
def test_either_side_with_more_rows_or_more_parameters(network, loss, num_examples, curvature, monkeypatch):
    monkeypatch.setitem(STRUCTURES, "full", curvature)
    case = make_case(network, loss, num_examples)
    assert_agrees(case.evidence(structure="full", prior_precision=0.3), case.reference(0.3))


def test_a_precision_for_each_tensor(side):
    case = make_case("mlp", "classification")
    precision = {name: 10.0 ** (i - 3) for i, name in enumerate(case.names)}
    assert_agrees(case.evidence(structure="full", prior_precision=precision), case.reference(precision))


@pytest.mark.parametrize("tile_rows", [1, 5, 9])
def test_tiles_of_the_dual_do_not_matter(tile_rows, monkeypatch):
    monkeypatch.setitem(STRUCTURES, "full", DualCurvature)
    monkeypatch.setattr(dual_system, "TILE_ROWS", tile_rows)
    evidence = make_case("conv", "classification").evidence(structure="full", prior_precision=1e-3)
    assert_agrees(evidence, reference("conv", "classification", 1e-3))


def test_one_curvature_answers_for_several_priors(side):
    """`at` may be called again: the second answer is that of a fresh curvature."""
    case = make_case("mlp", "classification")
    built = []

    def spy(problem):
        built.append(SIDES[side](problem))
        return built[-1]

    STRUCTURES["full"] = spy  # the fixture's monkeypatch puts the old one back
    case.evidence(structure="full", prior_precision=1.0)
    zero = {name: torch.zeros_like(p) for name, p in case.model.named_parameters()}
    for precision in (0.01, 7.0, 0.01):
        answer = built[0].at(dict.fromkeys(case.names, precision), zero)
        expected = case.reference(precision)
        assert answer.log_det == pytest.approx(-2 * expected.log_occam_factor, rel=1e-10)
        assert answer.effective_parameters == pytest.approx(expected.effective_parameters, rel=1e-10)
        assert answer.quadratic == 0.0


def kept_curvature(case, structure, monkeypatch, **options):
    """The curvature that an evidence is made of."""
    built = []

    def spy(problem):
        built.append(make(problem))
        return built[-1]

    make = STRUCTURES[structure]
    monkeypatch.setitem(STRUCTURES, structure, spy)
    case.evidence(structure=structure, **options)
    return built[0]


def dense_ggn(case, precision):
    """Λ⁻¹ᐟ² G Λ⁻¹ᐟ² from Jacobians, and the sizes of its blocks."""
    ggn = case.slow_twin().ggn
    sizes = [p.numel() for p in case.model.parameters()]
    parts = zip(sizes, case.names, strict=True)
    scale = torch.cat([ggn.new_full((size,), precision[name] ** -0.5) for size, name in parts])
    return scale.unsqueeze(1) * ggn * scale, sizes


@pytest.mark.parametrize("network", ["mlp", "conv", "batch_norm", "sequence", "called_twice"])
def test_spectrum_and_traces_are_those_of_the_dense_matrix(network, side, monkeypatch):
    case = make_case(network)
    precision = {name: 10.0 ** (0.5 * i - 1) for i, name in enumerate(case.names)}
    curvature = kept_curvature(case, "full", monkeypatch)
    ggn, sizes = dense_ggn(case, precision)
    eigenvalues = torch.linalg.eigvalsh(ggn)
    found = curvature.spectrum(precision).sort().values
    shared = min(len(found), len(eigenvalues))
    torch.testing.assert_close(found[-shared:], eigenvalues[-shared:].clamp(min=0.0), rtol=1e-9, atol=1e-9)
    log_det, traces = curvature.log_det_and_traces(precision)
    assert log_det == pytest.approx(eigenvalues.clamp(min=0.0).log1p().sum().item(), rel=1e-9)
    shrinkage = (ggn @ torch.linalg.inv(torch.eye(len(ggn)) + ggn)).diagonal().split(sizes)
    for name, part in zip(case.names, shrinkage, strict=True):
        assert traces[name] == pytest.approx(part.sum().item(), rel=1e-7, abs=1e-9), name


def test_spectrum_and_traces_of_a_bracket_are_those_of_the_rows_it_kept(monkeypatch):
    """Its log-determinant and its γ by tensor belong to one matrix, which is not above the whole one."""
    monkeypatch.setitem(STRUCTURES, "full", BracketCurvature)
    case = make_case("mlp", num_examples=12)
    curvature = kept_curvature(case, "full", monkeypatch, budget=Budget(bracket_share=1e9), tolerance=2.0)
    whole = torch.linalg.eigvalsh(dense_ggn(case, dict.fromkeys(case.names, 0.8))[0]).clamp(min=0.0)
    precision = dict.fromkeys(case.names, 0.8)
    curvature = curvature.of_chosen_rows(precision)
    spectrum = curvature.spectrum(precision).sort(descending=True).values
    log_det, traces = curvature.log_det_and_traces(precision)
    assert log_det == pytest.approx(spectrum.log1p().sum().item(), rel=1e-9)
    assert sum(traces.values()) == pytest.approx((spectrum / (1 + spectrum)).sum().item(), rel=1e-7)
    assert traces.keys() == precision.keys()
    largest = whole.flip(0)[: len(spectrum)]
    assert (spectrum <= largest * (1 + 1e-9) + 1e-9).all()
    assert log_det < 0.99 * whole.log1p().sum().item()


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_rows_of_the_primal_that_are_kept_or_summed(kept, monkeypatch):
    monkeypatch.setitem(STRUCTURES, "full", PrimalCurvature)
    case = make_case("linear", "classification", 20)
    found = case.evidence(Budget(primal_rows=kept), structure="full", prior_precision=0.3)
    assert_agrees(found, case.reference(0.3))


@pytest.mark.parametrize("precision", [1.0, 1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("network", ["mlp", "linear"])
def test_small_matrices_of_a_float32_model_fall_back_to_float64_in_silence(network, precision, side):
    """Warnings are errors. At 1e-7 the factor in float32 has lost its digits, at 1 it has all that count."""
    case = make_case(network, "classification", 12)
    expected = case.reference(precision)
    single = replace(case, model=case.model.float(), inputs=case.inputs.float())
    evidence = single.evidence(structure="full", prior_precision=precision)
    for field in ("log_occam_factor", "newton_decrement", "effective_parameters"):
        assert getattr(evidence, field) == pytest.approx(getattr(expected, field), rel=2e-5), field


@pytest.mark.parametrize("size", [1, 127, 129, 300])
def test_diagonal_of_the_inverse_by_halves(size):
    rows = torch.randn(size, size, dtype=torch.float64)
    matrix = rows @ rows.mT / size + torch.eye(size)
    found = diagonal_of_inverse(torch.linalg.cholesky(matrix))
    torch.testing.assert_close(found, torch.linalg.inv(matrix).diagonal())


@pytest.fixture
def in_single_precision(monkeypatch):
    """The engine's float32 answer where the dual matrix counts as large, beside the float64 reference."""
    monkeypatch.setitem(STRUCTURES, "full", DualCurvature)

    def answer(network, precision):
        case = make_case(network, "classification", 12)
        expected = case.reference(precision)
        single = replace(case, model=case.model.float(), inputs=case.inputs.float())
        return single.evidence(Budget(small=8), structure="full", prior_precision=precision), expected

    return answer


def test_large_dual_in_float32_with_a_stochastic_trace(in_single_precision):
    evidence, expected = in_single_precision("conv", 0.1)
    # The rows carry float32 rounding, 6e-8; sums of 36 rows and one factorisation stay within 100 of it.
    for field in ("log_evidence", "log_occam_factor", "log_likelihood", "newton_decrement"):
        assert getattr(evidence, field) == pytest.approx(getattr(expected, field), rel=1e-5), field
    stderr = evidence.effective_parameters_stderr
    assert 0.0 < stderr < 0.1 * expected.effective_parameters
    # Hutchinson's estimate with fixed seed: within four standard errors of the exact trace.
    assert abs(evidence.effective_parameters - expected.effective_parameters) < 4 * stderr


@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_refinement_gives_the_newton_decrement_the_digits_that_the_factor_lacks(network, in_single_precision):
    """K reaches 1e5 here: without refinement the error is 3e-4."""
    evidence, expected = in_single_precision(network, 1e-5)
    assert evidence.newton_decrement == pytest.approx(expected.newton_decrement, rel=2e-6)


@pytest.mark.parametrize(
    ("network", "precision"),
    [("linear", 1e-5), ("mlp", 1e-6), ("mlp", 1e-7), ("conv", 1e-7), ("linear", 1e-8)],
)
def test_a_factor_that_would_lose_its_digits_is_one_in_float64(
    network, precision, in_single_precision, caplog
):
    """In float32 the mlp has a factor at 1e-7, no pivot below 1, and a decrement wrong by -130 times."""
    with caplog.at_level("INFO", logger="lightning_bayes"):
        evidence, expected = in_single_precision(network, precision)
    assert "factorised in torch.float64" in caplog.text
    assert "larger prior precision" in caplog.text
    assert evidence.log_occam_factor == pytest.approx(expected.log_occam_factor, rel=1e-6)
    assert evidence.newton_decrement == pytest.approx(expected.newton_decrement, rel=1e-5)


@pytest.mark.parametrize("precision", [1e-14, 1e-17, 1e-30])
def test_rounding_that_swamps_the_prior_is_not_reported_as_evidence(precision, side):
    """A softmax does not see the mean of its logits: G is singular, and the 1 of I + G/λ is lost in rounding."""
    case = make_case("linear", "classification", 40)
    with refuses("Raise the prior precision", error=EvidenceUnavailableError):
        case.evidence(structure="full", prior_precision=precision)


def test_layers_that_come_and_go_from_batch_to_batch(side):
    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = torch.nn.Linear(40, 2), torch.nn.Linear(40, 2)

        def forward(self, x):
            return self.left(x) if x[0, 0] > 0 else self.right(x)

    inputs = torch.randn(4, 40).double()
    inputs[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    case = replace(make_case(), model=Routed().double(), inputs=inputs, targets=torch.tensor([0, 1, 0, 1]))
    assert_agrees(case.evidence(structure="full", batch_size=2), case.reference(1.0))


def test_rows_that_rounding_hides_are_left_out_of_a_large_exact_matrix(monkeypatch):
    """In float32 alone, and by no more than its rounding of tr(I + K)."""
    case = make_case("linear", "classification", 60)
    with torch.no_grad():
        case.model.weight.mul_(40.0)  # sure of most examples
    accurate = case.evidence(structure="full")
    single = replace(case, model=case.model.float(), inputs=case.inputs.float())
    sizes = []
    original = dual.factorise
    monkeypatch.setattr(
        dual, "factorise", lambda layers, *rest: sizes.append(layers[0].num_rows) or original(layers, *rest)
    )
    monkeypatch.setitem(STRUCTURES, "full", DualCurvature)
    budget = Budget(small=8, probes=20_000)
    found = single.evidence(budget, structure="full")
    whole = single.evidence(replace(budget, left_out_share=1.1), structure="full")
    assert sizes[0] < 0.85 * sizes[1]
    assert found.log_evidence == pytest.approx(whole.log_evidence, rel=1e-6)
    assert found.lower == found.upper == found.log_evidence
    assert found.newton_decrement == pytest.approx(whole.newton_decrement, rel=1e-5)
    assert found.effective_parameters == pytest.approx(
        whole.effective_parameters, abs=4 * found.effective_parameters_stderr
    )
    assert accurate.log_evidence == pytest.approx(found.log_evidence, rel=1e-4)


@pytest.mark.parametrize("expected", [1, 7, 500])
def test_rows_have_room_whatever_was_expected(expected, monkeypatch):
    """The number of examples is an estimate: too small, too large, or right."""
    case = make_case("mlp", "classification", 30)
    curved = []

    def make(problem):
        curved.append(PrimalCurvature(replace(problem, num_examples=expected)))
        return curved[-1]

    monkeypatch.setitem(STRUCTURES, "full", make)
    assert_agrees(case.evidence(structure="full", prior_precision=2.0), case.reference(2.0))
    assert curved
