"""A small module and loaders for the callbacks on SGD's noise; Lightning finds nothing to warn about."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Net(L.LightningModule):
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


def dataset(size=100):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(size, 4, generator=generator), torch.randint(2, (size,), generator=generator)
    )


def loader(size=100, batch_size=10, **kwargs):
    return DataLoader(dataset(size), batch_size=batch_size, shuffle=True, **kwargs)


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


def sgd(**kwargs):
    return lambda module: torch.optim.SGD(module.parameters(), **({"lr": 0.1} | kwargs))


def two_groups(first, second):
    """SGD on two parameter groups with their own settings."""
    return lambda module: torch.optim.SGD(
        [{"params": module.first.parameters(), **first}, {"params": module.second.parameters(), **second}],
        lr=0.1,
    )


def scheduled(interval, function, **kwargs):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), **({"lr": 0.1} | kwargs))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, function)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    return configure
