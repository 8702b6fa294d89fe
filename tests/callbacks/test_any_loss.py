"""Losses that are none of PyTorch's as they are written: each evidence against a dense one, in float64.

The dense one knows nothing of graphs, weights or tables: Jacobians by torch.func, and the Hessian of one example's
negative log-likelihood in the raw outputs of the network; Fisher information by integrating the score's outer product
over a grid of targets; a determinant of the [p, p] matrix. λ = N · weight_decay / s, the loss s times the mean nll.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from lightning_bayes import Gaussian, LaplaceEvidence, SGDNoiseScale, Stability, laplace_evidence
from tests.refusals import fit_refuses
from tests.scenarios import DECAY, Module, N, fit, loader, mlp, same

BATCH = 8
POINTS = 40_001
C = 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = random(N, 4)
CLASSES = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))
REAL = random(N, seed=2)
REALS = random(N, C, seed=3)
COUNTS = torch.poisson(2 * torch.ones(N, dtype=torch.float64), generator=torch.Generator().manual_seed(4))
POSITIVE = REAL.exp()
SHARES = REAL.sigmoid()
LABELS = (REALS > 0).double()
WEIGHTS = 0.3 + random(N, seed=5).abs()
KNOWN = (random(N, C, seed=6) > -0.5).double()


@dataclass(frozen=True)
class Case:
    """A loss, and what it stands for.

    Attributes:
        step: training_step(module, batch).
        data: What follows the inputs in a batch.
        nll: Of one example, from the raw outputs of the network [K] and its share of the data; with every constant.
        scale: s, from the number of examples in a batch of training; 1 for the mean of the examples' nll.
        grid: Targets over which the Fisher information is integrated, with their spacing (a tensor, of whole numbers
            1); None for the Hessian.
    """

    step: Callable[[Any, Any], Tensor]
    data: tuple[Tensor, ...]
    nll: Callable[..., Tensor]
    scale: float = 1.0
    grid: tuple[Tensor, Tensor] | None = None
    network: Callable[[], nn.Module] = mlp
    is_normalised: bool = True
    factor: Callable[[tuple[Tensor, ...]], float] = lambda data: 1.0


def dense(module: Module, case: Case) -> tuple[float, float, float]:
    """Log-evidence, log-likelihood and λ."""
    network = module.network.eval()
    named = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, parameters, (x.unsqueeze(0),)).flatten()

    f = vmap(lambda x: outputs(named, x))(X)
    slopes = vmap(lambda x: jacrev(outputs)(named, x))(X)
    slopes = torch.cat([part.flatten(2) for part in slopes.values()], dim=2)
    if case.grid is None:
        bent = vmap(jacrev(jacrev(case.nll)))(f, *case.data)
    else:
        bent = torch.stack([fisher(case.nll, each, *case.grid) for each in f])
    g = torch.einsum("nip,nij,njq->pq", slopes, bent, slopes)
    nll = vmap(case.nll)(f, *case.data).sum().item()
    precision = N * DECAY / (case.scale * case.factor(case.data))
    norm = sum(p.square().sum().item() for p in named.values())
    log_det = torch.linalg.slogdet(torch.eye(len(g)) + g / precision)[1].item()
    return -nll - 0.5 * precision * norm - 0.5 * log_det, -nll, precision


def fisher(nll: Callable[..., Tensor], f: Tensor, targets: Tensor, spacing: Tensor) -> Tensor:
    density = (-vmap(nll, (None, 0))(f, targets)).exp() * spacing
    assert density.sum().item() == pytest.approx(1.0, abs=1e-7)
    scores = vmap(grad(nll), (None, 0))(f, targets)
    return torch.einsum("y,yi,yj->ij", density, scores, scores)


def evenly(low: float, high: float) -> tuple[Tensor, Tensor]:
    points = torch.linspace(low, high, POINTS, dtype=torch.float64)
    return points, torch.full_like(points, (high - low) / (POINTS - 1))


def tangent(width: float = 4.5) -> tuple[Tensor, Tensor]:
    """Over the line, ever wider: y = sinh(sinh(t))."""
    t, spacing = evenly(-width, width)
    return t.sinh().sinh(), spacing * t.sinh().cosh() * t.cosh()


def logarithmic(low: float = -60.0, high: float = 12.0) -> tuple[Tensor, Tensor]:
    t, spacing = evenly(low, high)
    return t.exp(), spacing * t.exp()


def logistic() -> tuple[Tensor, Tensor]:
    t, spacing = evenly(-34, 34)
    return t.sigmoid(), spacing * t.sigmoid() * (-t).sigmoid()


def whole(last: int) -> tuple[Tensor, Tensor]:
    counts = torch.arange(last, dtype=torch.float64)
    return counts, torch.ones_like(counts)


def positive(raw: Tensor) -> Tensor:
    return F.softplus(raw) + 0.3


def log_prob(make: Callable[[Tensor], Any]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """training_step, and nll of one example, of a distribution made from outputs [..., K]."""
    return (
        lambda m, b: -make(m(b[0])).log_prob(b[1]).mean(),
        lambda f, y: -make(f).log_prob(y).sum(),
    )


def density(make: Any, data: Tensor, grid: Any, **kwargs: Any) -> Case:
    step, nll = log_prob(make)
    return Case(step, (data,), nll, grid=grid, **kwargs)


def quiet(kind: Any) -> Any:
    """Without checks of the arguments, which branch on values."""
    return lambda *args: kind(*args, validate_args=False)


Normal, StudentT, Gamma, Beta, Laplace, LogNormal, NegativeBinomial, Exponential, Poisson = (
    quiet(getattr(distributions, name))
    for name in (
        *("Normal", "StudentT", "Gamma", "Beta", "Laplace", "LogNormal", "NegativeBinomial"),
        *("Exponential", "Poisson"),
    )
)


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return -(f.log_softmax(-1) * (torch.arange(C) == y)).sum(-1)


def by_hand(m: Any, b: Any) -> Tensor:
    """Cross-entropies of the examples."""
    return -m(b[0]).log_softmax(1).gather(1, b[1][:, None]).squeeze(1)


def smoothed(f: Tensor, y: Tensor) -> Tensor:
    logs = f.log_softmax(-1)
    return -0.9 * (logs * (torch.arange(C) == y)).sum(-1) - 0.1 * logs.mean(-1)


def weighted(f: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return w * cross_entropy(f, y)


def mean_weight(data: tuple[Tensor, ...]) -> float:
    """1 over it, in batches of their own: Σₙ wₙ ℓₙ over the batches' weights."""
    return N / data[-1].sum().item()


