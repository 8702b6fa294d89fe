"""laplace_evidence() against other people's numbers, and what it does with bad input."""

import math

import pytest
import torch
from sklearn.linear_model import BayesianRidge
from torch import nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.evidence.laplace import laplace_evidence
from lightning_bayes.likelihoods import Gaussian
from tests.cases import make_case
from tests.refusals import refuses

STRUCTURES = ["full", "kron", "diag"]


def linear_gaussian(num_examples, num_inputs):
    torch.manual_seed(2)
    x = torch.randn(num_examples, num_inputs, dtype=torch.float64)
    y = x @ torch.randn(num_inputs, dtype=torch.float64) + 0.5 * torch.randn(
        num_examples, dtype=torch.float64
    )
    return x, y


@pytest.mark.parametrize("shape", [(40, 6), (12, 30)])
def test_scikit_learns_bayesian_ridge(shape):
    """Its scores_ is the log-evidence at the posterior mean, plus its log hyperpriors: a ln λ - b λ of each."""
    x, y = linear_gaussian(*shape)
    hyper = {"alpha_1": 1.5, "alpha_2": 0.5, "lambda_1": 2.0, "lambda_2": 0.7}
    ridge = BayesianRidge(fit_intercept=False, compute_score=True, max_iter=10_000, tol=1e-13, **hyper).fit(
        x, y
    )
    noise_precision, precision = float(ridge.alpha_), float(ridge.lambda_)
    hyperpriors = 1.5 * math.log(noise_precision) - 0.5 * noise_precision
    hyperpriors += 2.0 * math.log(precision) - 0.7 * precision
    model = nn.Linear(shape[1], 1, bias=False).double()
    model.weight.data[:] = torch.from_numpy(ridge.coef_)
    likelihood = Gaussian(sigma=noise_precision**-0.5)
    evidence = laplace_evidence(model, (x, y), likelihood=likelihood, prior_precision=precision)
    assert evidence.log_evidence == pytest.approx(ridge.scores_[-1] - hyperpriors, rel=1e-9)
    assert evidence.newton_decrement == pytest.approx(0.0, abs=1e-9)  # ridge.coef_ is the minimum
    assert evidence.at_minimum


