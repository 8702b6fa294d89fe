"""The calls of a network on all batches of a training set, the same in every pass over them."""

from collections.abc import Callable, Iterable, Iterator

from lightning_bayes.capture.forward import BatchForward, Forward
from lightning_bayes.capture.isolation import seed_streams
from lightning_bayes.capture.module_calls import tensors_of

KEPT_BYTES = 1e9
"""Batches that are kept in memory between passes; more are read again."""


class RepeatedForwards:
    """One forward a batch, for as many passes as are wanted.

    Random streams start each pass from one seed, so that transforms that draw from them draw the same again.

    Args:
        first: Those of the first pass, which has begun.
        again: Starts another pass.
        keep: Whether batches are kept for later passes.
    """

    def __init__(
        self, first: Iterable[Forward], again: Callable[[], Iterable[Forward]], keep: bool = False
    ) -> None:
        self._first: Iterable[Forward] | None = first
        self._again = again
        self._kept: list[Forward] = []
        self.keep = keep
        """May be set to False while the first pass goes on."""

    def __call__(self) -> Iterator[Forward]:
        """Yield the forwards of one pass."""
        if self._first is not None:
            first, self._first = self._first, None
            yield from self._remembered(first)
        elif self.keep:
            yield from self._kept
        else:
            seed_streams()
            yield from self._again()

    def _remembered(self, forwards: Iterable[Forward]) -> Iterator[Forward]:
        size = 0.0
        for forward in forwards:
            if self.keep:
                tensors = tensors_of(forward.batch) if isinstance(forward, BatchForward) else None
                size += KEPT_BYTES if tensors is None else sum(t.numel() * t.element_size() for t in tensors)
                self.keep = size <= KEPT_BYTES
                self._kept = [*self._kept, forward] if self.keep else []
            yield forward
        if not self.keep:
            self._kept = []