def binary(f: Tensor, y: Tensor) -> Tensor:
    return -(y * F.logsigmoid(f) + (1 - y) * F.logsigmoid(-f)).sum(-1)


def two_tasks(f: Tensor, y: Tensor, real: Tensor) -> Tensor:
    return cross_entropy(f[:3], y) + 0.7 * (f[3] - real) ** 2


def two_losses(m: Any, b: Any) -> Tensor:
    classes, real = m.network.heads(b[0])
    return F.cross_entropy(classes, b[1]) + 0.7 * F.mse_loss(real[:, 0], b[2])


def normal_of_heads(m: Any, b: Any) -> Tensor:
    mean, raw = m.network.heads(b[0])
    return -Normal(mean[:, 0], positive(raw[:, 0])).log_prob(b[1]).mean()


def two_counts(m: Any, b: Any) -> Tensor:
    counts = Poisson(m(b[0])[:, 0].exp())
    return -(counts.log_prob(b[1]) + counts.log_prob(b[2])).mean()


CASES = {
    "cross-entropy by hand": Case(lambda m, b: by_hand(m, b).mean(), (CLASSES,), cross_entropy),
    "its sum": Case(lambda m, b: by_hand(m, b).sum(), (CLASSES,), cross_entropy, BATCH),
    "half of it": Case(lambda m, b: 0.5 * by_hand(m, b).mean(), (CLASSES,), cross_entropy, 0.5),
    "over a constant": Case(lambda m, b: by_hand(m, b).sum() / 8, (CLASSES,), cross_entropy, BATCH / 8),
    "smoothed by hand": Case(
        lambda m, b: (0.9 * by_hand(m, b) - 0.1 * m(b[0]).log_softmax(1).mean(1)).mean(),
        (CLASSES,),
        smoothed,
        network=lambda: Once(mlp()),
    ),
    "a factor": Case(lambda m, b: 0.5 * F.cross_entropy(m(b[0]), b[1]), (CLASSES,), cross_entropy, 0.5),
    "a factor of a sum": Case(
        lambda m, b: 0.5 * F.cross_entropy(m(b[0]), b[1], reduction="sum"), (CLASSES,), cross_entropy, 4.0
    ),
    "a constant": Case(lambda m, b: F.cross_entropy(m(b[0]), b[1]) - 0.3, (CLASSES,), cross_entropy),
    "weighted examples": Case(
        lambda m, b: (b[2] * F.cross_entropy(m(b[0]), b[1], reduction="none")).sum() / b[2].sum(),
        (CLASSES, WEIGHTS),
        weighted,
        factor=mean_weight,
    ),
    "weighted examples by hand": Case(
        lambda m, b: (b[2] * by_hand(m, b)).sum() / b[2].sum(),
        (CLASSES, WEIGHTS),
        weighted,
        factor=mean_weight,
    ),
    "weighted examples, mean": Case(
        lambda m, b: (b[2] * F.cross_entropy(m(b[0]), b[1], reduction="none")).mean(),
        (CLASSES, WEIGHTS),
        weighted,
    ),
    "masked": Case(
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none") * b[2]).sum() / b[2].sum(),
        (CLASSES, (WEIGHTS > 0.6).double()),
        weighted,
        factor=mean_weight,
    ),
    "selected": Case(
        lambda m, b: F.cross_entropy(m(b[0])[b[2] > 0], b[1][b[2] > 0]),
        (CLASSES, (WEIGHTS > 0.6).double()),
        weighted,
        factor=mean_weight,
    ),
    "binary by hand": Case(
        lambda m, b: -(b[1] * F.logsigmoid(m(b[0])) + (1 - b[1]) * F.logsigmoid(-m(b[0]))).mean(),
        (LABELS,),
        binary,
        1 / C,
        network=lambda: Once(mlp()),
    ),
    "binary, masked": Case(
        lambda m, b: (
            (F.binary_cross_entropy_with_logits(m(b[0]), b[1], reduction="none") * b[2]).sum() / b[2].sum()
        ),
        (LABELS, KNOWN),
        lambda f, y, w: -(w * (y * F.logsigmoid(f) + (1 - y) * F.logsigmoid(-f))).sum(),
        factor=mean_weight,
    ),
    "divergence": Case(
        lambda m, b: F.kl_div(m(b[0]).log_softmax(1), b[1], reduction="batchmean"),
        (REALS.softmax(1),),
        lambda f, q: -(q * f.log_softmax(-1)).sum(),
    ),
    "F.poisson_nll_loss": Case(
        lambda m, b: F.poisson_nll_loss(m(b[0])[:, 0], b[1]),
        (COUNTS,),
        lambda f, y: f[0].exp() - y * f[0] + torch.lgamma(y + 1),
    ),
    "F.poisson_nll_loss of rates, in full": Case(
        lambda m, b: F.poisson_nll_loss(positive(m(b[0])[:, 0]), b[1], log_input=False, full=True),
        (COUNTS,),
        lambda f, y: positive(f[0]) - y * (positive(f[0]) + 1e-8).log() + torch.lgamma(y + 1),
        grid=whole(200),
    ),
    "Poisson by hand": Case(
        lambda m, b: (m(b[0])[:, 0].exp() - b[1] * m(b[0])[:, 0]).mean(),
        (COUNTS,),
        lambda f, y: f[0].exp() - y * f[0],
        is_normalised=False,
        network=lambda: Once(mlp(1)),
    ),
    "F.huber_loss": Case(
        lambda m, b: F.huber_loss(m(b[0]), b[1]),
        (REALS,),
        lambda f, y: torch.where((f - y).abs() < 1, 0.5 * (f - y) ** 2, (f - y).abs() - 0.5).sum(),
        1 / C,
        is_normalised=False,
    ),
    "F.smooth_l1_loss": Case(
        lambda m, b: F.smooth_l1_loss(m(b[0]), b[1], beta=0.3),
        (REALS,),
        lambda f, y: torch.where((f - y).abs() < 0.3, 0.5 * (f - y) ** 2 / 0.3, (f - y).abs() - 0.15).sum(),
        1 / C,
        is_normalised=False,
    ),
    "two tasks": Case(
        lambda m, b: F.cross_entropy(m(b[0])[:, :3], b[1]) + 0.7 * F.mse_loss(m(b[0])[:, 3], b[2]),
        (CLASSES, REAL),
        two_tasks,
        is_normalised=False,
        network=lambda: Once(mlp(4)),
    ),
    "two heads": Case(
        two_losses,
        (CLASSES, REAL),
        two_tasks,
        is_normalised=False,
        network=lambda: Heads(3, 1),
    ),
    "log-cosh": Case(
        lambda m, b: (m(b[0]) - b[1]).cosh().log().sum(1).mean(),
        (REALS,),
        lambda f, y: (f - y).cosh().log().sum(),
        is_normalised=False,
    ),
    "Normal": density(lambda f: Normal(f[..., 0], positive(f[..., 1])), REAL, tangent(2.2)),
    "Normal of two heads": Case(
        normal_of_heads,
        (REAL,),
        lambda f, y: -Normal(f[0], positive(f[1])).log_prob(y),
        grid=tangent(2.2),
        network=lambda: Heads(1, 1),
    ),
    "Laplace": density(lambda f: Laplace(f[..., 0], positive(f[..., 1])), REAL, tangent(2.4)),
    "Student's t": density(
        lambda f: StudentT(positive(f[..., 2]) + 1, f[..., 0], positive(f[..., 1])), REAL, tangent(4.0)
    ),
    "Student's t of given degrees": density(
        lambda f: StudentT(torch.full_like(f[..., 0], 4.0), f[..., 0], positive(f[..., 1])),
        REAL,
        tangent(3.4),
    ),
    "Gamma": density(lambda f: Gamma(positive(f[..., 0]), positive(f[..., 1])), POSITIVE, logarithmic()),
    "Exponential": density(lambda f: Exponential(positive(f[..., 0])), POSITIVE, logarithmic()),
    "Beta": density(lambda f: Beta(positive(f[..., 0]) + 1, positive(f[..., 1]) + 1), SHARES, logistic()),
    "LogNormal": density(
        lambda f: LogNormal(f[..., 0], positive(f[..., 1])), POSITIVE, logarithmic(-30.0, 30.0)
    ),
    "Poisson": density(lambda f: Poisson(positive(f[..., 0])), COUNTS, whole(200)),
    "negative binomial": density(
        lambda f: NegativeBinomial(positive(f[..., 0]), f[..., 1] - 1), COUNTS, whole(4_000)
    ),
    "Categorical": density(lambda f: distributions.Categorical(logits=f, validate_args=False), CLASSES, None),
    "Bernoulli": Case(
        lambda m, b: -distributions.Bernoulli(logits=m(b[0])).log_prob(b[1]).sum(1).mean(), (LABELS,), binary
    ),
    "independent": Case(
        lambda m, b: -distributions.Independent(Normal(m(b[0]), torch.ones(())), 1).log_prob(b[1]).mean(),
        (REALS,),
        lambda f, y: (0.5 * (f - y) ** 2 + 0.5 * math.log(2 * math.pi)).sum(),
    ),
    "weighted densities": Case(
        lambda m, b: -(b[2] * Poisson(m(b[0])[:, 0].exp()).log_prob(b[1])).sum() / b[2].sum(),
        (COUNTS, WEIGHTS),
        lambda f, y, w: w * (f[0].exp() - y * f[0] + torch.lgamma(y + 1)),
        factor=mean_weight,
    ),
    "two targets of one density": Case(
        two_counts,
        (COUNTS, COUNTS.flip(0)),
        lambda f, y, z: 2 * f[0].exp() - (y + z) * f[0] + torch.lgamma(y + 1) + torch.lgamma(z + 1),
    ),
    "F.l1_loss": Case(
        lambda m, b: F.l1_loss(m(b[0])[:, 0], b[1]),
        (REAL,),
        lambda f, y: (f[0] - y).abs() + math.log(2),
        grid=tangent(2.4),
    ),
}


