"""Rows are proved on all examples of every batch: what only some examples do is not missed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bayes import laplace_evidence
from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.likelihoods import Gaussian
from lightning_bayes.rows import reader as reader_module
from lightning_bayes.rows.reader import RowReader
from tests.reference import SlowTwin, assert_agrees, per_example_jacobians

F64 = torch.float64


class BiasOfSome(nn.Module):
    """A bias that a functional call adds once more, for few examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = (x[:, :1] > 1.3).to(x)
        return self.head(torch.tanh(self.inner(x)) + gate * self.inner.bias.sin())


class KernelOfSome(nn.Module):
    """A convolution's kernel used again on the images of few examples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 1, 2, 2)
        gate = (x[:, :, :1, :1] > 1.3).to(x)
        again = F.conv2d(x.square(), self.conv.weight)
        return self.head(torch.tanh(self.conv(x) + gate * again).flatten(1))


class TiedForSome(nn.Module):
    """An embedding whose table is the head of few examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed((x[:, 1:] > 0).long().sum(1).clamp(max=2)) * x.cos()
        gate = (x[:, :1] > 1.3).to(x)
        return self.head(hidden) + gate * hidden @ self.embed.weight.mT


class OneOutputOfSome(nn.Module):
    """Only the last output of few examples uses the weight a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.head(torch.tanh(self.inner(x)))
        extra = F.linear(x, self.inner.weight).sin().sum(1, keepdim=True) * (x[:, :1] > 1.3)
        return outputs + F.pad(extra, (2, 0))


NETWORKS = [BiasOfSome, KernelOfSome, TiedForSome, OneOutputOfSome]


def data(rare_last=True):
    """Three examples of 120 for which the gates are open, all of them in a late batch or anywhere."""
    x = torch.randn(120, 4, generator=torch.Generator().manual_seed(3), dtype=F64).clamp(max=1.2)
    x[torch.tensor([85, 86, 93] if rare_last else [0, 50, 93]), 0] = 1.5
    return x, torch.arange(120) % 3


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("make", NETWORKS)
def test_what_few_examples_of_one_batch_do(make, structure):
    torch.manual_seed(0)
    model, (x, y) = make().double(), data(rare_last=False)
    got = laplace_evidence(model, (x, y), structure=structure, prior_precision=0.1)
    twin = SlowTwin(model, x, y, "classification")
    assert_agrees(got, twin.evidence(dict.fromkeys(twin.names, 0.1), structure))


@pytest.mark.parametrize("make", NETWORKS)
def test_what_few_examples_of_a_late_batch_do(make):
    """The sixth batch of twenty."""
    torch.manual_seed(0)
    model, (x, y) = make().double(), data()
    got = laplace_evidence(model, (x, y), structure="diag", prior_precision=0.1, batch_size=15)
    twin = SlowTwin(model, x, y, "classification")
    assert_agrees(got, twin.evidence(dict.fromkeys(twin.names, 0.1), "diag"))


@pytest.mark.parametrize("make", NETWORKS)
def test_columns_in_chunks_are_proved_together(make, monkeypatch):
    """The first chunk does not know of the last output."""
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", 1.0)
    torch.manual_seed(0)
    model, (x, _) = make().double(), data()
    network = throw_away_copy(model)
    reader = RowReader(network, [name for name, _ in network.named_parameters()])
    rows: dict[str, list[Tensor]] = {}
    for start in (0, 80):
        rows.clear()
        some = x[start : start + 20]
        targets = torch.zeros(20, 3, dtype=F64)
        for block in reader.read(lambda some=some, t=targets: (network(some), t), Gaussian()).chunks:
            for layer in block.layers:
                for name, part in layer.dense().items():
                    rows.setdefault(name, []).append(part)
    jacobians, _ = per_example_jacobians(model, x[80:100], list(rows))
    got = torch.cat([torch.cat(rows[name]) for name in rows], dim=2)
    torch.testing.assert_close(got, torch.stack(jacobians, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_columns_in_another_order_are_no_fault(dtype):
    """What is right must not pass for wrong by rounding: 4,000 columns that nearly cancel, and a weak last layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(30, 4, dtype=dtype), torch.randint(0, 3, (30,))
    for scale in (1.0, 1e-3):
        net[4].weight.data.mul_(scale)
        sampled = laplace_evidence(net, (x, y), structure="kron", num_samples=4000)
        whole = laplace_evidence(net, (x, y), structure="kron")
        assert sampled.log_evidence == pytest.approx(whole.log_evidence, abs=0.3)
