"""LightningModules as people write them, and the slow evidence that each must be given."""

from collections import namedtuple
from dataclasses import dataclass

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bayes import LaplaceEvidence
from tests.reference import Reference, reference_evidence

from .sgd_models import trainer

DECAY = 0.02
N = 21  # an incomplete last batch in loaders of 8

TASKS = {"classification": 3, "binary": 1, "binary_3": 3, "regression": 1, "regression_2": 2}
"""Number of outputs of each."""


class Module(L.LightningModule):
    """`network` with a training_step(module, batch) -> loss given as a function, in float64."""

    def __init__(self, network, step, optimizer=None):
        super().__init__()
        self.network = network
        self.step = step
        self.optimizer = optimizer or sgd
        self.double()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return self.optimizer(self)


def sgd(module, **kwargs):
    return torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad], **{"lr": 0.1, "weight_decay": DECAY} | kwargs
    )


def optimizer(**kwargs):
    return lambda module: sgd(module, **kwargs)


def mlp(num_outputs=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, num_outputs))


class Rich(nn.Module):
    """In-place operations, functional activations, dropout, batch norm, a residual sum."""

    def __init__(self, num_outputs=3):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.inner = nn.Linear(5, 5)
        self.last = nn.Linear(5, 5, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, num_outputs)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = self.inner(self.drop(x))
        y += x
        y = y.mul_(0.8).relu_()
        y = F.dropout(F.relu(self.last(y), inplace=True), 0.5, self.training)
        return self.head(y)


def cross_entropy(module, batch):
    x, y = batch
    return F.cross_entropy(module(x), y)


def mean_squared_error(module, batch):
    x, y = batch
    return F.mse_loss(module(x), y)


def tensors(task="classification", size=N, seed=0):
    """Inputs and targets in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    outputs = TASKS[task]
    if task == "classification":
        return x, torch.randint(outputs, (size,), generator=generator)
    if task.startswith("binary"):
        return x, torch.randint(2, (size, outputs), generator=generator).double()
    return x, torch.randn(size, outputs, generator=generator, dtype=torch.float64)


Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


class Shaped(Dataset):
    """(x, y) as the function `shape` packs them."""

    def __init__(self, data, shape):
        self.data, self.shape = data, shape

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        return self.shape(*(part[index] for part in self.data))


def loader(task="classification", batch_size=8, data=None, **kwargs):
    return DataLoader(TensorDataset(*(data or tensors(task))), batch_size=batch_size, **kwargs)


def fit(tmp_path, module, data, *callbacks, **kwargs):
    run = trainer(tmp_path, list(callbacks), **kwargs)
    run.fit(module, data)
    return run


def refused(tmp_path, message, module, data=None, callback=None, **kwargs):
    """Assert that fit under on_error="raise" ends in this ValueError before anything has changed."""
    callbacks = callback if isinstance(callback, list) else [callback or LaplaceEvidence()]
    for each in callbacks:
        each.on_error = "raise"
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer(tmp_path, callbacks, max_epochs=1, **kwargs)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        run.fit(module, loader() if data is None else data)
    assert run.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def task_of(name):
    return name.split("_")[0]


def reference(
    network,
    data,
    task="classification",
    scale=1.0,
    precision=None,
    num_examples=None,
    **kwargs,
) -> Reference:
    """The literal twin at λ = N · weight_decay / s unless `precision` gives λ."""
    training, count = network.training, num_examples or len(data[0])
    if precision is None:
        precision = count * DECAY / scale
    if not isinstance(precision, dict):
        precision = {name: precision for name, p in network.named_parameters() if p.requires_grad}
    expected = reference_evidence(network, *data, task, precision, **kwargs)
    network.train(training)
    return expected


def mean_squared_residual(network, data):
    training = network.training
    network.eval()
    with torch.no_grad():
        variance = (network(data[0]) - data[1]).square().mean().item()
    network.train(training)
    return variance


FIELDS = (
    "log_evidence",
    "log_likelihood",
    "weight_penalty",
    "log_occam_factor",
    "effective_parameters",
    "newton_decrement",
    "num_examples",
    "num_parameters",
)


def disagreements(evidence, expected, rel=1e-8):
    """Fields that differ, with both values; empty when all agree."""
    optional = [
        name for name in ("log_evidence_ratio", "noise_variance") if getattr(expected, name) is not None
    ]
    return {
        name: (getattr(evidence, name), getattr(expected, name))
        for name in (*FIELDS, *optional)
        if abs(getattr(evidence, name) - getattr(expected, name))
        > rel * max(1.0, abs(getattr(expected, name)))
    }