class Once(nn.Module):
    """Its outputs, however often a step asks for those of one batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.last = network, (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.last[0] is not x:
            self.last = (x, self.network(x))
        return self.last[1]

    def __deepcopy__(self, memo: Any) -> Any:
        return Once(copy.deepcopy(self.network, memo))


class Heads(nn.Module):
    """A trunk with heads of their own; the outputs of all side by side."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.parts = nn.ModuleList(nn.Linear(5, size) for size in sizes)

    def heads(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x).tanh()
        return [part(h) for part in self.parts]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.heads(x), dim=1)


@pytest.mark.situation("Losses that are read by their graph")
@pytest.mark.parametrize("name", CASES)
def test_evidence_is_that_of_the_dense_matrix(tmp_path, name):
    case = CASES[name]
    torch.manual_seed(3)
    module, callback = Module(case.network(), case.step), LaplaceEvidence(batch_size=BATCH, on_error="raise")
    fit(tmp_path, module, loader(data=(X, *case.data)), callback)
    evidence = callback.history[0][1]
    expected, log_likelihood, precision = dense(module, case)
    assert evidence.prior_precision == pytest.approx(precision, rel=1e-9)
    assert evidence.log_likelihood == pytest.approx(log_likelihood, rel=1e-9)
    assert evidence.log_evidence == pytest.approx(expected, rel=1e-6 if case.grid else 1e-9)
    assert ("generalised evidence" in (evidence.note or "")) != case.is_normalised
    if case.is_normalised:
        assert ("Weights of examples" in (evidence.note or "")) == name.startswith("weighted")


