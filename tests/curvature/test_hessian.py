"""The true Hessian against autograd's of the plainly written loss, in float64."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_bayes import EvidenceUnavailableError, laplace_evidence
from lightning_bayes.likelihoods import Bernoulli, Categorical, Gaussian, resolve_likelihood
from lightning_bayes.structures.hessian_reader import HessianReader
from tests.cases import NETWORKS, make_case
from tests.refusals import refuses

LOSSES = {
    "classification": (Categorical(), lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "binary_3": (
        Bernoulli(),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
    ),
    "regression": (Gaussian(), lambda f, y: 0.5 * (f - y).square().sum()),
}


def dense_hessian(model, inputs, targets, loss):
    """[p, p] of the summed loss in the parameters put end to end."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    flat = torch.cat([value.flatten() for value in named.values()])

    def cost(vector):
        pieces = vector.split([value.numel() for value in named.values()])
        changed = {n: piece.view_as(named[n]) for n, piece in zip(named, pieces, strict=True)}
        return loss(functional_call(model, changed, (inputs,)), targets)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return hessian(cost, flat)


class Attention(nn.Module):
    """Raw parameters and a fused kernel that has no second derivative of its own."""

    def __init__(self, num_outputs):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, num_outputs)
        self.fused = True

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=not self.fused)[0].mean(1))


class OneByOne(torch.autograd.Function):
    """x³, by a backward pass that vmap cannot batch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        grad.sum().item()  # a number, which a batched tensor is not
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Once(torch.autograd.Function):
    """x³, by a backward pass that autograd takes for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cubed(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Unbatchable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 2), nn.Linear(2, 4)

    def forward(self, x):
        return self.head(OneByOne.apply(self.stem(x)))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", [network for network in NETWORKS if network != "weight_norm"])
def test_it_is_the_second_derivative_whatever_the_batches(network, loss):
    case = make_case(network, loss)
    model = case.model.eval()
    likelihood = resolve_likelihood(case.loss.likelihood(case.class_dim))
    reader = HessianReader(model, case.names)
    total = sum(
        next(reader.read(lambda x=x, y=y: (model(x), y), likelihood).chunks).matrix
        for x, y in zip(case.inputs.split(3), case.targets.split(3), strict=True)
    )
    twin = case.slow_twin()
    unit = 1.0 if twin.noise is None else twin.noise  # the reader's is in units of the noise
    torch.testing.assert_close(total, unit * twin.hessian, rtol=1e-9, atol=1e-11)


def test_a_second_derivative_that_is_none_is_refused():
    """PyTorch's fused weight norm has one that is not symmetric, and not that of finite differences."""
    with refuses("not symmetric", remedy='curvature="ggn"'):
        make_case("weight_norm").evidence(curvature="hessian", prior_precision=300.0)


@pytest.mark.parametrize(
    ("layers", "subset"),
    [((nn.Linear(5, 4), Cubed()), "all"), ((nn.Linear(5, 2), Cubed(), nn.Linear(2, 4)), ["0.*"])],
    ids=["at the end", "behind all that count"],
)
def test_a_second_derivative_that_there_is_none_of_is_refused(layers, subset):
    """Autograd's Hessian is 0 there, and 0 is symmetric."""
    torch.manual_seed(1)
    model, data = nn.Sequential(*layers).double(), (torch.randn(7, 5).double(), torch.randint(4, (7,)))
    chosen = {"prior_precision": 300.0, "subset_of_weights": subset, "structure": "full"}
    with refuses("no derivative (Error", remedy=("once_differentiable", '"ggn" does without')):
        laplace_evidence(model, data, curvature="hessian", **chosen)
    assert laplace_evidence(model, data, curvature="ggn", **chosen).log_occam_factor < -1e-3


def test_attention_takes_a_kernel_that_has_second_derivatives():
    torch.manual_seed(1)
    model, x, y = Attention(3).double().eval(), torch.randn(4, 3, 4).double(), torch.randint(3, (4,))
    likelihood, summed = LOSSES["classification"]
    batch = HessianReader(model, dict(model.named_parameters())).read(lambda: (model(x), y), likelihood)
    found = next(batch.chunks).matrix
    model.fused = False  # attention written out
    torch.testing.assert_close(found, dense_hessian(model, x, y, summed), rtol=1e-9, atol=1e-11)


def test_what_cannot_be_batched_goes_row_by_row(caplog):
    torch.manual_seed(1)
    model, x, y = Unbatchable().double(), torch.randn(6, 5).double(), torch.randint(4, (6,))
    likelihood, summed = LOSSES["classification"]
    plain = nn.Sequential(
        model.stem, type("Cube", (nn.Module,), {"forward": lambda _, x: x**3})(), model.head
    )
    with caplog.at_level("INFO", logger="lightning_bayes"):
        batch = HessianReader(model, dict(model.named_parameters())).read(lambda: (model(x), y), likelihood)
        found = next(batch.chunks).matrix
    assert "row by row" in caplog.text
    torch.testing.assert_close(found, dense_hessian(plain, x, y, summed), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "loss", ["classification", "binary", "binary_3", "regression", "regression_given_noise"]
)
def test_it_is_the_ggn_where_outputs_are_linear_in_the_weights(loss):
    case = make_case("linear", loss, 20)
    ggn, exact = (case.evidence(curvature=way, prior_precision=0.3) for way in ("ggn", "hessian"))
    for name in ("log_evidence", "effective_parameters", "newton_decrement", "lower", "upper"):
        assert getattr(exact, name) == pytest.approx(getattr(ggn, name), rel=1e-10)
    assert (exact.structure, exact.curvature) == ("full", "hessian")
    assert (exact.num_eigenvalues_below_prior, exact.num_negative_eigenvalues) == (0, 0)
    assert ggn.num_eigenvalues_below_prior is None
    assert "exact Hessian" in str(exact)


