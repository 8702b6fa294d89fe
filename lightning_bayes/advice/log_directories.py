"""What a log directory says of a run's noise: saved advice, logged noise scales, or hyper-parameters."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ADVICE_FILE = "scaling_advice.json"
ADVICE_FILES = "scaling_advice*.json"
"""Those of several advisors, and of several runs in one directory, are numbered: scaling_advice-1.json."""
# `SGDNoiseScale`'s keys: "bayes/noise_scale", "bayes/adam_noise_scale-Adam/pg1"; not "bayes/gradient_noise_scale".
KEY = re.compile(r"(?:^|/)(?P<adam>adam_)?noise_scale(?:-(?P<group>.+))?$")
# The fields of a configuration that hyper-parameters may have; "lr" is "learning_rate" too.
USED = ("learning_rate", "batch_size", "dataset_size", "momentum", "dampening", "nesterov", "betas", "eps")


@dataclass(frozen=True)
class LoggedRun:
    """One of three things that a log directory can hold.

    Attributes:
        source: the file.
        noise_scales: the largest noise scale that was logged, by parameter group.
        adaptive: whether that is Adam's ε/√B.
        values: hyper-parameters by the names of a configuration's fields. With neither, `source` is saved advice.
        notes: what had to be assumed, each a sentence.
    """

    source: str
    noise_scales: Mapping[str, float] | None = None
    adaptive: bool = False
    values: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def read_logged_run(directory: Path) -> LoggedRun:
    """Reads a log directory of CSVLogger or TensorBoardLogger.

    Args:
        directory: such as lightning_logs/version_0.

    Returns:
        What is there, the most telling first: saved advice, logged noise scales, hyper-parameters.

    Raises:
        ValueError: if there is none of the three.
    """
    saved = _newest(directory.glob(ADVICE_FILES))
    if saved is not None:
        return LoggedRun(str(saved))
    for source, series in _series(directory):
        run = _of_series(source, series)
        if run is not None:
            return run
    path = directory / "hparams.yaml"
    values = _hyper_parameters(path)
    if {"learning_rate", "batch_size"} <= values.keys():
        note = f"The batch size of the reference is from {path}: examples per optimizer step, on one device."
        return LoggedRun(str(path), values=values, notes=(note,))
    # Loggers that share a directory among runs have advice in <name>/<version> below it.
    below = _newest([*directory.glob(f"*/{ADVICE_FILES}"), *directory.glob(f"*/*/{ADVICE_FILES}")])
    if below is not None:
        note = f"Of the runs below {directory} the reference is the newest with advice, {below.parent}."
        return LoggedRun(str(below), notes=(note,))
    raise ValueError(
        f"Expected `reference` {str(directory)!r} to hold {ADVICE_FILE} (written by a ScalingAdvisor), a noise scale"
        " in metrics.csv or an event file of TensorBoard (logged by SGDNoiseScale), or learning_rate and batch_size"
        f" in hparams.yaml, but found only {sorted(path.name for path in directory.iterdir())}. Give a dict of the"
        " configuration in its place."
    )


def _newest(files: Iterable[Path]) -> Path | None:
    """The file written last; of several of one moment the one with the highest number."""
    return max(files, key=lambda path: (path.stat().st_mtime_ns, len(path.name), path.name), default=None)


def _series(directory: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Where scalars are logged, and the values under each key of a noise scale."""
    table = directory / "metrics.csv"
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = [key for key in (rows[0] if rows else ()) if key is not None and KEY.search(key)]
        try:
            yield str(table), {key: [float(row[key]) for row in rows if row[key]] for key in columns}
        except ValueError as error:
            raise ValueError(
                f"Expected `reference` to hold numbers in the columns {', '.join(columns)}, but in {table} there is"
                f" one that is none: {error}."
            ) from error
    if any(directory.glob("events.out.tfevents*")):
        # 0 keeps every value: by default long series are thinned out, and the peak can be lost.
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if KEY.search(tag)]
        yield str(directory), {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def _of_series(source: str, series: Mapping[str, list[float]]) -> LoggedRun | None:
    """The largest noise scale of each parameter group; None where none was logged."""
    known = {key: list(filter(math.isfinite, values)) for key, values in series.items()}
    largest: dict[bool, dict[str, float]] = {}
    for key, values in known.items():
        if values and (match := KEY.search(key)):
            largest.setdefault(match["adam"] is not None, {})[match["group"] or ""] = max(values)
    if not largest:
        return None
    # A Trainer with both kinds of optimizer: SGD's g says more.
    adaptive = False not in largest
    groups = largest[adaptive]
    if len(groups) > 1:
        # From the moment that groups differ each has a key; the common one from before says less.
        groups.pop("", None)
    logged = max(map(len, known.values()))
    note = f"The noise scale of the reference is the largest of {logged} logged in {source}."
    return LoggedRun(source, groups, adaptive, notes=(note,))


def _hyper_parameters(path: Path) -> dict[str, Any]:
    """The fields of a configuration that a file of hyper-parameters has."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError:
        return {}  # objects among the hyper-parameters; the error above names what is needed
    named = {str(name): value for name, value in document.items()} if isinstance(document, Mapping) else {}
    rates = [value for name, value in named.items() if name in ("learning_rate", "lr") and value is not None]
    named["learning_rate"] = rates[-1] if rates else None
    values = {name: named[name] for name in USED if named.get(name) is not None}
    accumulated = named.get("accumulate_grad_batches")
    if isinstance(accumulated, int) and isinstance(values.get("batch_size"), int):
        values["batch_size"] *= accumulated
    return values