def with_noise(
    weights: Tensor, outputs: Tensor, targets: Tensor
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """nll of one example under the noise variance that is the mean squared residual."""
    squares = weights * (outputs - targets).square()
    variance = (squares.sum() / weights.sum()).item()
    constant = 0.5 * math.log(2 * math.pi * variance)
    return (
        lambda f, y, w: (w * (0.5 * (f - y) ** 2 / variance + constant)).sum(),
        (targets, weights, torch.full((N,), variance, dtype=torch.float64)),
    )


SQUARES = {
    "missing targets": lambda m, b: (F.mse_loss(m(b[0]), b[1], reduction="none") * b[2]).sum() / b[2].sum(),
    "missing targets by hand": lambda m, b: ((m(b[0]) - b[1]).square() * b[2]).sum() / b[2].sum(),
    "missing targets, selected": lambda m, b: F.mse_loss(m(b[0])[b[2] > 0], b[1][b[2] > 0]),
    "missing targets, not a number": lambda m, b: F.mse_loss(
        m(b[0])[b[2] > 0], torch.where(b[2] > 0, b[1], math.nan)[b[2] > 0]
    ),
    "half the sum by hand": lambda m, b: 0.5 * ((m(b[0]) - b[1]).square() * b[2]).sum(),
    "mean by hand": lambda m, b: (m(b[0]) - b[1]).square().mean(),
    "half the mean": lambda m, b: 0.5 * F.mse_loss(m(b[0]), b[1]),
    "means of squashed outputs": lambda m, b: (m(b[0]).tanh() - b[1]).square().mean(),
}


class Squashed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).tanh()


