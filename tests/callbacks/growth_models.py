"""A regression in float64 that writes down what happens in each epoch, and its data, for BatchSizeScheduler."""

import warnings

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_bayes import BatchSizeScheduler

N = 96
BATCH = 4


def dataset():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randn(N, 1, generator=generator, dtype=torch.float64))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def scheduled(make, optimizer=sgd, **config):
    """Function for `Net` that configures SGD with the scheduler `make(optimizer)`."""

    def configure(module):
        chosen = optimizer(module)
        return {"optimizer": chosen, "lr_scheduler": {"scheduler": make(chosen), **config}}

    return configure


class Net(L.LightningModule):
    """`configure` is a function of the module; `crash` a global batch index at which the run breaks down."""

    def __init__(self, configure=sgd, crash=None):
        super().__init__()
        self.network, self.configure, self.crash = network(), configure, crash
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


class Data(L.LightningDataModule):
    """Shuffles as DistributedSampler does, from the number of the epoch, where asked to."""

    def __init__(self, batch_size=BATCH, shuffle=False):
        super().__init__()
        self.batch_size, self.shuffle = batch_size, shuffle

    def train_dataloader(self):
        data = dataset()
        sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=self.shuffle)
        return DataLoader(data, self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(dataset(), self.batch_size)


def trainer(tmp_path, *callbacks, max_epochs=6, **kwargs):
    warnings.filterwarnings("ignore", ".*`train_dataloader` does not have many workers.*")
    return L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=kwargs.pop("devices", 1),
        logger=False,
        enable_checkpointing=kwargs.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def fit(tmp_path, schedule, *callbacks, net=None, data=None, options=None, **kwargs):
    """A trained Net; `schedule` and `options` are those of BatchSizeScheduler, None for a run without it."""
    module = net or Net()
    growing = [] if schedule is None else [BatchSizeScheduler(schedule, **(options or {}))]
    run = trainer(tmp_path, *callbacks, *growing, **kwargs)
    run.fit(module, datamodule=data or Data())
    module.run = run
    return module


def column(module, key):
    return [epoch[key] for epoch in module.epochs]


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.network.parameters()])


def by_hand(phases, momentum=0.9, weight_decay=0.01):
    """Weights after SGD written out: one (batch size, learning rate) per epoch, examples in their order."""
    inputs, targets = dataset().tensors
    model = network()
    parameters = list(model.parameters())
    buffers = [None] * len(parameters)
    for batch_size, learning_rate in phases:
        for first in range(0, N, batch_size):
            part = slice(first, first + batch_size)
            gradients = torch.autograd.grad((model(inputs[part]) - targets[part]).square().mean(), parameters)
            for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                change = gradient + weight_decay * parameter.detach()
                buffers[index] = change if buffers[index] is None else momentum * buffers[index] + change
                parameter.data -= learning_rate * buffers[index]
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
