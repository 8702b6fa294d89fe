"""The calls of a network on all batches of a training set, the same in every pass over them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lightning_bayes.capture.forward import BatchForward, Forward
from lightning_bayes.capture.isolation import seed_streams
from lightning_bayes.capture.module_calls import tensors_of

KEPT_BYTES = 1e9
"""Batches that are kept in memory between passes; more are read again."""


@dataclass
class RepeatedForwards:
    """One forward a batch, for as many passes as are wanted.

    Random streams start each pass from one seed, so that transforms that draw from them draw the same again.

    Attributes:
        first: Those of the first pass, which has begun; None after it.
        again: Starts another pass.
        keep: Whether batches are kept for later passes; may be set to False while the first goes on.
    """

    first: Iterable[Forward] | None
    again: Callable[[], Iterable[Forward]]
    keep: bool = False
    _kept: list[Forward] = field(default_factory=list)

    def __call__(self) -> Iterator[Forward]:
        """Yield the forwards of one pass."""
        if self.first is not None:
            yield from self._remembered(self.first)
        elif self.keep:
            yield from self._kept
        else:
            seed_streams()
            yield from self.again()

    def _remembered(self, forwards: Iterable[Forward]) -> Iterator[Forward]:
        self.first, size = None, 0.0
        for forward in forwards:
            yield forward
            if self.keep:
                tensors = tensors_of(forward.batch) if isinstance(forward, BatchForward) else None
                size += KEPT_BYTES if tensors is None else sum(t.numel() * t.element_size() for t in tensors)
                self.keep = size <= KEPT_BYTES
                self._kept.append(forward)
        if not self.keep:
            self._kept.clear()
