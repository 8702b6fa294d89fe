"""What is called exact or certified, for models in float32 whose curvature spans many orders of magnitude."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bayes import evidence_curve, laplace_evidence
from lightning_bayes.likelihoods import Gaussian, resolve_likelihood
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.hessian_reader import HessianReader
from tests.cases import evidence_within
from tests.curvature.dense import dense_matrix


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs.double(), targets, reduction="sum")


def squares(outputs, targets):
    return 0.5 * (outputs - targets).square().sum()


def right(net, x, y, loss, precision, curvature):
    """The log-evidence by dense autograd in float64, and the eigenvalues of the whitened matrix."""
    net, y = net.double(), y.double() if y.is_floating_point() else y
    x = x.double() if x.is_floating_point() else x
    kind = "ggn" if curvature == "ggn" else "hessian"
    values = torch.linalg.eigvalsh(dense_matrix(net, x, y, loss, kind)) / precision
    norm = sum(p.detach().square().sum().item() for p in net.parameters())
    fit = -loss(net(x), y).item() - 0.5 * precision * norm
    least = 0.0 if curvature == "hessian_positive" else -1.0
    return fit - 0.5 * values.clamp(min=least).log1p().sum().item(), values


class Casts(nn.Module):
    """float32 by hand: a plain tensor, a cast, a buffer written in place, and a view of the batch."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 4), nn.Linear(4, 3)
        self.scale = torch.linspace(0.5, 2.0, 6)

    def forward(self, x):
        h = torch.zeros(len(x), 6, dtype=torch.float32)
        h[:] = x @ torch.diag(self.scale)
        first = x.float()[:, :1]
        return self.down(torch.tanh(self.up(h)) + first)


class InDouble(nn.Module):
    """`Casts` written for float64."""

    def __init__(self, net):
        super().__init__()
        self.up, self.down = net.up, net.down
        self.scale = net.scale.double()

    def forward(self, x):
        return self.down(torch.tanh(self.up(x * self.scale)) + x[:, :1])


def scaled_regression():
    x = torch.randn(80, 12) * torch.logspace(2, -3, 12)
    return nn.Linear(12, 2), x, torch.randn(80, 2), "regression"


def scaled_embedding():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    net[0].weight.data.mul_(torch.logspace(2, -2.5, 4))
    return net, torch.randint(0, 9, (60, 3)), torch.randint(0, 3, (60,)), "classification"


def with_casts():
    return (
        Casts(),
        torch.randn(40, 6) * torch.logspace(2, -3, 6),
        torch.randint(0, 3, (40,)),
        "classification",
    )


@pytest.mark.parametrize("curvature", ["hessian", "hessian_positive"])
@pytest.mark.parametrize("case", [scaled_regression, scaled_embedding, with_casts])
def test_the_hessian_of_a_float32_model_keeps_its_small_eigenvalues(case, curvature):
    torch.manual_seed(0)
    net, x, y, name = case()
    likelihood, loss = name, cross_entropy
    if name == "regression":
        likelihood, loss = Gaussian(sigma=1.0), squares
    precision = 1e-3
    if case is not scaled_regression and curvature == "hessian":
        precision = 2e3  # above the most negative eigenvalue
    evidence = laplace_evidence(
        net, (x, y), likelihood=likelihood, prior_precision=precision, curvature=curvature
    )
    plain = InDouble(net) if case is with_casts else net
    expected, values = right(plain, x, y, loss, precision, curvature)
    if name == "regression":
        expected -= 0.5 * y.numel() * torch.log(torch.tensor(2 * torch.pi)).item()
    assert evidence.log_evidence == pytest.approx(expected, abs=1e-3)
    assert evidence.num_eigenvalues_below_prior == int((values < -1e-11 * values.abs().max()).sum())
    assert evidence.num_negative_eigenvalues == int((values <= -1.0).sum())


class OnlyFloat32(nn.Module):
    """Scripted code sees the batch as it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        if self.layer.weight.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.layer(x)


def test_a_network_that_does_not_run_in_float64_says_so_and_its_bounds_hold_the_truth():
    torch.manual_seed(0)
    net = OnlyFloat32()
    x, y = torch.randn(50, 5) * torch.logspace(2, -2, 5), torch.randint(0, 3, (50,))
    with pytest.warns(UserWarning, match="formed in float32.*bounds"):
        evidence = laplace_evidence(net, (x, y), prior_precision=1e-2, curvature="hessian")
    plain = nn.Sequential(net.layer)
    expected, _ = right(plain, x, y, cross_entropy, 1e-2, "hessian")
    assert evidence.lower < expected < evidence.upper
    assert "exact" not in str(evidence)


def test_a_float64_model_is_read_as_it_is():
    net = nn.Linear(3, 2).double()
    reader = HessianReader(net, ["weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reader._widened is False


def repeated():
    x = torch.randn(7, 6)[torch.randint(0, 7, (60,))]
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)), x, torch.randint(0, 4, (60,))


def nearly_parallel():
    x = torch.randn(1, 6) + 1e-4 * torch.randn(60, 6)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)), x, torch.randint(0, 4, (60,))


def badly_scaled():
    x = torch.randn(60, 6) * torch.logspace(2, -3, 6)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4)), x, torch.randint(0, 4, (60,))


@pytest.mark.parametrize("tolerance", [None, 0.1])
@pytest.mark.parametrize("precision", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("case", [repeated, nearly_parallel, badly_scaled])
def test_many_rows_in_float32_are_as_exact_as_they_say(case, precision, tolerance):
    """As if 180 rows were more than 4,096."""
    torch.manual_seed(0)
    net, x, y = case()
    arguments = {"structure": "full", "prior_precision": precision, "tolerance": tolerance}
    evidence = evidence_within(Budget(small=16), net, (x, y), **arguments)
    expected, _ = right(net, x, y, cross_entropy, precision, "ggn")
    slack = 2e-3 + 3e-7 * abs(expected)  # of rows in float32
    assert evidence.lower - slack <= expected <= evidence.upper + slack
    assert evidence.upper - evidence.lower <= (tolerance or 0.0) + 1e-9


def test_a_curve_of_many_rows_in_float32_holds_at_weak_priors():
    torch.manual_seed(0)
    net, x, y = repeated()
    grid = [1e-6, 1e-3, 1.0]
    curve = evidence_curve(net, (x, y), grid, structure="full", budget=Budget(small=16))
    expected = [right(net, x, y, cross_entropy, precision, "ggn")[0] for precision in grid]
    assert curve.log_evidence.tolist() == pytest.approx(expected, abs=3e-3)


@pytest.mark.parametrize("name", ["classification", "binary", "regression"])
def test_the_unit_loss_of_a_float32_batch_is_summed_in_float64(name):
    torch.manual_seed(0)
    outputs = 3.0 * torch.randn(200_000, 2)
    targets = torch.rand(200_000, 2).round() if name != "classification" else torch.randint(0, 2, (200_000,))
    likelihood = resolve_likelihood(name)
    got = likelihood.unit_loss(*likelihood.prepare(outputs, targets)).item()
    double = targets.double() if name != "classification" else targets
    expected = likelihood.unit_loss(*likelihood.prepare(outputs.double(), double)).item()
    assert got == pytest.approx(expected, abs=1e-3)
