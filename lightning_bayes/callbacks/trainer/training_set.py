"""Counts the examples that a Trainer draws from its training set, each once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_bayes.callbacks.trainer.inputs import num_batches
from lightning_bayes.capture.examples import examples_from_loader
from lightning_bayes.capture.isolation import isolated

# Samplers of torch, whose share of the dataset is known without drawing from them.
KNOWN_SAMPLERS = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


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
    if source is None:
        raise ValueError(
            "Expected the training loader to have a `dataset` whose length is that of the training set, but got"
            f" {type(loader).__name__} without one. Give a torch DataLoader; or pass the number of training examples"
            " as `dataset_size=` where the callback takes it (SGDNoiseScale, BatchSizeScheduler)."
        )
    whole = _length(source)
    examples = whole if counted is None else counted.reached
    notes += _partial_draw(sampler, whole, examples)
    if counted is not None and counted.reached < counted.drawn:
        notes.append(
            f"An epoch stops after {trainer.num_training_batches} batches and does not shuffle: the"
            f" {counted.reached} of {counted.drawn} examples that it reaches count as the training set."
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


def _partial_draw(sampler: Any, whole: int, examples: int) -> list[str]:
    """A note where somebody's own sampler draws another number of examples than the dataset holds."""
    draws = known_length(sampler)
    if isinstance(sampler, KNOWN_SAMPLERS) or draws is None or draws == whole:
        return []
    return [
        f"{type(sampler).__name__} draws {draws} examples an epoch from a dataset of {whole}, of which {examples}"
        " are taken as the training set; `SGDNoiseScale(dataset_size=...)` takes another size."
    ]


@dataclass(frozen=True)
class _Counted:
    """Examples that a loader draws, each once.

    Attributes:
        drawn: without a limit on the batches of an epoch.
        reached: within that limit.
    """

    drawn: int
    reached: int


# What was counted for a loader, and what the count depends on beside it. Counting can take a pass over a
# sampler, and the configuration is read at every step.
_counts: WeakKeyDictionary[DataLoader[Any], tuple[tuple[object, ...], _Counted | None]] = WeakKeyDictionary()


def _counted(loader: Any, sampler: Any, trainer: Trainer) -> _Counted | None:
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


def _count(loader: DataLoader[Any], trainer: Trainer) -> _Counted | None:
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
    return _Counted(drawn, reached)


def _length(dataset: Any) -> int:
    examples = known_length(dataset) or 0
    if examples < 1:
        raise ValueError(
            f"Expected a training set with a length of at least 1, but got {type(dataset).__name__}"
            " without one. Pass the number of training examples as `dataset_size=` where the callback"
            " takes it (SGDNoiseScale, BatchSizeScheduler), or give the dataset a `__len__`."
        )
    return examples


def known_length(collection: Any) -> int | None:
    """The length of a collection, None where it has none."""
    try:
        return len(collection)
    except (TypeError, NotImplementedError):
        return None


def replicas_of(trainer: Trainer) -> int:
    """Data-parallel processes, each of which draws examples of its own."""
    # Not the world size: under tensor parallelism several processes work on the same examples.
    kwargs: Mapping[str, Any] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return max(1, int(kwargs.get("num_replicas", 1)))
