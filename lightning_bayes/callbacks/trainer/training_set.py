"""The training set of a Trainer: its loader, the examples that it draws from, read anew or counted, each once."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_bayes.capture.examples import Examples, examples_from_loader
from lightning_bayes.capture.isolation import isolated

# Samplers of torch, whose share of the dataset is known without drawing from them.
KNOWN_SAMPLERS = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

# Examples that a loader draws, each once, and how many of them the batches of an epoch reach; and what the count
# depends on beside the loader. Counting can take a pass over a sampler, and the configuration is read at every step.
_counts: WeakKeyDictionary[DataLoader[Any], tuple[tuple[object, ...], tuple[int, int] | None]] = (
    WeakKeyDictionary()
)


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
    loader = data_loader(trainer)
    check_stream(trainer, loader)
    at_most = max_examples
    if trainer.fast_dev_run:  # type: ignore[attr-defined] # a rehearsal of the code, not of the sums
        at_most = min(at_most or 32, 32)
    examples = examples_from_loader(loader, batch_size, at_most, num_batches(trainer, loader), mixed)
    if loader is trainer.train_dataloader:
        return examples
    return replace(examples, read=lambda: _Wrapped(examples.read(), trainer.train_dataloader))


class _Wrapped:
    """The batches of a loader, each in the collection that the loader came in, which may be nested."""

    def __init__(self, loader: Any, collection: Any) -> None:
        self._loader, self._collection = loader, collection
        self.batch_sampler = loader.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield apply_to_collection(self._collection, DataLoader, lambda loader, batch=batch: batch)


def data_loader(trainer: Trainer) -> DataLoader[Any]:
    """The one DataLoader of a Trainer, alone or in a list or a mapping.

    Raises:
        ValueError: If there is not one torch DataLoader.
    """
    loaders = list(flatten(trainer.train_dataloader))
    if len(loaders) != 1 or not isinstance(loaders[0], DataLoader):
        got = type(loaders[0]).__name__ if len(loaders) == 1 else f"a collection of {len(loaders)}"
        raise ValueError(
            f"LaplaceEvidence and Stability need one torch DataLoader for training, got {got}. They speak of one "
            "training set: give fit() a single DataLoader, or leave the callback out and call laplace_evidence() on "
            "a loader of your choice after training."
        )
    return loaders[0]


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
    loader = data_loader(trainer)
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)


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


def dataset_size_of(loader: Any, trainer: Trainer, given: int | None) -> tuple[int, list[str]]:
    """N and the notes on it.

    Args:
        loader: the training loader.
        trainer: that is fitting.
        given: N in place of the counted one.

    Returns:
        N, and what had to be decided, each a sentence.

    Raises:
        ValueError: for a training set without length.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", getattr(loader, "sampler", None))
    notes = []
    if isinstance(sampler, WeightedRandomSampler) or (
        isinstance(sampler, RandomSampler) and sampler.replacement
    ):
        notes.append(
            f"{type(sampler).__name__} draws with replacement: the -1 in g = lr (N/B - 1)/(1 - m) is"
            " for drawing without, so the true noise scale is larger than the one shown by the factor"
            " 1/(1 - B/N)."
        )
    if given is not None:
        return given, notes
    counted = _counted(loader, sampler, trainer)
    if counted is None and isinstance(sampler, SubsetRandomSampler):
        return len(sampler), notes
    # Under a distributed strategy Lightning wraps a custom sampler: its length is then that of the sampler's
    # whole draw, and elsewhere the whole training set's.
    source = sampler.dataset if isinstance(sampler, DistributedSampler) else getattr(loader, "dataset", None)
    whole = _length_of(source, loader)
    drawn, examples = counted or (whole, whole)
    draws = known_length(sampler)
    if not isinstance(sampler, KNOWN_SAMPLERS) and draws not in (None, whole):
        notes.append(
            f"{type(sampler).__name__} draws {draws} examples an epoch from a dataset of {whole}, of which {examples}"
            " are taken as the training set; `SGDNoiseScale(dataset_size=...)` takes another size."
        )
    if examples < drawn:
        notes.append(
            f"An epoch stops after {trainer.num_training_batches} batches and does not shuffle: the"
            f" {examples} of {drawn} examples that it reaches count as the training set."
        )
    # Lightning sets this attribute without declaring it.
    overfit_batches = getattr(trainer, "overfit_batches", 0)
    if overfit_batches and examples == whole:
        notes.append(
            f"`overfit_batches={overfit_batches}` trains on a part of the {examples} examples"
            " that count as the size of the training set here."
        )
    if replicas_of(trainer) > 1 and not isinstance(sampler, DistributedSampler):
        notes.append(
            f"The replicas draw without a DistributedSampler: {examples} examples, what one of them"
            " sees, count as the size of the training set."
        )
    return examples, notes


def _length_of(source: Any, loader: Any) -> int:
    """The examples of a training set, at least one; refuses one that has no length."""
    if source is None:
        raise ValueError(
            "Expected the training loader to have a `dataset` whose length is that of the training set, but got"
            f" {type(loader).__name__} without one. Give a torch DataLoader; or pass the number of training examples"
            " as `dataset_size=` where the callback takes it (SGDNoiseScale, BatchSizeScheduler)."
        )
    whole = known_length(source) or 0
    if whole < 1:
        raise ValueError(
            f"Expected a training set with a length of at least 1, but got {type(source).__name__} without one. Pass"
            " the number of training examples as `dataset_size=` where the callback takes it (SGDNoiseScale,"
            " BatchSizeScheduler), or give the dataset a `__len__`."
        )
    return whole


def _counted(loader: Any, sampler: Any, trainer: Trainer) -> tuple[int, int] | None:
    """The count that `LaplaceEvidence` takes; None for other loaders, and where it cannot be taken."""
    if not isinstance(loader, DataLoader):
        return None
    depends_on = (
        known_length(loader.dataset),
        known_length(sampler),
        trainer.num_training_batches,
        replicas_of(trainer),
        trainer.fast_dev_run,  # type: ignore[attr-defined] # set without being declared
    )
    known = _counts.get(loader)
    if known is None or known[0] != depends_on:
        known = _counts[loader] = depends_on, _count(loader, trainer)
    return known[1]


def _count(loader: DataLoader[Any], trainer: Trainer) -> tuple[int, int] | None:
    # Somebody's own sampler is read, and may draw random numbers, which training must not miss.
    known = isinstance(getattr(loader.batch_sampler, "sampler", None), KNOWN_SAMPLERS)
    with nullcontext() if known else isolated(loader.batch_sampler):
        try:
            drawn = reached = examples_from_loader(loader, None, None).num_examples
            # A rehearsal of the code by `fast_dev_run` is to say what the run will say.
            limit = None if trainer.fast_dev_run else num_batches(trainer, loader)  # type: ignore[attr-defined]
            if limit is not None:
                reached = examples_from_loader(loader, None, None, limit).num_examples
        except Exception:  # whatever a sampler of somebody's own does when it is copied and read
            return None
    return drawn, reached


def known_length(collection: Any) -> int | None:
    """The length of a collection, None where it has none."""
    try:
        return len(collection)
    except (TypeError, NotImplementedError):
        return None
