"""The training loader of a Trainer and its batch size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader


def training_loader(trainer: Trainer) -> Any:
    """The one training loader of a Trainer; a ValueError where there is none, or several."""
    loaders = trainer.train_dataloader
    if loaders is None:
        raise ValueError(
            "Expected a training dataloader, but the Trainer has none: noise scale and advice can be"
            " read during `trainer.fit` only."
        )
    flat = list(flatten(loaders))
    if len(flat) != 1:
        raise ValueError(
            f"Expected one training dataloader, but got a collection of {len(flat)}: examples per step"
            " and size of the training set are then not one number each. Combine the data sets into one"
            " DataLoader, or remove the callback."
        )
    return flat[0]


def flatten(loaders: Any) -> Iterator[Any]:
    """The loaders in the collections that a CombinedLoader accepts."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if not isinstance(loaders, (list, tuple)):
        yield loaders
        return
    for loader in loaders:
        yield from flatten(loader)


def loader_batch_size(loader: Any) -> int:
    """Examples per batch of a loader, or a ValueError where it does not say."""
    batch_size = getattr(loader, "batch_size", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_size is None and batch_sampler is not None:
        batch_size = getattr(batch_sampler, "batch_size", None)
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or int(batch_size) < 1:
        sampler = (
            "" if batch_sampler is None else f" and a {type(batch_sampler).__name__} without `batch_size`"
        )
        remedy = (
            "Pass `batch_size=` to the DataLoader in place of batching inside the dataset, or give its batch sampler"
            " an attribute `batch_size` with the number of examples per batch."
        )
        if not isinstance(loader, DataLoader):
            remedy = "Give a torch DataLoader, or remove the callback."
            if hasattr(loader, "__dict__"):
                remedy = (
                    f"Give the {type(loader).__name__} attributes `batch_size`, the number of examples per batch, and"
                    " `dataset`, whose length is that of the training set; or remove the callback."
                )
        raise ValueError(
            "Expected the training dataloader to have a `batch_size`, but got"
            f" {type(loader).__name__}(batch_size={batch_size!r}){sampler}. {remedy}"
        )
    return int(batch_size)