def whitened_eigenvalues(case, precision):
    """Of the likelihood's Hessian in units of the prior, from the oracle."""
    _, summed = LOSSES[case.loss.task]
    matrix = dense_hessian(case.model.eval(), case.inputs, case.targets, summed)
    sizes = [parameter.numel() for parameter in case.model.parameters()]
    scale = torch.cat([torch.full((n,), v).double() for n, v in zip(sizes, precision, strict=True)]).rsqrt()
    return torch.linalg.eigvalsh(scale.unsqueeze(1) * matrix * scale)


@pytest.mark.parametrize("precision", [[12.0] * 6, [11.0, 20.0] * 3], ids=["one", "several"])
def test_eigenvalues_below_the_prior_are_counted(precision):
    case = make_case("mlp", "classification", 30)
    values = whitened_eigenvalues(case, precision)
    assert (
        values.min() > -1.0 and (values < -1e-12).sum() > 0
    )  # a minimum of the cost, with negative curvature
    prior = dict(zip(case.names, precision, strict=True))
    found = case.evidence(curvature="hessian", prior_precision=prior)
    assert found.num_eigenvalues_below_prior == (values < -1e-12).sum()
    assert found.num_negative_eigenvalues == 0
    assert found.log_occam_factor == pytest.approx(-0.5 * torch.log1p(values).sum().item(), rel=1e-9)
    assert found.effective_parameters == pytest.approx((values / (1 + values)).sum().item(), rel=1e-9)
    assert found.lower == found.upper == found.log_evidence
    kept = values[values > 0]
    positive = case.evidence(curvature="hessian_positive", prior_precision=prior)
    assert positive.log_occam_factor == pytest.approx(-0.5 * torch.log1p(kept).sum().item(), rel=1e-9)
    assert positive.effective_parameters == pytest.approx((kept / (1 + kept)).sum().item(), rel=1e-9)
    # The convention leaves terms out that raise the evidence, and says where the whole sum is.
    assert positive.log_evidence < positive.lower == positive.upper
    assert positive.upper == pytest.approx(found.log_evidence, rel=1e-12)
    assert "a heuristic" in str(positive)


def test_a_saddle_has_no_evidence_but_by_convention():
    case = make_case("mlp", "classification", 30)
    values = whitened_eigenvalues(case, [0.01] * 6)
    negative, below = int((values <= -1).sum()), int((values < -1e-12).sum())
    assert negative > 0
    with refuses("does not exist", error=EvidenceUnavailableError) as caught:
        case.evidence(curvature="hessian", prior_precision=0.01)
    assert f"{negative} eigenvalues at or below 0 ({below} of" in str(caught.value)
    assert 'curvature="ggn"' in str(caught.value) and "hessian_positive" in str(caught.value)
    found = case.evidence(curvature="hessian_positive", prior_precision=0.01)
    assert (found.num_eigenvalues_below_prior, found.num_negative_eigenvalues) == (below, negative)
    assert found.status == "negative curvature" and not found.at_minimum
    assert (found.lower, found.upper) == (-math.inf, math.inf)
    assert "NEGATIVE CURVATURE" in str(found) and f"{negative} of them negative" in str(found)


def test_dead_directions_are_no_negative_ones():
    """A unit that is never on leaves eigenvalues of ±1e-18, which are zero."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    model[0].bias.data.fill_(-1e3)
    data = torch.randn(9, 3).double(), torch.randn(9, 1).double()
    found = laplace_evidence(model, data, likelihood="regression", curvature="hessian")
    assert found.num_eigenvalues_below_prior == 0


def test_best_prior_of_a_hessian():
    case = make_case("linear", "classification", 20)
    for way in ("optimize", "optimize_per_parameter"):
        ggn, exact = (case.evidence(curvature=c, prior_precision=way) for c in ("ggn", "hessian"))
        assert exact.log_evidence == pytest.approx(ggn.log_evidence, rel=1e-10)
    bent = make_case("mlp", "classification", 30)
    with refuses("rises without bound, so no prior precision is best", error=EvidenceUnavailableError):
        bent.evidence(curvature="hessian", prior_precision="optimize")
    found = bent.evidence(curvature="hessian_positive", prior_precision="optimize")
    for factor in (0.9, 1.1):
        precision = found.prior_precision * factor
        other = bent.evidence(curvature="hessian_positive", prior_precision=precision)
        assert other.log_evidence < found.log_evidence


def test_large_networks_are_refused():
    with refuses("Hessian of 7,906 parameters takes 2 GB", remedy="up to 7,905"):
        HessianReader(nn.Linear(3952, 2), ["weight", "bias"])