@pytest.mark.parametrize("shape", [(40, 6), (5, 30)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_evidence_and_newton_decrement_of_a_linear_gaussian_model_add_up_anywhere(shape, scale):
    """To the exact marginal likelihood N(y; 0, σ² + x xᵀ/λ), whatever the weights."""
    x, y = linear_gaussian(*shape)
    sigma, precision = 0.7, 0.4
    covariance = sigma**2 * torch.eye(shape[0], dtype=torch.float64) + x @ x.mT / precision
    exact = MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item()
    model = nn.Linear(shape[1], 1, bias=False).double()
    nn.init.normal_(model.weight, std=scale)
    evidence = laplace_evidence(model, (x, y), likelihood=Gaussian(sigma), prior_precision=precision)
    assert evidence.log_evidence + evidence.newton_decrement == pytest.approx(exact, rel=1e-9)


def test_logistic_regression_is_the_paper_in_one_line():
    """One weight, one feature: ln P = ln p(y|ω) - λω²/2 - ½ ln(1 + Σ x² p(1 - p)/λ)."""
    x, y, weight, precision = torch.tensor([[1.0], [-2.0], [3.0]]), torch.tensor([1.0, 0.0, 0.0]), 0.8, 0.1
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(weight)
    p = [1 / (1 + math.exp(-weight * value)) for value in x.flatten().tolist()]
    curvature = sum(v**2 * q * (1 - q) for v, q in zip([1.0, -2.0, 3.0], p, strict=True))
    log_likelihood = math.log(p[0]) + math.log(1 - p[1]) + math.log(1 - p[2])
    expected = log_likelihood - precision * weight**2 / 2 - 0.5 * math.log1p(curvature / precision)
    evidence = laplace_evidence(model, (x, y), likelihood="binary", prior_precision=precision)
    assert evidence.log_evidence == pytest.approx(expected, rel=1e-6)
    assert evidence.log_evidence_ratio == pytest.approx(expected + 3 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_form_of_the_same_data_gives_the_same_evidence(structure):
    case = make_case("batch_norm", "classification", 70)
    dataset = TensorDataset(case.inputs, case.targets)
    expected = case.evidence(structure=structure, batch_size=None)
    for loader in (
        DataLoader(dataset, batch_size=8, shuffle=True),
        DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True),
    ):
        evidence = laplace_evidence(case.model, loader, structure=structure, device="cpu", progress=True)
        assert evidence.num_examples == 70
        assert evidence.log_evidence == pytest.approx(expected.log_evidence, rel=1e-11)
    for data in (loader, (case.inputs, case.targets)):
        assert laplace_evidence(case.model, data, max_examples=20.0, batch_size=7.0).num_examples == 20


def test_likelihood_objects_and_names_agree():
    case = make_case("linear", "regression")
    estimated = case.evidence()
    given = case.evidence(likelihood=Gaussian(sigma=math.sqrt(estimated.noise_variance)))
    assert given.log_evidence == pytest.approx(estimated.log_evidence, rel=1e-12)
    assert estimated.log_evidence_ratio is None


BAD_ARGUMENTS = {
    "structure": (
        ["FULL", None, 3],
        "'auto', 'full', 'lanczos', 'blocks', 'kron', 'kron_joint', 'kron_expand', 'diag'",
    ),
    "subset_of_weights": (["head", [], [3], None], "list of parameter-name patterns such as ['head.*']"),
    "curvature": (["fisher", None, True], "'ggn', 'hessian', 'hessian_positive'"),
    "backend": (["curvlinops", None], "'auto', 'backpack', 'autograd'"),
    "batch_size": ([0, -1, 2.5, True, "8"], "whole number of at least 1"),
    "max_examples": ([0, -1, 2.5, True, "8"], "whole number of at least 1"),
    "tolerance": ([0.0, -1.0, math.inf, "tight", True], "finite number above 0"),
    "num_samples": ([0, -1, 2.5, True, "8"], "whole number of at least 1"),
    "num_blocks": ([0, -1, 2.5, True, "8"], "whole number of at least 1"),
    "prior_precision": (
        [0.0, -1.0, math.nan, "auto", "optimize_per_group", None, {}],
        "positive, finite number, 'optimize', 'optimize_per_layer'",
    ),
    "likelihood": (["poisson", None], "Gaussian"),
    "device": (["nope", 3.5], "torch.device, its name or None"),
}


BAD_VALUES = [(name, value) for name, (values, _) in BAD_ARGUMENTS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_arguments_are_named_with_what_was_got(name, value):
    with refuses(f"argument `{name}`") as caught:
        make_case().evidence(**{name: value})
    assert BAD_ARGUMENTS[name][1] in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "name", "remedy"),
    [
        ({"tolerance": 1.0, "structure": "kron"}, "tolerance", 'structure="full" and "auto"'),
        ({"tolerance": 1.0, "structure": "kron_joint"}, "tolerance", 'structure="full" and "auto"'),
        ({"num_samples": 8, "structure": "full"}, "num_samples", 'structure="kron" or "diag"'),
        ({"num_samples": 8, "tolerance": 1.0}, "num_samples", 'structure="kron" or "diag"'),
        ({"curvature": "hessian", "structure": "kron"}, "structure", 'curvature="ggn"'),
        ({"curvature": "hessian", "tolerance": 1.0}, "tolerance", 'curvature="ggn"'),
        ({"curvature": "hessian_positive", "num_samples": 3}, "num_samples", 'curvature="ggn"'),
        ({"curvature": "hessian", "backend": "backpack"}, "backend", 'curvature="ggn"'),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together(arguments, name, remedy):
    with refuses(f"argument `{name}` to be", remedy=("beside", ", got")) as caught:
        make_case().evidence(**arguments)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "inputs", [torch.zeros(4, 5), torch.zeros(4, 3).double(), torch.zeros(4, 3).long()], ids=str
)
def test_inputs_that_the_network_does_not_take(inputs):
    with refuses("Linear, with parameters of torch.float32, failed on", remedy="`data`, (") as caught:
        laplace_evidence(nn.Linear(3, 2), (inputs, torch.zeros(4).long()))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert str(caught.value.__cause__) in str(caught.value)


def test_shapes_without_numbers():
    data = torch.zeros(4, 3), torch.zeros(4).long()
    with refuses("argument `device` to be a device that computes, got 'meta'"):
        laplace_evidence(nn.Linear(3, 2), data, device="meta")
    with refuses("parameters are on the device 'meta'", remedy="to_empty"):
        laplace_evidence(nn.Linear(3, 2, device="meta"), data)


@pytest.mark.parametrize("model", [None, "net", torch.relu, nn.Linear])
def test_models_that_are_none(model):
    with refuses("argument `model` to be a torch.nn.Module"):
        laplace_evidence(model, (torch.zeros(2, 3), torch.zeros(2).long()))


@pytest.mark.parametrize("data", [None, "data", TensorDataset(torch.zeros(3)), torch.zeros(3), {"x": 1}])
def test_data_that_are_none(data):
    with refuses("argument `data` to be a DataLoader", remedy=f"got {type(data).__name__}"):
        laplace_evidence(nn.Linear(3, 2), data)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([torch.zeros(3)] * 4, "(inputs, targets), got Tensor"),
        ([(torch.zeros(3), torch.zeros(2), torch.zeros(1))] * 4, "(inputs, targets), got list"),
        ([({"x": torch.zeros(3)}, torch.tensor(1))] * 4, "inputs to be one tensor, got dict"),
        ([{"x": torch.zeros(3)}] * 4, ("got dict", "LaplaceEvidence callback")),
    ],
)
def test_batches_that_are_no_pair(dataset, message):
    with refuses(message):
        laplace_evidence(nn.Linear(3, 2), DataLoader(dataset, batch_size=2))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weights", "1 of 20 entries of the parameter '0.weight' are NaN or infinite"),
        ("inputs", "outputs are NaN or infinite"),
        ("targets", "1 of 6 entries of the targets are NaN or infinite"),
    ],
)
def test_what_is_not_finite_has_no_evidence(where, message, value, structure):
    case = make_case("mlp", "regression")
    if where == "weights":
        case.model[0].weight.data[1, 2] = value
    else:
        getattr(case, where)[4, 0] = value  # in the second batch of three
    if where == "inputs":
        case.model[1] = nn.ReLU()  # tanh makes infinity a number
        case.model[0].weight.data.abs_()
    with refuses(message, error=EvidenceUnavailableError):
        case.evidence(structure=structure)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_numbers_that_overflow_have_no_evidence(structure):
    x, y = torch.ones(4, 1), torch.full((4, 1), 1e25)
    with refuses("overflows", error=EvidenceUnavailableError):
        laplace_evidence(nn.Linear(1, 1), (x, y), likelihood=Gaussian(1.0), structure=structure)


def test_interpolation_leaves_no_noise_to_estimate():
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    with refuses("residuals are all zero", remedy="Gaussian(sigma=...)", error=EvidenceUnavailableError):
        laplace_evidence(model, (torch.randn(4, 3), torch.zeros(4, 1)), likelihood="regression")


def test_no_trainable_parameter_is_no_evidence():
    with refuses("Linear has no trainable parameter"):
        laplace_evidence(nn.Linear(3, 2).requires_grad_(False), (torch.zeros(2, 3), torch.zeros(2).long()))
