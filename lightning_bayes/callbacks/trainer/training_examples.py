"""The examples that a Trainer draws from, read anew: the batches that its one DataLoader would make of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_bayes.capture.examples import Examples, examples_from_loader


def examples_of(
    trainer: Trainer, batch_size: int | None, max_examples: int | None, mixed: bool = False
) -> Examples:
    """The training set of a Trainer that is fitting.

    Args:
        trainer: Read only.
        batch_size: See `examples_from_loader`.
        max_examples: See `examples_from_loader`.
        mixed: See `examples_from_loader`.

    Raises:
        ValueError: If there is not one DataLoader whose examples can be counted.
    """
    loader, wrapped = data_loader(trainer)
    check_stream(trainer, loader)
    at_most = max_examples
    if trainer.fast_dev_run:  # type: ignore[attr-defined] # a rehearsal of the code, not of the sums
        at_most = min(at_most or 32, 32)
    examples = examples_from_loader(loader, batch_size, at_most, num_batches(trainer, loader), mixed)
    if loader is trainer.train_dataloader:
        return examples
    return replace(examples, read=lambda: _Wrapped(examples.read(), wrapped))


class _Wrapped:
    """The batches of a loader, each in the collection that the loader came in."""

    def __init__(self, loader: Any, wrapped: Callable[[Any], Any]) -> None:
        self._loader, self._wrapped = loader, wrapped
        self.batch_sampler = loader.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        return map(self._wrapped, self._loader)


def data_loader(trainer: Trainer) -> tuple[DataLoader[Any], Callable[[Any], Any]]:
    """The one DataLoader of a Trainer, and what makes of its batch the batch that training_step gets.

    A loader in a list or a mapping, which may be nested, comes as a batch in a list or a mapping.

    Raises:
        ValueError: If there is not one torch DataLoader.
    """
    loaders: Any = trainer.train_dataloader
    keys: list[Any] = []
    while isinstance(loaders, Mapping | list | tuple) and len(loaders) == 1:
        keys.append(next(iter(loaders)) if isinstance(loaders, Mapping) else None)
        loaders = loaders[keys[-1]] if isinstance(loaders, Mapping) else loaders[0]
    if not isinstance(loaders, DataLoader):
        got = type(loaders).__name__
        if isinstance(loaders, Mapping | list | tuple):
            got = f"a collection of {len(loaders)}"
        raise ValueError(
            f"LaplaceEvidence and Stability need one torch DataLoader for training, got {got}. They speak of one "
            "training set: give fit() a single DataLoader, or leave the callback out and call laplace_evidence() on "
            "a loader of your choice after training."
        )

    def wrapped(batch: Any) -> Any:
        for key in reversed(keys):
            batch = [batch] if key is None else {key: batch}
        return batch

    return loaders, wrapped


def check_stream(trainer: Trainer, loader: DataLoader[Any]) -> None:
    """Refuse a stream that several processes read: whether each reads all of it or a shard cannot be told.

    Raises:
        ValueError: If it is so.
    """
    replicas = replicas_of(trainer)
    if isinstance(loader.dataset, IterableDataset) and replicas > 1:
        raise ValueError(
            f"{type(loader.dataset).__name__} is an IterableDataset that {replicas} processes read, and what one "
            "sees of it may be all examples or a shard: N cannot be told. Give fit() a map-style dataset, which "
            "Lightning shards itself, or call laplace_evidence() on a loader of the whole stream after training."
        )


def num_batches(trainer: Trainer, loader: DataLoader[Any]) -> int | None:
    """Batches of all replicas that `overfit_batches` or `limit_train_batches` leave of an epoch; None for all."""
    if isinstance(loader.dataset, IterableDataset) or trainer.num_training_batches >= len(loader):
        return None
    return int(trainer.num_training_batches) * replicas_of(trainer)


def replicas_of(trainer: Trainer) -> int:
    """Data-parallel processes, each of which draws examples of its own."""
    # Not the world size: under tensor parallelism several processes work on the same examples.
    kwargs: Mapping[str, Any] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return max(1, int(kwargs.get("num_replicas", 1)))


def step_batch_size(trainer: Trainer) -> int | None:
    """Examples of one training_step, None where a batch sampler of the user's own does not say."""
    loader, _ = data_loader(trainer)
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