@pytest.mark.situation("Losses that are read by their graph")
@pytest.mark.parametrize("name", SQUARES)
def test_squares_have_the_noise_that_they_have(tmp_path, name):
    torch.manual_seed(3)
    known = KNOWN if "missing" in name or "sum" in name else torch.ones_like(KNOWN)
    module, callback = Module(mlp(), SQUARES[name]), LaplaceEvidence(batch_size=BATCH, on_error="raise")
    fit(tmp_path, module, loader(data=(X, REALS, known)), callback)
    evidence = callback.history[0][1]
    if "squashed" in name:
        module.network = Squashed(module.network)
    nll, (targets, weights, variance) = with_noise(known, module.network.eval()(X).detach(), REALS)
    # The loss Σ w r²/Σ w is s times the mean nll for s = 2σ²N/Σw; the sum over a batch of ½ w r² is σ²B times it.
    scale = 2 * variance[0].item() * N / known.sum().item()
    scale = variance[0].item() * BATCH if "sum" in name else scale * (0.5 if name == "half the mean" else 1.0)
    case = Case(SQUARES[name], (targets, weights), nll, scale)
    expected, log_likelihood, precision = dense(module, case)
    assert evidence.noise_variance == pytest.approx(variance[0].item(), rel=1e-9)
    assert evidence.prior_precision == pytest.approx(precision, rel=1e-9)
    assert evidence.log_likelihood == pytest.approx(log_likelihood, rel=1e-9)
    assert evidence.log_evidence == pytest.approx(expected, rel=1e-9)


