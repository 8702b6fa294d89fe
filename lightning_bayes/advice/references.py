"""What a known-good run says of its noise: read from a checkpoint, a logged run, saved advice or a mapping."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lightning_bayes.advice.checkpoints import (
    SIZES,
    groups_of_checkpoint,
    load_checkpoint,
    recorded_configurations,
)
from lightning_bayes.advice.log_directories import read_logged_run
from lightning_bayes.advice.optimizer_groups import ParameterGroup
from lightning_bayes.functional import AdamConfiguration, Comparison, Configuration, compare
from lightning_bayes.functional._validation import count
from lightning_bayes.functional.advice.json import SavedAdvice
from lightning_bayes.functional.configuration import AnyConfiguration

ReferenceLike = str | os.PathLike[str] | Mapping[str, Any] | AnyConfiguration

KNOWN = (
    "the path of a Lightning checkpoint (.ckpt), of a log directory or of saved advice (.json), a Configuration,"
    " or a dict such as"
    ' {"learning_rate": 0.1, "batch_size": 256, "dataset_size": 50000, "momentum": 0.9}'
)
FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in (Configuration, AdamConfiguration)}


@dataclass(frozen=True)
class Reference:
    """A known-good run.

    Attributes:
        groups: configuration of each parameter group, by name; its noise scale alone where no more is known.
        adaptive: whether its optimizer is Adam-like.
        source: where it was read.
        notes: what had to be assumed, each a sentence.
        says_reduction: whether it tells a mean loss from a sum; where it does not, its loss is taken to be as that of
            the run it is compared with.
    """

    groups: Mapping[str, AnyConfiguration | float]
    adaptive: bool
    source: str
    notes: tuple[str, ...] = ()
    says_reduction: bool = True


def read_reference(reference: ReferenceLike) -> Reference:
    """Reads a known-good configuration.

    A checkpoint holds the parameter groups of its optimizers; B and N are taken from what a ScalingAdvisor noted
    in it, else from `batch_size` (times `accumulate_grad_batches`) and `dataset_size` in its hyper_parameters or
    those of the datamodule. A log directory is read for `scaling_advice.json`, the noise scale that
    SGDNoiseScale logged (metrics.csv or TensorBoard's event file), or the configuration in hparams.yaml, in this
    order.

    Args:
        reference: a path, a configuration, a dict of one, a loaded checkpoint; or a dict with the "path" of a
            checkpoint and with the "batch_size" and "dataset_size" that it does not hold.

    Returns:
        The reference.

    Raises:
        ValueError: naming what is missing and how to give it, or for anything else.
    """
    if isinstance(reference, AnyConfiguration):
        return _reference({"": reference}, "as given")
    if isinstance(reference, Mapping):
        if "optimizer_states" in reference:
            return _of_checkpoint(reference, "the checkpoint", {})
        if "path" in reference:
            sizes = {name: value for name, value in reference.items() if name != "path"}
            _only(sizes, SIZES, 'beside "path"')
            return _from_path(reference["path"], {name: count(name, value) for name, value in sizes.items()})
        _only(reference, dict.fromkeys(name for names in FIELDS.values() for name in names), "in a dict")
        configuration = configuration_from(reference, "the dict")
        return _reference({"": configuration}, "as given", says_reduction="reduction" in reference)
    if isinstance(reference, str | os.PathLike):
        return _from_path(reference, {})
    raise ValueError(f"Expected argument `reference` to be {KNOWN}, but got {reference!r}.")


def comparisons_with(reference: Reference, groups: Sequence[ParameterGroup]) -> list[Comparison]:
    """A run's parameter groups beside the reference's.

    Groups are matched by name, else by position; where their numbers differ, the group with the largest
    learning rate stands for the run.

    Args:
        reference: the known-good run.
        groups: of the present one.

    Returns:
        A comparison for each pair of groups; equal ones once, with all their names.

    Raises:
        ValueError: for SGD beside an Adam-like optimizer.
    """
    names_of: dict[Any, list[str]] = {}
    for group, known in _pairs(reference, groups):
        ours = group.configuration
        if reference.adaptive != isinstance(ours, AdamConfiguration):
            kinds = ("an Adam-like optimizer", "SGD")
            raise ValueError(
                f"Expected argument `reference` to be of {kinds[reference.adaptive]}, as the present run is, but"
                f" {reference.source} is of {kinds[not reference.adaptive]}: the noise scales are different"
                f" quantities. Give a run of {kinds[reference.adaptive]}, or leave `reference` out."
            )
        theirs = known
        if not reference.says_reduction and not isinstance(known, int | float):
            theirs = replace(known, reduction=ours.reduction, averaged_batches=ours.averaged_batches)
        names_of.setdefault((ours, theirs), []).append(group.name)
    return [
        compare(present, known, name=", ".join(names), source=reference.source)
        for (present, known), names in names_of.items()
    ]


def _pairs(
    reference: Reference, groups: Sequence[ParameterGroup]
) -> list[tuple[ParameterGroup, AnyConfiguration | float]]:
    known = reference.groups
    if known.keys() == {group.name for group in groups}:
        return [(group, known[group.name]) for group in groups]
    if len(known) == len(groups):
        return list(zip(groups, known.values(), strict=True))

    def size(value: AnyConfiguration | float) -> float:
        return value if isinstance(value, int | float) else value.learning_rate

    largest = max(groups, key=lambda group: group.configuration.learning_rate)
    return [(largest, max(known.values(), key=size))]


def configuration_from(values: Mapping[str, Any], source: str) -> AnyConfiguration:
    """A configuration from named values; Adam's if there are `betas`.

    Args:
        values: by the names of the fields of `Configuration` or `AdamConfiguration`.
        source: where they are from, for the error.

    Returns:
        The configuration.

    Raises:
        ValueError: if something is missing or outside its domain.
    """
    adaptive = "betas" in values
    needed = ("learning_rate", "batch_size") if adaptive else ("learning_rate", "batch_size", "dataset_size")
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        raise ValueError(
            f"Expected `reference` to say {' and '.join(missing)}, but {source} has only {sorted(values)}. Give"
            f" {KNOWN}."
        )
    kind = AdamConfiguration if adaptive else Configuration
    given = {name: value for name, value in values.items() if value is not None}
    if wrong := [name for name in given if name not in FIELDS[kind]]:
        raise ValueError(
            f"Expected `reference` to be of one optimizer, but {source} has {' and '.join(wrong)}"
            f" {'beside' if adaptive else 'without'} betas."
        )
    if given.get("dampening") and not given.get("momentum"):
        given["dampening"] = 0.0  # torch.optim.SGD applies it in the momentum buffer only
    if adaptive:
        given["betas"] = tuple(given["betas"])
    return kind(**given | {"batch_size": count("batch_size", given["batch_size"])})


def _reference(
    groups: Mapping[str, AnyConfiguration | float],
    source: str,
    notes: tuple[str, ...] = (),
    *,
    adaptive: bool = False,
    says_reduction: bool = True,
) -> Reference:
    if not groups:
        raise ValueError(f"Expected `reference` to hold a configuration, but {source} has none.")
    adaptive = adaptive or any(isinstance(value, AdamConfiguration) for value in groups.values())
    return Reference(dict(groups), adaptive, source, notes, says_reduction)


def _only(values: Mapping[str, Any], known: Any, where: str) -> None:
    wrong = sorted(str(name) for name in values if name not in known)
    if wrong:
        raise ValueError(
            f"Expected `reference` to have {', '.join(known)} {where}, but got also {', '.join(wrong)}."
        )


def _from_path(given: Any, sizes: Mapping[str, int]) -> Reference:
    path = Path(given)
    if path.is_dir() and not sizes:
        run = read_logged_run(path)
        if run.values is not None:
            configuration = configuration_from(run.values, run.source)
            return _reference({"": configuration}, run.source, run.notes, says_reduction=False)
        if run.noise_scales is not None:
            return _reference(run.noise_scales, run.source, run.notes, adaptive=run.adaptive)
        return replace(_from_json(Path(run.source)), notes=run.notes)
    if not path.is_file():
        raise ValueError(f"Expected argument `reference` to be {KNOWN}, but there is no file {str(path)!r}.")
    if path.suffix == ".json" and not sizes:
        return _from_json(path)
    return _of_checkpoint(load_checkpoint(path), str(path), sizes)


def _of_checkpoint(checkpoint: Mapping[str, Any], source: str, sizes: Mapping[str, int]) -> Reference:
    groups, notes = groups_of_checkpoint(checkpoint, source, sizes)
    noted = bool(recorded_configurations(checkpoint)) and not sizes
    return _reference(groups, source, notes, says_reduction=noted)


def _from_json(path: Path) -> Reference:
    try:
        saved = SavedAdvice.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{error} The file is {str(path)!r}, given as `reference`.") from error
    return _reference(saved.configurations, str(path))
