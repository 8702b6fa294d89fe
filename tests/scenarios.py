"""Modules, loaders and runs that the tests share, one section for each subject of the callbacks."""

from collections import namedtuple
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from lightning_bayes import BatchSizeScheduler
from tests.reference import Reference, reference_evidence


def trainer(tmp_path, callbacks, *, max_epochs=1, logger=False, **kwargs):
    return L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=kwargs.pop("devices", 1),
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=kwargs.pop("log_every_n_steps", 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=kwargs.pop("enable_checkpointing", False),
        **kwargs,
    )


def same(a, b):
    """Bit for bit, in whatever they are nested."""
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Evidence: LightningModules as people write them, and the slow evidence that each must be given.

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


# The noise of SGD: a module in float32 with dropout; Lightning finds nothing to warn about.


class Classifier(L.LightningModule):
    """Two layers; `optimizers` is a function of the module that `configure_optimizers` returns the result of."""

    def __init__(self, optimizers=None):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 2)
        self.optimizers_of = optimizers or (lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        self.used_learning_rates = []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return nn.functional.cross_entropy(self.second(self.drop(self.first(inputs).relu())), targets)

    def configure_optimizers(self):
        return self.optimizers_of(self)


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


def two_classes(size=100):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(size, 4, generator=generator), torch.randint(2, (size,), generator=generator)
    )


def shuffled(size=100, batch_size=10, **kwargs):
    return DataLoader(two_classes(size), batch_size=batch_size, shuffle=True, **kwargs)


def plain_sgd(**kwargs):
    return lambda module: torch.optim.SGD(module.parameters(), **({"lr": 0.1} | kwargs))


def two_groups(first, second):
    """SGD on two parameter groups with their own settings."""
    return lambda module: torch.optim.SGD(
        [{"params": module.first.parameters(), **first}, {"params": module.second.parameters(), **second}],
        lr=0.1,
    )


def with_lambda(interval, function, **kwargs):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), **({"lr": 0.1} | kwargs))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, function)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    return configure


# Batches that grow: a regression in float64 that writes down what happens in each epoch.

NUM_ROWS = 96
BATCH = 4


def rows():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_ROWS, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randn(NUM_ROWS, 1, generator=generator, dtype=torch.float64))


def regressor():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def momentum_sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def with_scheduler(make, optimizer=momentum_sgd, **config):
    """Function for `Regression` that configures SGD with the scheduler `make(optimizer)`."""

    def configure(module):
        chosen = optimizer(module)
        return {"optimizer": chosen, "lr_scheduler": {"scheduler": make(chosen), **config}}

    return configure


class Regression(L.LightningModule):
    """`configure` is a function of the module; `crash` a global batch index at which the run breaks down."""

    def __init__(self, configure=momentum_sgd, crash=None):
        super().__init__()
        self.network, self.configure, self.crash = regressor(), configure, crash
        self.epochs, self.validated, self.scheduled, self.batches = [], [], [], 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        if self.batches == self.crash:
            raise RuntimeError("power failure")
        return F.mse_loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append((self.current_epoch, len(batch[0])))
        self.log("val_loss", F.mse_loss(self.network(batch[0]), batch[1]))

    def on_train_epoch_start(self):
        self.scheduled.append([group["lr"] for group in self.optimizers().param_groups])

    def on_train_epoch_end(self):
        keys = ("bayes/batch_size", "bayes/learning_rate", "bayes/noise_scale")
        logged = self.trainer.callback_metrics  # in float32, of which six digits can be compared
        self.epochs.append(
            {
                "accumulation": self.trainer.accumulate_grad_batches,
                "loader": self.trainer.train_dataloader.batch_size,
                "steps": self.global_step,
                **{key.removeprefix("bayes/"): float(f"{logged[key]:.6g}") for key in keys if key in logged},
            }
        )

    def configure_optimizers(self):
        return self.configure(self)


class RegressionData(L.LightningDataModule):
    """Shuffles as DistributedSampler does, from the number of the epoch, where asked to."""

    def __init__(self, batch_size=BATCH, shuffle=False):
        super().__init__()
        self.batch_size, self.shuffle = batch_size, shuffle

    def train_dataloader(self):
        data = rows()
        sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=self.shuffle)
        return DataLoader(data, self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(rows(), self.batch_size)


def grow(tmp_path, schedule, *callbacks, net=None, data=None, options=None, **kwargs):
    """A trained Regression; `schedule` and `options` are those of BatchSizeScheduler, None for a run without it."""
    module = net or Regression()
    growing = [] if schedule is None else [BatchSizeScheduler(schedule, **(options or {}))]
    run = trainer(tmp_path, [*callbacks, *growing], **{"max_epochs": 6, "limit_val_batches": 2} | kwargs)
    run.fit(module, datamodule=data or RegressionData())
    module.run = run
    return module


def column(module, key):
    return [epoch[key] for epoch in module.epochs]


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.network.parameters()])


def sgd_by_hand(phases, momentum=0.9, weight_decay=0.01):
    """Weights after SGD written out: one (batch size, learning rate) per epoch, examples in their order."""
    inputs, targets = rows().tensors
    model = regressor()
    parameters = list(model.parameters())
    buffers = [None] * len(parameters)
    for batch_size, learning_rate in phases:
        for first in range(0, NUM_ROWS, batch_size):
            part = slice(first, first + batch_size)
            gradients = torch.autograd.grad((model(inputs[part]) - targets[part]).square().mean(), parameters)
            for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                change = gradient + weight_decay * parameter.detach()
                buffers[index] = change if buffers[index] is None else momentum * buffers[index] + change
                parameter.data -= learning_rate * buffers[index]
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


# Gradient noise: a quadratic with a chosen gradient and noise, and what is collected from a run.

SPREAD = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
OFFSET = 0.7
"""From the weights to the mean of the targets."""
# The loss of an example is the mean of (wᵢ - xᵢ)² over 4 coordinates: its gradient is (w - x)/2.
TRACE = float(SPREAD.square().sum()) / 4
SQUARED_NORM = 4 * OFFSET**2 / 4


def readable_step(module, batch):
    x, y = batch
    return F.mse_loss(module.linear(x), y)


def step_by_hand(module, batch):
    x, y = batch
    return (module.linear(x) - y).square().mean()


def penalised_step(module, batch):
    """A loss whose penalty no example is on."""
    return step_by_hand(module, batch) + 0.0 * module.linear.weight.square().sum()


class Quadratic(L.LightningModule):
    """Weights that do not move: each step is a draw of the same distribution."""

    def __init__(self, step=readable_step, lr=0.0):
        super().__init__()
        self.linear = nn.Linear(1, 4, bias=False)
        self.step, self.lr = step, lr
        self.double()
        nn.init.constant_(self.linear.weight, OFFSET)

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def noisy_targets(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64) * SPREAD


def in_order(y, batch_size, **kwargs):
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
