"""The order of flattened rows is read off the graph, whichever network is behind it."""

import pytest
import torch
from torch import nn

from lightning_bayes.capture.example_layout import Layout, layout_of_rows, rows_of_examples

N, T = 6, 4


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)

    def forward(self, x):
        return self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(4, 3)

    def forward(self, x):
        return self.cell(x.transpose(0, 1))[0].transpose(0, 1)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.attend = Attention(batch_first=True)

    def forward(self, x):
        return self.attend(self.embedding((10 * x[..., 0].sigmoid()).long()))


NETWORKS = {
    "linear": lambda: nn.Linear(4, 3),
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)),
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM),
    "attention": lambda: Attention(batch_first=True),
    "attention, time first": lambda: Attention(batch_first=False),
    "embedding": Tokens,
    "deep": lambda: nn.Sequential(*(Attention(batch_first=True) for _ in range(4)), nn.Linear(4, 3)),
    "convolution": lambda: nn.Conv1d(T, T, 3, padding=1),
}


@pytest.mark.parametrize("major", [True, False], ids=["[N, T]", "[T, N]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_order(name, dtype, major):
    network = NETWORKS[name]().to(dtype)
    outputs = network(torch.randn(N, T, 4, dtype=dtype))
    rows = (outputs if major else outputs.transpose(0, 1)).flatten(0, 1)
    layout = layout_of_rows(rows, N)
    assert layout == Layout(0, major)
    assert torch.equal(rows_of_examples(layout, N)(rows), outputs)


# Not a first layer that mixes the tokens in one kernel: no step behind it shows that, and either order will do.
@pytest.mark.parametrize("name", ["rnn", "attention", "attention, time first", "embedding"])
def test_as_many_tokens_as_examples(name):
    outputs = NETWORKS[name]()(torch.randn(T, T, 4))
    assert layout_of_rows(outputs.flatten(0, 1), T) == Layout(0, major=True)
    assert layout_of_rows(outputs.transpose(0, 1).flatten(0, 1), T) == Layout(0, major=False)


def test_random_state_is_left_alone():
    rows = nn.Linear(4, 3)(torch.randn(N, T, 4)).flatten(0, 1)
    state = torch.get_rng_state()
    layout_of_rows(rows, N)
    assert torch.equal(torch.get_rng_state(), state)


def test_examples_that_are_mixed_are_left_to_the_reader():
    rows = nn.Linear(4, 3)(torch.randn(N, T, 4)).flatten(0, 1)
    assert layout_of_rows(rows - rows.mean(0), N) == Layout(0, major=True)
