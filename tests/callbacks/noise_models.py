"""A quadratic with a chosen gradient and noise, and what is collected from a run."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from .sgd_models import trainer

SPREAD = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
OFFSET = 0.7
"""From the weights to the mean of the targets."""
# The loss of an example is the mean of (wᵢ - xᵢ)² over 4 coordinates: its gradient is (w - x)/2.
TRACE = float(SPREAD.square().sum()) / 4
SQUARED_NORM = 4 * OFFSET**2 / 4


def readable(module, batch):
    x, y = batch
    return F.mse_loss(module.linear(x), y)


def by_hand(module, batch):
    x, y = batch
    return (module.linear(x) - y).square().mean()


class Quadratic(L.LightningModule):
    """Weights that do not move: each step is a draw of the same distribution."""

    def __init__(self, step=readable, lr=0.0):
        super().__init__()
        self.linear = nn.Linear(1, 4, bias=False)
        self.step, self.lr = step, lr
        self.double()
        nn.init.constant_(self.linear.weight, OFFSET)

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def targets(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64) * SPREAD


def loader(y, batch_size, **kwargs):
    return DataLoader(TensorDataset(torch.ones(len(y), 1, dtype=y.dtype), y), batch_size, **kwargs)


class Collect(L.Callback):
    """The estimate after each step."""

    def __init__(self, noise):
        self.noise, self.found = noise, []

    def on_train_batch_end(self, trainer, *_):
        if self.noise.estimate is not None:
            self.found.append(self.noise.estimate)


def collected(folder, noise, data, module=None, **kwargs):
    collect = Collect(noise)
    run = trainer(folder, [noise, collect], **kwargs)
    run.fit(module or Quadratic(), data)
    return collect.found
