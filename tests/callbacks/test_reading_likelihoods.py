"""Losses with weights, smoothing, ignored tokens, sequences and predicted variances, as training_step has them.

The evidence must be the one that `laplace_evidence` gives for the likelihood written out, at the λ that the loss
implies: N · weight_decay / s with the training loss s times the mean negative log-likelihood of an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bayes import (
    Bernoulli,
    Categorical,
    HeteroscedasticGaussian,
    LaplaceEvidence,
    laplace_evidence,
)
from lightning_bayes.likelihoods import Likelihood
from tests.scenarios import DECAY, Module, N, disagreements, fit, loader, mlp

T, C = 5, 3
WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
IGNORED = -100


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens() -> tuple[Tensor, Tensor]:
    """[N, T, 4] with classes [N, T], some of them ignored."""
    y = torch.randint(C, (N, T))
    return random(N, T, 4), y.masked_fill(torch.rand(N, T) < 0.3, IGNORED)


def classes() -> tuple[Tensor, Tensor]:
    return random(N, 4), torch.randint(C, (N,))


def labels() -> tuple[Tensor, Tensor]:
    return random(N, 4), torch.randint(2, (N, C)).double()


class Criterion(Module):
    """A loss with a buffer, which moves and is copied with the module."""

    def __init__(self, network: nn.Module, step: Any) -> None:
        super().__init__(network, step)
        self.criterion = nn.CrossEntropyLoss(weight=WEIGHT.clone(), label_smoothing=0.1)


class Positive(nn.Module):
    """The second half of the outputs as variances."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        mean, raw = self.network(x).chunk(2, dim=1)
        return torch.cat([mean, F.softplus(raw)], dim=1)


class Recurrent(nn.Module):
    """Mixes the tokens of an example; [N, T, 4] to [N, T, C], or to [T, N, C] as recurrent layers have it."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.cell = nn.RNN(4, 3)
        self.head = nn.Linear(3, C)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.head(self.cell(x.transpose(0, 1))[0])
        return outputs if self.time_first else outputs.transpose(0, 1)


class ExamplesFirst(nn.Module):
    """The outputs as [N, T, C]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).transpose(0, 1)


def gaussian_nll(module: nn.Module, batch: list[Tensor]) -> Tensor:
    mean, raw = module(batch[0]).chunk(2, dim=1)
    return F.gaussian_nll_loss(mean, batch[1], F.softplus(raw), full=True)


def shifted(y: Tensor) -> Tensor:
    """Each position's target is the class of the next; the last position has none."""
    return torch.cat([y[:, 1:], torch.full_like(y[:, :1], IGNORED)], dim=1)


def counted(y: Tensor) -> float:
    return (y != IGNORED).double().sum().item()


@dataclass(frozen=True)
class Case:
    step: Callable[[Any, Any], Tensor]
    likelihood: Likelihood
    data: Callable[[], tuple[Tensor, Tensor]]
    terms: Callable[[Tensor], float]
    """Σ over the data of what PyTorch's mean divides by."""
    module: type[Module] = Module
    targets: Callable[[Tensor], Tensor] = lambda y: y
    network: Callable[[], nn.Module] = mlp
    outputs: Callable[[nn.Module], nn.Module] = lambda network: network


CASES = {
    "weights and smoothing in a buffer": Case(
        lambda m, b: m.criterion(m(b[0]), b[1]),
        Categorical(weight=WEIGHT, label_smoothing=0.1),
        classes,
        lambda y: WEIGHT[y].sum().item(),
        Criterion,
    ),
    "label smoothing": Case(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.2),
        Categorical(label_smoothing=0.2),
        classes,
        lambda y: N,
    ),
    "ignored examples": Case(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=1),
        Categorical(ignore_index=1),
        classes,
        lambda y: (y != 1).sum().item(),
    ),
    "tokens, classes second": Case(
        lambda m, b: F.cross_entropy(m(b[0]).transpose(1, 2), b[1], weight=WEIGHT),
        Categorical(weight=WEIGHT),
        tokens,
        lambda y: (WEIGHT[y.clamp(min=0)] * (y != IGNORED)).sum().item(),
    ),
    "tokens, flattened": Case(
        lambda m, b: F.cross_entropy(m(b[0]).view(-1, C), b[1].view(-1), label_smoothing=0.1),
        Categorical(label_smoothing=0.1),
        tokens,
        counted,
    ),
    "tokens of a recurrent network, flattened": Case(
        lambda m, b: F.cross_entropy(m(b[0]).reshape(-1, C), b[1].reshape(-1)),
        Categorical(),
        tokens,
        counted,
        network=lambda: Recurrent(time_first=False),
    ),
    "tokens of a recurrent network, flattened time first": Case(
        lambda m, b: F.cross_entropy(m(b[0]).view(-1, C), b[1].t().reshape(-1)),
        Categorical(),
        tokens,
        counted,
        network=lambda: Recurrent(time_first=True),
        outputs=ExamplesFirst,
    ),
    "tokens by themselves, flattened time first": Case(
        lambda m, b: F.cross_entropy(m(b[0]).transpose(0, 1).flatten(0, 1), b[1].t().flatten()),
        Categorical(),
        tokens,
        counted,
    ),
    "next token": Case(
        lambda m, b: F.cross_entropy(m(b[0])[:, :-1].reshape(-1, C), b[1][:, 1:].reshape(-1)),
        Categorical(),
        tokens,
        lambda y: counted(shifted(y)),
        targets=shifted,
    ),
    "log-softmax tokens": Case(
        lambda m, b: F.nll_loss(m(b[0]).log_softmax(-1).flatten(0, 1), b[1].flatten()),
        Categorical(),
        tokens,
        counted,
    ),
    "labels": Case(
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1], weight=2 * WEIGHT, pos_weight=WEIGHT),
        Bernoulli(weight=2 * WEIGHT, pos_weight=WEIGHT),
        labels,
        torch.numel,
    ),
    "labels, sigmoid first": Case(
        lambda m, b: F.binary_cross_entropy(m(b[0]).sigmoid(), b[1]),
        Bernoulli(),
        labels,
        torch.numel,
    ),
    "labels, flattened": Case(
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]).flatten(), b[1].flatten()),
        Bernoulli(),
        labels,
        torch.numel,
    ),
    "predicted variance": Case(
        gaussian_nll,
        HeteroscedasticGaussian(),
        lambda: (random(N, 4), random(N, 2)),
        torch.numel,
        network=lambda: mlp(4),
        outputs=Positive,
    ),
}


