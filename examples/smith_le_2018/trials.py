"""Trials of any kind on all cores: each is a row of a CSV file, written as it ends and never done twice.

The sweeps of figures 3 to 7 have `sweep.py`, since one run is measured at several steps; everything else is a
setting and what it gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import torch

from examples.smith_le_2018.data import Digits, load_digits
from examples.smith_le_2018.results import Row, Table, complete_seeds
from examples.smith_le_2018.sweep import start_process

if TYPE_CHECKING:
    from examples.smith_le_2018.context import Context

__all__ = ["Kind", "Trials"]


@dataclass(frozen=True)
class Kind:
    """What a trial is.

    Attributes:
        name: of the CSV file.
        settings: dataclass of its settings, `seed` among them; with the digits they determine what comes out.
        measured: dataclass of what comes out.
        run: (digits, settings) -> measured, a function at the top of a module.
    """

    name: str
    settings: type
    measured: type
    run: Callable[[Digits, Any], Any]


class Trials:
    """The trials of one kind that are done, and the doing of those that are not.

    Args:
        kind: of the trials.
        context: where they are written, on which digits and by how many processes.
    """

    def __init__(self, kind: Kind, context: Context) -> None:
        self.kind, self.context = kind, context
        self.digits = context.runs.digits
        settings, measured = _columns(kind.settings), _columns(kind.measured)
        self.table = Table(
            context.folder / f"{kind.name}.csv",
            {"digits": str, **settings, **measured, "seconds": float},
            ["digits", *settings],
        )

    def measure(self, name: str, make: Callable[[int], Iterable[Any]], seeds: int | None = None) -> list[int]:
        """Do the trials of a figure, seed by seed.

        Args:
            name: of the figure, for the lines of progress.
            make: a seed to the settings of its trials.
            seeds: repeats; by default the context's.

        Returns:
            The seeds whose trials are all there.

        Raises:
            Unavailable: if there is none.
        """
        by_seed = {seed: list(make(seed)) for seed in range(seeds or self.context.seeds)}
        if self.context.train:
            self._do(name, [one for per_seed in by_seed.values() for one in per_seed])
        return complete_seeds(by_seed, lambda one: self.find(one) is not None, self.table.path, name)

    def find(self, settings: Any) -> Row | None:
        """The row of these settings, None if there is none yet."""
        return self.table.find({"digits": self.digits, **asdict(settings)})

    def grid(
        self, column: str, make: Callable[[Any, int], Any], seeds: Sequence[int], over: Sequence[Any]
    ) -> np.ndarray:
        """One measured number of a grid of trials.

        Args:
            column: its name.
            make: (what is varied, seed) to the settings.
            seeds: in the order of the rows.
            over: in the order of the columns.

        Returns:
            [seeds, over].
        """
        rows = [[self.find(make(value, seed)) for value in over] for seed in seeds]
        if any(row is None for line in rows for row in line):
            raise KeyError(f"A trial of {self.table.path} is missing: call `measure` first.")
        return np.array([[float(row[column]) for row in line] for line in rows])

    def settings_of(self, row: Row) -> Any:
        """The settings that a row of the file is of."""
        return self.kind.settings(**{name: row[name] for name in _columns(self.kind.settings)})

    def again(self, row: Row) -> Row:
        """What the settings of a row give now."""
        torch.set_num_threads(1)
        return asdict(self.kind.run(load_digits(self.context.mnist_root), self.settings_of(row)))

    def _do(self, name: str, wanted: list[Any]) -> None:
        missing = [one for one in dict.fromkeys(wanted) if self.find(one) is None]
        start = time.monotonic()
        for number, (settings, measured, seconds) in enumerate(self._results(missing), 1):
            row = {"digits": self.digits, **asdict(settings), **asdict(measured)}
            self.table.append(row | {"seconds": round(seconds, 1)})
            left = (time.monotonic() - start) * (len(missing) - number) / number
            self.context.report(
                f"{name}: {number} of {len(missing)} trials, {left / 60:.1f} min left. {settings}: {_brief(measured)}"
            )

    def _results(self, missing: list[Any]) -> Iterator[tuple[Any, Any, float]]:
        jobs = [(self.kind.run, self.context.mnist_root, one) for one in missing]
        workers = min(self.context.runs.workers, len(jobs))
        if workers <= 1:
            # One thread, here and below: sums taken by several differ in their last digits.
            torch.set_num_threads(1)
            yield from map(_work, jobs)
            return
        load_digits(self.context.mnist_root)  # here first: see sweep.py
        # "spawn": a forked copy of a process that has used torch's threads may hang.
        with get_context("spawn").Pool(workers, start_process, (self.context.mnist_root,)) as pool:
            yield from pool.imap_unordered(_work, jobs)


def _columns(kind: type) -> dict[str, type]:
    return get_type_hints(kind)


def _work(job: tuple[Callable[[Digits, Any], Any], Path | None, Any]) -> tuple[Any, Any, float]:
    run, root, settings = job
    start = time.perf_counter()
    return settings, run(load_digits(root), settings), time.perf_counter() - start


def _brief(measured: Any) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in asdict(measured).items()
    )
