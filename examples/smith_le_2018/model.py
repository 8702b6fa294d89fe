"""The paper's network, 784-800-10 with ReLU and softmax, and the batches that it is trained on."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, RandomSampler

from examples.smith_le_2018.data import CLASSES, PIXELS

__all__ = ["HIDDEN", "DigitClassifier", "ShuffledBatches", "network"]

HIDDEN = 800


def network(seed: int, hidden: int = HIDDEN) -> nn.Sequential:
    """The net with PyTorch's default initialisation, U(-1/√fan_in, 1/√fan_in), drawn from a seed.

    Args:
        seed: of the initial weights; the global random state is left alone.
        hidden: units of the hidden layer.

    Returns:
        An `nn.Sequential` from pixels [B, 784] to logits [B, 10].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


class ShuffledBatches(BatchSampler):
    """The batches of a run: drawn without replacement within an epoch, shuffled anew for each.

    As `DataLoader(shuffle=True, drop_last=True)`: what is left of an epoch when fewer than B examples remain is
    left out, so that every step has B of them. Give it to a DataLoader as `batch_sampler`. It draws once an epoch;
    torch's `RandomSampler` draws a second time or not, depending on where its reader stops.

    Args:
        num_examples: N.
        batch_size: B.
        seed: of the shuffles.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self.num_examples = num_examples
        self.generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(range(num_examples), generator=self.generator)
        super().__init__(sampler, batch_size, drop_last=True)

    def __iter__(self) -> Iterator[list[int]]:
        return (indices.tolist() for indices in self.epoch())

    def epoch(self) -> Iterator[Tensor]:
        """The batches of the next epoch, as tensors [B] of indices."""
        order = torch.randperm(self.num_examples, generator=self.generator)
        used = len(self) * self.batch_size
        yield from order[:used].split(self.batch_size)


class DigitClassifier(L.LightningModule):
    """The net as a LightningModule: momentum SGD at a constant learning rate, on the mean cross-entropy."""

    def __init__(self, net: nn.Module, learning_rate: float, momentum: float, weight_decay: float = 0.0):
        super().__init__()
        self.net = net
        self.settings = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self.net(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.settings)