SUM = "is no sum over examples"
CONVEX = "is not convex in the outputs"


def dice(m: Any, b: Any) -> Tensor:
    p, t = m(b[0]).softmax(1), F.one_hot(b[1], C)
    return 1 - (2 * (p * t).sum(0) / (p.sum(0) + t.sum(0))).mean()


def dice_of_all(m: Any, b: Any) -> Tensor:
    """The probabilities of all classes add up to N: this is the mean of 1 - p."""
    p, t = m(b[0]).softmax(1), F.one_hot(b[1], C)
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def contrastive(m: Any, b: Any) -> Tensor:
    z = F.normalize(m(b[0]), dim=1)
    similar = z @ z.T / 0.5
    return (similar.logsumexp(1) - similar.diagonal()).mean()


def standardised(m: Any, b: Any) -> Tensor:
    f = m(b[0])
    return by_hand(lambda x: (f - f.mean(0)) / f.std(0), b).mean()


def variational(m: Any, b: Any) -> Tensor:
    code = m.network[:2](b[0])
    return F.mse_loss(m.network[2:](code), F.one_hot(b[1], C).double()) + 0.1 * code.square().sum(1).mean()


def two_heads_by_hand(m: Any, b: Any) -> Tensor:
    mean, raw = m.network.heads(b[0])
    return (raw + (mean - b[2][:, None]) ** 2 / raw.exp()).mean()


def focal(m: Any, b: Any) -> Tensor:
    losses = by_hand(m, b)
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def mixture(m: Any, b: Any) -> Tensor:
    f = m(b[0])
    components = Normal(torch.stack([f[:, 0], f[:, 1]], 1), torch.full((len(f), 2), 0.3, dtype=f.dtype))
    kinds = distributions.Categorical(logits=torch.stack([f[:, 2], -f[:, 2]], 1))
    return -distributions.MixtureSameFamily(kinds, components).log_prob(b[2]).mean()


def penalised(m: Any, b: Any) -> Tensor:
    return by_hand(m, b).mean() + 1e-4 * sum(p.square().sum() for p in m.parameters())


REFUSED = {
    "Dice": (dice, SUM),
    "Dice of all classes": (dice_of_all, (CONVEX, "has the eigenvalue -")),
    "contrastive": (contrastive, SUM),
    "standardised over the batch": (standardised, "depends on the others of its batch"),
    "root of a mean": (lambda m, b: (m(b[0])[:, 0] - b[2]).square().mean().sqrt(), SUM),
    "variational": (variational, "meet in no tensor with a row for each example"),
    "penalty": (penalised, "weight_decay"),
    "quantiles": (
        lambda m, b: torch.maximum(0.1 * (b[2] - m(b[0])[:, 0]), -0.9 * (b[2] - m(b[0])[:, 0])).mean(),
        "piecewise linear",
    ),
    "two heads of a Gaussian by hand": (two_heads_by_hand, (CONVEX, "has the eigenvalue -")),
    "focal": (focal, (CONVEX, "has the eigenvalue -")),
    "mixture": (mixture, (CONVEX, "has the eigenvalue -")),
}


@pytest.mark.situation("Losses and steps that have no evidence")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_over_examples_or_not_convex_is_refused(tmp_path, name):
    step, reason = REFUSED[name]
    torch.manual_seed(1)
    module = Module(Heads(1, 1) if "heads" in name else mlp(), step)
    if name == "focal":  # convex where the network is not sure of anything
        module.network[2].weight.data *= 30
    fit_refuses(tmp_path, module, reason, remedy=(), data=loader(data=(X, CLASSES, 3 * REAL)))


@pytest.mark.parametrize("name", ["weighted examples", "Student's t", "two heads", "selected"])
def test_training_is_not_perturbed(tmp_path, name):
    case, runs = CASES[name], []
    for callbacks in ([], [LaplaceEvidence(), Stability(), SGDNoiseScale()]):
        torch.manual_seed(5)
        module = Module(case.network(), case.step)
        fit(tmp_path, module, loader(data=(X, *case.data), shuffle=True), *callbacks, max_epochs=2)
        runs.append([module.state_dict(), torch.get_rng_state()])
    assert same(*runs)
    assert distributions.Normal.log_prob.__qualname__ == "Normal.log_prob"


