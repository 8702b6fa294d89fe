"""Examples that influence each other's outputs are noticed where no derivative shows it, and only there."""

import pytest
import torch
from torch import Tensor, nn

from lightning_bayes import laplace_evidence
from lightning_bayes.capture.forward import BatchForward
from tests.refusals import refuses


class Between(nn.Module):
    """Something done to the whole batch between two layers."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(4, 6), nn.Linear(6, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)).tanh())


@torch.no_grad()
def scale_of(hidden: Tensor) -> Tensor:
    return hidden.std(0)


def by_rank(hidden: Tensor) -> Tensor:
    ranks = hidden[:, :1].detach().argsort(0).argsort(0)
    return hidden + ranks / len(hidden)


def largest_only(hidden: Tensor) -> Tensor:
    kept = hidden.detach().norm(dim=1).topk(len(hidden) // 2).indices
    return hidden * torch.zeros(len(hidden), 1).index_fill(0, kept, 1.0)


MIXING = {
    "normalised by hand": lambda hidden: hidden / scale_of(hidden),
    "less the largest": lambda hidden: hidden - hidden.detach().amax(0),
    "by rank": by_rank,
    "the largest half": largest_only,
    "by place": lambda hidden: hidden + torch.arange(len(hidden)).unsqueeze(1),
    "the neighbour": lambda hidden: hidden + hidden.detach().roll(1, 0),
}
APART = {
    "nothing": lambda hidden: hidden,
    "its own mean": lambda hidden: hidden - hidden.detach().mean(1, keepdim=True),
    "its own order": lambda hidden: hidden.sort(1)[0],
    "only batches of one size": lambda hidden: hidden.view(20, 6),
    "large numbers": lambda hidden: 1e4 * hidden,
    "sensitive to rounding": lambda hidden: 1e4 * ((1e4 + hidden) - 1e4),
    "random": lambda hidden: hidden + torch.rand_like(hidden),
}


def evidence(mix, curvature="ggn", **arguments):
    torch.manual_seed(0)
    network, x, y = Between(mix), torch.randn(40, 4), torch.randint(0, 3, (40,))
    return laplace_evidence(network, (x, y), batch_size=20, curvature=curvature, **arguments)


@pytest.mark.parametrize("mix", MIXING)
def test_what_mixes_is_refused_whatever_derivatives_show(mix):
    with refuses("rows of ['first.weight', 'first.bias']", remedy="mixes the examples"):
        evidence(MIXING[mix])


@pytest.mark.parametrize("mix", MIXING)
def test_the_hessian_refuses_it_as_well(mix):
    with refuses("mixes the examples of a batch"):
        evidence(MIXING[mix], "hessian_positive")


@pytest.mark.parametrize("mix", [name for name in APART if name != "sensitive to rounding"])
def test_the_hessian_takes_what_does_not_mix(mix):
    evidence(APART[mix], "hessian_positive", structure="full")


@pytest.mark.parametrize("mix", APART)
def test_what_does_not_mix_is_not_refused(mix):
    evidence(APART[mix], structure="diag")


def test_an_embedding_of_positions_that_cannot_be_replayed_is_not_called_mixing():
    """Entries that all examples share are no proof that they mix."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.head = nn.Embedding(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() > 1e9:  # vmap has no numbers to give
                raise RuntimeError
            return self.head((x.unsqueeze(2) + self.place(torch.arange(5))).tanh().mean(1))

    torch.manual_seed(0)
    network, x, y = Positions().double(), torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    with pytest.warns(UserWarning, match="one backward pass for each row"):
        whole = laplace_evidence(network, (x, y), structure="full")
    with pytest.warns(UserWarning, match="one backward pass for each row"):
        parts = laplace_evidence(network, (x, y), structure="full", batch_size=4)
    assert whole.log_evidence == pytest.approx(parts.log_evidence, abs=1e-9)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((torch.zeros(4, 2), torch.zeros(4)), 4),
        ({"x": torch.zeros(4, 2), "more": [torch.zeros(4), "name"]}, 4),
        ((torch.zeros(4, 2), torch.zeros(5)), None),
        ((torch.zeros(4, 2), object()), None),
        (nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(2)]), None),
        ((torch.zeros(4, 2).to_sparse(), torch.zeros(4)), None),
    ],
)
def test_batches_that_can_be_taken_apart(batch, size):
    assert BatchForward(lambda some: some, batch).num_examples() == size


def test_a_network_that_works_on_its_batch_in_place_changes_nobody_elses():
    network, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), torch.randn(12, 4)
    before = x.clone()
    laplace_evidence(network, (x, torch.randint(0, 3, (12,))))
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [3, 4])
def test_a_network_that_takes_one_batch_size_alone_is_read_and_the_log_says_what_was_not_tried(size, caplog):
    def fixed(hidden: Tensor) -> Tensor:
        return hidden.view(size, 6)

    torch.manual_seed(0)
    x, y, network = torch.randn(size, 4), torch.randint(0, 3, (size,)), Between(fixed)
    arguments = {"batch_size": size, "structure": "full", "prior_precision": 1.0}
    with caplog.at_level("INFO", logger="lightning_bayes"):
        evidence = laplace_evidence(network, (x, y), **arguments)
    assert (
        "is not tried: the network does not take some of them by themselves (ValueError: Between"
        in caplog.text
    )
    network.mix = nn.Identity()
    assert evidence.log_evidence == pytest.approx(laplace_evidence(network, (x, y), **arguments).log_evidence)
