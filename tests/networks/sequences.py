"""Networks of sequences and tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.common import VOCABULARY, perturbed


class Sequence(nn.Module):
    """A linear layer at every position of [N, T, d], then their mean."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.head = nn.Linear(3, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)).mean(1))


class WithAndWithoutPositions(nn.Module):
    """One layer for a sequence and for its sum."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(torch.tanh(self.inner(x)).sum(1)))


class Embedded(nn.Module):
    """The mean of embedded tokens."""

    def __init__(self, num_outputs: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 3, padding_idx=padding_idx)
        self.head = nn.Linear(3, num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


class Recurrent(nn.Module):
    """The last state of an LSTM with the time in the first dimension."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)
        self.head = nn.Linear(3, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x.transpose(0, 1))
        return self.head(states[-1])


class BidirectionalGRU(nn.Module):
    """Two layers in both directions, the batch in the first dimension."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 2, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5)
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0].mean(1))


class CellInLoop(nn.Module):
    """A recurrent cell and a norm, called once for each step."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 3)
        self.norm = perturbed(nn.LayerNorm(3))
        self.head = nn.Linear(3, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = self.norm(self.cell(step, state))
        return self.head(state)


class Attention(nn.Module):
    """An encoder layer, whose projections are raw parameters."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.encoder = perturbed(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3, batch_first=True))
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class AttentionSequenceFirst(nn.Module):
    """[T, N, d] inside, as PyTorch's attention has it by default."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(0))


class TiedFunctionally(nn.Module):
    """The embedding's weight is the output's, by a functional call."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.embed = nn.Embedding(VOCABULARY, 3)
        self.inner = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embed(tokens).mean(1)))
        return F.linear(x, self.embed.weight)[:, : self.num_outputs]


class LanguageModel(nn.Module):
    """The embedding's weight is the head's, a module of its own; an output at every token, [N, T, C]."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, VOCABULARY)
        self.head.weight = self.embed.weight
        self.num_outputs = num_outputs

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(torch.tanh(self.inner(x.cumsum(1)) + x))[..., : self.num_outputs]


class BareParameters(nn.Module):
    """A class token, positions, a layer scale in an inner block, a temperature."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(4))
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * torch.tanh(self.inner(x))

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 4, 4))
        self.block = self.Block()
        self.head = nn.Linear(4, num_outputs)
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        x = self.block(x)
        return self.head(x[:, 0] * x[:, 1:].mean(1)) * self.temperature


class Flattened(nn.Module):
    """Tokens as examples of one layer: [N, T, d] to [N·T, d] and back."""

    time_first = False

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.norm = perturbed(nn.LayerNorm(3))
        self.head = nn.Linear(3, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.time_first:
            x = x.transpose(0, 1)
        flat = self.norm(torch.tanh(self.inner(x.reshape(-1, 4))))
        return self.head(flat.view(*x.shape[:2], 3).mean(0 if self.time_first else 1))


class FlattenedTimeFirst(Flattened):
    """[N, T, d] to [T·N, d]."""

    time_first = True


class SequenceOutput(nn.Module):
    """An output at every position, [N, T, C], that sees the positions before it."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.head = nn.Linear(3, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).cumsum(1))


def padded_embedding(num_outputs: int) -> nn.Module:
    return Embedded(num_outputs, padding_idx=1)