@pytest.mark.parametrize("name", ["weighted examples", "Poisson by hand", "Gamma", "two heads", "log-cosh"])
def test_the_true_hessian_takes_the_loss_at_its_word(tmp_path, name):
    """By autograd through the network, twice, in one go."""
    case = CASES[name]
    torch.manual_seed(3)
    module = Module(case.network(), case.step)
    callback = LaplaceEvidence(
        curvature="hessian_positive", batch_size=BATCH, prior_precision=1e-3, on_error="raise"
    )
    fit(tmp_path, module, loader(data=(X, *case.data)), callback)
    network = module.network.eval()
    named = {name: p.detach() for name, p in network.named_parameters()}
    flat = torch.cat([p.flatten() for p in named.values()])

    def cost(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        changed = {n: part.view_as(named[n]) for n, part in zip(named, parts, strict=True)}
        f = vmap(lambda x: functional_call(network, changed, (x.unsqueeze(0),)).flatten())(X)
        return vmap(case.nll)(f, *case.data).sum()

    values = torch.linalg.eigvalsh(jacrev(jacrev(cost))(flat)) + 1e-3
    expected = -0.5 * (values[values >= 1e-3] / 1e-3).log().sum().item()
    assert callback.history[0][1].log_occam_factor == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("structure", ["full", "lanczos", "kron", "diag", "blocks"])
def test_every_structure_takes_such_a_loss(tmp_path, structure):
    case = CASES["two heads"]
    torch.manual_seed(3)
    module = Module(case.network(), case.step)
    callback = LaplaceEvidence(structure, batch_size=BATCH, on_error="raise")
    fit(tmp_path, module, loader(data=(X, *case.data)), callback)
    exact, _, _ = dense(module, case)
    evidence = callback.history[0][1]
    assert evidence.lower - 1e-6 <= exact <= evidence.upper + 1e-6


def test_a_loss_that_a_later_batch_tells_more_of(tmp_path):
    """No residual of the first batch is beyond the bend: it alone would pass for squares."""
    torch.manual_seed(3)
    bend = torch.where(torch.arange(N) < BATCH, 100.0, 0.1).double().unsqueeze(1)

    def step(m: Any, b: Any) -> Tensor:
        r = m(b[0]) - b[1]
        return torch.where(r.abs() < b[2], 0.5 * r**2, b[2] * (r.abs() - 0.5 * b[2])).sum(1).mean()

    case = Case(
        step,
        (REALS, bend),
        lambda f, y, w: torch.where(
            (f - y).abs() < w, 0.5 * (f - y) ** 2, w * ((f - y).abs() - 0.5 * w)
        ).sum(),
        is_normalised=False,
    )
    module, callback = Module(mlp(), step), LaplaceEvidence(batch_size=BATCH, on_error="raise")
    fit(tmp_path, module, loader(data=(X, *case.data)), callback)
    expected, log_likelihood, precision = dense(module, case)
    evidence = callback.history[0][1]
    assert evidence.prior_precision == pytest.approx(precision, rel=1e-9)
    assert evidence.log_likelihood == pytest.approx(log_likelihood, rel=1e-9)
    assert evidence.log_evidence == pytest.approx(expected, rel=1e-9)


def test_a_likelihood_that_is_given_replaces_one_that_is_recognised(tmp_path):
    torch.manual_seed(3)
    module = Module(mlp(), SQUARES["mean by hand"])
    callback = LaplaceEvidence(likelihood=Gaussian(sigma=0.5), batch_size=BATCH, on_error="raise")
    fit(tmp_path, module, loader(data=(X, REALS, KNOWN)), callback)
    expected = laplace_evidence(
        module.network.eval(),
        (X, REALS),
        likelihood=Gaussian(sigma=0.5),
        prior_precision=callback.history[0][1].prior_precision,
    )
    assert callback.history[0][1].log_evidence == pytest.approx(expected.log_evidence, rel=1e-9)
    assert callback.history[0][1].prior_precision == pytest.approx(N * DECAY / (2 * 0.25 / C))
    other = Module(mlp(), SQUARES["mean by hand"])
    fit_refuses(
        tmp_path,
        other,
        "likelihood=Categorical() was given",
        data=loader(data=(X, REALS, KNOWN)),
        callback=LaplaceEvidence(likelihood="classification"),
    )
