"""The training examples, each once and in a fixed order, whatever loader they come from."""

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

SMALLEST_DEFAULT_BATCH = 32


@dataclass(frozen=True)
class Examples:
    """A training set that can be read again and again."""

    num_examples: int
    read: Callable[[], Iterable[Any]]
    """Starts one pass over the batches."""
    num_batches: int
    notes: tuple[str, ...] = ()
    """Sentences for the user on what counts as an example."""


def examples_from_tensors(
    tensors: Sequence[Tensor], batch_size: int | None, max_examples: int | None
) -> Examples:
    """Examples from (inputs, targets) with the examples in the first dimension.

    Raises:
        ValueError: If they are not two tensors of equally many examples, or empty.
    """
    if len(tensors) != 2 or not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in tensors):
        raise ValueError(
            "Expected argument `data` to be a DataLoader or a tuple of two tensors (inputs, targets), got "
            f"({', '.join(type(tensor).__name__ for tensor in tensors)})."
        )
    inputs, targets = tensors
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise ValueError(
            f"Expected equally many inputs and targets, at least one; got {len(inputs)} and {len(targets)}."
        )
    if max_examples is not None and max_examples < len(inputs):
        chosen = torch.tensor(_subset(range(len(inputs)), max_examples), device=inputs.device)
        inputs, targets = inputs[chosen], targets[chosen.to(targets.device)]
    size = int(batch_size or 256)  # 64.0 counts as 64

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(inputs.split(size), targets.split(size), strict=True)

    return Examples(len(inputs), read, -(-len(inputs) // size))


def examples_from_loader(
    loader: "DataLoader[Any]",
    batch_size: int | None,
    max_examples: int | None,
    num_batches: int | None = None,
    mixed: bool = False,
) -> Examples:
    """Examples that a training loader draws from: unshuffled, nothing dropped, nothing twice, no shard.

    Args:
        loader: Left alone, its generators too: another loader reads its dataset.
        batch_size: None for the loader's own, raised to at least 32.
        max_examples: A random subset of this size, the same at every call.
        num_batches: Training stops an epoch after so many batches; without shuffling the examples behind
            them are never seen, and do not count. None for all.
        mixed: In a fixed random order instead, for what depends on which examples meet in a batch.

    Raises:
        ValueError: If the loader is empty, of unknown length, yields whole batches, or can be read only once.
    """
    dataset = loader.dataset
    if loader.batch_sampler is None:
        raise ValueError(
            "The DataLoader has batch_size=None, so its dataset yields batches rather than examples and they "
            "cannot be counted. Give it a batch_size, or pass the examples as tensors to laplace_evidence()."
        )
    # torchdata's StatefulDataLoader is another way to the same batches.
    theirs = type(loader).__iter__ is not DataLoader.__iter__
    if theirs and not type(loader).__module__.startswith("torchdata."):
        raise ValueError(
            f"{type(loader).__name__} iterates in its own way, which another loader over its dataset would not "
            "reproduce. Move what it does to the batches into collate_fn, or the hooks of batch transfer."
        )
    own_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    size = int(batch_size or max(SMALLEST_DEFAULT_BATCH, own_size or 0))
    if isinstance(dataset, IterableDataset):
        trained_on = None if num_batches is None else num_batches * (own_size or 1)
        return _of_stream(loader, size, max_examples, trained_on)
    own = _own_batches(loader)
    keeps_own = own is not None and batch_size is None
    indices = _training_indices(loader, own)
    if num_batches is not None and own_size and _keeps_order(loader) and not keeps_own:
        indices = indices[: num_batches * own_size]
    indices = _subset(indices, max_examples)
    if not indices:
        raise ValueError("The training DataLoader is empty: there is nothing to take the evidence of.")
    if own is not None and keeps_own:
        chosen = set(indices)
        within = [[index for index in batch if index in chosen] for batch in own]
        batches: list[list[int]] | BatchSampler = [batch for batch in within if batch]
    else:
        if mixed:
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
            indices = [indices[i] for i in order.tolist()]
        batches = BatchSampler(indices, size, drop_last=False)

    read = partial(
        DataLoader,
        dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
    )
    return Examples(len(indices), read, len(batches), _notes(loader))


def _notes(loader: "DataLoader[Any]") -> tuple[str, ...]:
    if not isinstance(getattr(loader.batch_sampler, "sampler", None), WeightedRandomSampler):
        return ()
    return (
        "Each example that WeightedRandomSampler can draw counts once in the evidence; its weights, by which "
        "training draws some more often than others, do not enter",
    )


def _of_stream(
    loader: "DataLoader[Any]", size: int, max_examples: int | None, trained_on: int | None
) -> Examples:
    """The first examples of a stream, as many as its length says, in the process that asks for them.

    Workers are not taken: each would go through the whole stream unless the dataset divides it among them, and
    without workers such a dataset gives all of it.
    """
    stream = loader.dataset
    _check_starts_anew(stream)
    at_most = [_length(stream), *(n for n in (max_examples, trained_on) if n is not None)]
    number = int(min(at_most))
    if number == 0:
        raise ValueError("The training DataLoader is empty: there is nothing to take the evidence of.")
    first = _First(stream, number)
    notes: tuple[str, ...] = ()
    if max_examples is not None and max_examples < at_most[0]:
        notes = (
            f"max_examples takes the first {number:,} examples of {type(stream).__name__}, which is a stream",
        )
    return Examples(
        number,
        lambda: DataLoader(first, batch_size=size, collate_fn=loader.collate_fn),
        -(-number // size),
        notes,
    )


class _First(IterableDataset[Any]):
    """The first examples of a stream; it may be endless, or shorter than it says."""

    def __init__(self, stream: Dataset[Any], number: int) -> None:
        self._stream, self._number = stream, number

    def __iter__(self) -> Iterator[Any]:
        # What a stream counts up in its own attributes belongs to training.
        stream, taken = copy.copy(self._stream), 0
        for example in itertools.islice(iter(stream), self._number):
            taken += 1
            yield example
        if taken < self._number:
            warnings.warn(
                f"{type(stream).__name__} ended after {taken:,} examples, of {self._number:,} that its length "
                f"promises: N is {taken:,}. Let __len__ return what __iter__ yields.",
                stacklevel=2,
            )


def _check_starts_anew(stream: Dataset[Any]) -> None:
    """Refuse a stream that holds an iterator: what is read of it for the evidence is gone for training."""
    held = {
        name: type(value).__name__
        for name, value in getattr(stream, "__dict__", {}).items()
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase)
    }
    if isinstance(stream, Iterator):
        held["self"] = type(stream).__name__
    if held:
        raise ValueError(
            f"{type(stream).__name__} can be read only once, since it holds {held}: the evidence would take the "
            "examples away from training. Let __iter__ make its iterator anew, or pass the examples as tensors to "
            "laplace_evidence()."
        )


def _own_batches(loader: "DataLoader[Any]") -> list[list[int]] | None:
    """Batches of a batch sampler of the user's own, each example once; None for the usual one.

    It may put together what fits together (sequences of one length), so its batches are kept as they are.
    """
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler or isinstance(getattr(batches, "sampler", None), DistributedSampler):
        return None
    seen: set[int] = set()
    once = []
    for batch in _copied(batches, loader.dataset):
        kept = [index for index in dict.fromkeys(batch) if index not in seen]
        seen.update(kept)
        once.append(kept)
    return [batch for batch in once if batch]


def _length(dataset: Dataset[Any]) -> int:
    try:
        return len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"The dataset {type(dataset).__name__} has no length, so the number of training examples N is "
            "unknown. Give the dataset a __len__, or pass a sample of it as tensors to laplace_evidence()."
        ) from error


def _training_indices(loader: "DataLoader[Any]", own: list[list[int]] | None) -> Sequence[int]:
    """Indices that the loader can draw, each once; `own` are its batches where they are of the user's own."""
    if own is not None:
        return sorted(itertools.chain.from_iterable(own))
    dataset, batches = loader.dataset, loader.batch_sampler
    size = _length(dataset)
    # A loader that was given a batch sampler keeps an idle sampler beside it; the batch sampler's counts.
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return list(dict.fromkeys(map(int, sampler.indices)))
    if isinstance(sampler, WeightedRandomSampler):  # repeats examples: the likelihood counts each once
        return [index for index, weight in enumerate(sampler.weights.tolist()) if weight > 0]
    if isinstance(sampler, DistributedSampler):
        if _length(sampler.dataset) < size:
            raise ValueError(
                f"The sampler behind {type(sampler).__name__} draws from a part of the dataset, and which part "
                "cannot be told from a shard. Select it by torch.utils.data.Subset(dataset, indices) instead."
            )
        return range(size)  # the sampler holds one replica's shard; the evidence is that of the whole
    whole = isinstance(sampler, RandomSampler | SequentialSampler)
    if whole or not isinstance(sampler, Sized) or len(sampler) >= size:
        return range(size)  # balanced samplers repeat examples, which count once
    # An unknown sampler that draws fewer than all: what it would draw now.
    return sorted(set(_copied(sampler, dataset)))


def _keeps_order(loader: "DataLoader[Any]") -> bool:
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, DistributedSampler) and not sampler.shuffle
    )


def _copied(sampler: Any, dataset: Dataset[Any]) -> Any:
    """A sampler to be read in the place of the loader's own: samplers keep generators."""
    return copy.deepcopy(sampler, {id(dataset): dataset})


def _subset(indices: Sequence[int], size: int | None) -> Sequence[int]:
    """So many of some examples, at random and in their order; all if there are no more, or no size is given."""
    if size is None or size >= len(indices):
        return indices
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[: int(size)]
    return [indices[i] for i in sorted(order.tolist())]