@pytest.mark.situation("Losses in training_step")
@pytest.mark.parametrize("name", CASES)
def test_evidence_is_that_of_the_likelihood_written_out(tmp_path, name):
    case = CASES[name]
    x, y = case.data()
    module = case.module(case.network(), case.step)
    # As many ignored tokens in one batch as in another is chance: batches of the training loader do not matter.
    callback = LaplaceEvidence(batch_size=8)
    fit(tmp_path, module, loader(data=(x, y)), callback)
    likelihood = case.likelihood
    if isinstance(likelihood, Categorical) and y.dim() > 1:
        likelihood.class_dim = -1
    expected = laplace_evidence(
        case.outputs(module.network).eval(),
        (x, case.targets(y)),
        likelihood=likelihood,
        prior_precision=DECAY * case.terms(y),
        structure="full",
    )
    assert disagreements(callback.history[0][1], expected) == {}
    assert expected.num_examples == N


def test_a_sum_over_tokens_counts_sequences(tmp_path):
    """The training loss of 8 sequences is 8 times the mean of a sequence's nll, so λ = N · weight_decay / 8."""

    def step(module, batch):
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")

    callback = LaplaceEvidence()
    module = Module(mlp(), step, lambda m: torch.optim.SGD(m.parameters(), lr=0.01, weight_decay=DECAY))
    fit(tmp_path, module, loader(data=tokens()), callback)
    evidence = callback.history[0][1]
    assert evidence.num_examples == N
    assert evidence.prior_precision == pytest.approx(N * DECAY / 8)


def test_weights_of_examples_belong_to_their_batch(tmp_path):
    """Three batches, each with weights of its own."""
    x, y = labels()
    weight = 3 * torch.rand(N, 1, dtype=torch.float64)

    def step(module, batch):
        return F.binary_cross_entropy_with_logits(module(batch[0]), batch[1], weight=batch[2])

    module, callback = Module(mlp(), step), LaplaceEvidence(batch_size=8)
    fit(tmp_path, module, loader(data=(x, y, weight)), callback)
    expected = laplace_evidence(
        module.network.eval(),
        (x, y),
        likelihood=Bernoulli(weight=weight),
        prior_precision=DECAY * N * C,
        batch_size=N,
    )
    assert disagreements(callback.history[0][1], expected) == {}


def test_a_given_likelihood_is_scored_in_the_place_of_the_training_loss(tmp_path):
    """Label smoothing regularises; the evidence of the plain likelihood is asked for."""
    x, y = classes()
    module = Module(mlp(), CASES["label smoothing"].step)
    callback = LaplaceEvidence(likelihood="classification")
    fit(tmp_path, module, loader(data=(x, y)), callback)
    expected = laplace_evidence(module.network.eval(), (x, y), prior_precision=DECAY * N)
    assert disagreements(callback.history[0][1], expected) == {}


def test_a_mask_is_an_ignored_index(tmp_path):
    x, y = tokens()

    def step(module, batch):
        kept = batch[1] != IGNORED
        return F.cross_entropy(module(batch[0])[kept], batch[1][kept])

    callback, module = LaplaceEvidence(batch_size=8), Module(mlp(), step)
    fit(tmp_path, module, loader(data=(x, y)), callback)
    expected = laplace_evidence(
        module.network.eval(),
        (x, y),
        likelihood=Categorical(class_dim=-1),
        prior_precision=DECAY * counted(y),
        structure="full",
    )
    assert disagreements(callback.history[0][1], expected) == {}


def test_the_kind_of_likelihood_is_one_for_all_batches(tmp_path):
    x, y = classes()

    def step(module, batch):
        if len(batch[0]) == 8:
            return F.cross_entropy(module(batch[0]), batch[1])
        return F.mse_loss(module(batch[0]), F.one_hot(batch[1], C).double())

    module, callback = Module(mlp(), step), LaplaceEvidence(batch_size=8)
    with pytest.warns(UserWarning, match=r"this batch's loss is Gaussian, that of others is Categorical"):
        fit(tmp_path, module, loader(data=(x, y)), callback)
    assert callback.history == []
