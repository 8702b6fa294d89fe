"""What a figure is given: the preset, the runs done so far, and where to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.presets import Preset
from examples.smith_le_2018.results import complete_seeds
from examples.smith_le_2018.sweep import RunTable

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """Handed to every figure's function.

    Attributes:
        preset: grids and training time.
        seeds: repeats.
        folder: where figures, tables and CSVs go.
        mnist_root: the whole of MNIST, or None for the 5,000 digits.
        runs: what the sweeps have measured.
        report: takes a line of progress.
        train: False to draw from what is there.
    """

    preset: Preset
    seeds: int
    folder: Path
    mnist_root: Path | None
    runs: RunTable
    report: Callable[[str], None] = print
    train: bool = True

    def measure(
        self,
        name: str,
        make: Callable[[int], Iterable[Run]],
        moments: Callable[[Run], Sequence[int]] = lambda run: (run.steps,),
    ) -> list[int]:
        """Do the runs of a figure, seed by seed, so that a figure of fewer seeds is there early.

        Args:
            name: of the figure.
            make: a seed to the runs it needs.
            moments: a run to the steps after which it is measured.

        Returns:
            The seeds whose runs are all there.

        Raises:
            Unavailable: if there is none.
        """
        by_seed = {seed: list(make(seed)) for seed in range(self.seeds)}
        if self.train:
            runs = [run for per_seed in by_seed.values() for run in per_seed]
            self.runs.measure(name, runs, moments)

        def done(run: Run) -> bool:
            return all(self.runs.find(run, step) is not None for step in moments(run))

        return complete_seeds(by_seed, done, self.runs.table.path, name)

    def column(
        self, name: str, make: Callable[[int, int], Run], seeds: Sequence[int], over: Sequence[int]
    ) -> np.ndarray:
        """One measured number of a grid of runs.

        Args:
            name: of the column of `runs.csv`.
            make: (what is varied, seed) to the run.
            seeds: in the order of the rows.
            over: in the order of the columns.

        Returns:
            [seeds, over].
        """
        return np.array([[self.runs.value(name, make(value, seed)) for value in over] for seed in seeds])
