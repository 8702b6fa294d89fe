"""What a Lightning checkpoint says of a run's noise: parameter groups, and B and N where something noted them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_bayes.advice.optimizer_groups import (
    ADAPTIVE_KEYS,
    OTHER_KEYS,
    configuration_of,
    names_of,
    scheduled_learning_rate,
)
from lightning_bayes.functional import AdamConfiguration, Configuration
from lightning_bayes.functional._validation import count
from lightning_bayes.functional.configuration import AnyConfiguration

SIZES = {"batch_size": "examples per optimizer step", "dataset_size": "training examples"}


def load_checkpoint(path: Path) -> Mapping[str, Any]:
    """A checkpoint's contents, tensors left on disk.

    Args:
        path: of the file.

    Returns:
        What Lightning saved.

    Raises:
        ValueError: if the file is none, or holds objects whose loading would run code.
    """
    remedy = f' If you trust it: reference=torch.load("{path}", weights_only=False, map_location="cpu").'
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"Expected `reference` {str(path)!r} to be a Lightning checkpoint that holds no objects of classes of its"
            f" own, but loading it failed: {str(error).splitlines()[0]}.{remedy}"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"Expected `reference` {str(path)!r} to be a Lightning checkpoint, but got {type(checkpoint)}."
        )
    return checkpoint


def groups_of_checkpoint(
    checkpoint: Mapping[str, Any], source: str, sizes: Mapping[str, int]
) -> tuple[dict[str, AnyConfiguration], tuple[str, ...]]:
    """The configuration of each parameter group in a checkpoint.

    Args:
        checkpoint: as Lightning saves it.
        source: where it was read, for errors and notes.
        sizes: "batch_size" and "dataset_size", where they are given.

    Returns:
        The configurations by name, and what had to be assumed, each a sentence.

    Raises:
        ValueError: naming what the checkpoint does not say, and how to give it.
    """
    recorded = recorded_configurations(checkpoint)
    if recorded and not sizes:
        return recorded, ()
    states = checkpoint.get("optimizer_states") or []
    if not states:
        raise ValueError(
            f"Expected `reference` to be a checkpoint with optimizer states, but {source} has none: it was saved with"
            f" weights only. Give a full checkpoint, or a dict of the configuration."
        )
    groups: dict[str, AnyConfiguration] = {}
    notes: list[str] = []
    for index, state in enumerate(states):
        param_groups = state["param_groups"]
        other = [key for key in OTHER_KEYS if key in param_groups[0]]
        if other or "lr" not in param_groups[0]:
            raise ValueError(
                f"Expected `reference` to be of SGD or an Adam-like optimizer, but the parameter groups in {source}"
                f" have {sorted(map(str, param_groups[0]))}: neither noise scale describes it."
            )
        adaptive = any(key in param_groups[0] for key in ADAPTIVE_KEYS)
        kind = ("Adam" if adaptive else "SGD") + (f"-{index}" if index else "")
        batch, examples = _sizes(checkpoint, source, sizes, adaptive, notes)
        for name, group in zip(names_of(kind, param_groups), param_groups, strict=True):
            rate = scheduled_learning_rate(group)
            if checkpoint.get("lr_schedulers") and "initial_lr" not in group:
                # ReduceLROnPlateau does not write it down.
                notes.append(
                    f"The learning rate of the reference, {rate:g}, is that at the moment of {source}: its schedule"
                    " does not say where it began."
                )
            groups[name] = configuration_of(group, rate, batch, examples, adaptive=adaptive)
    return groups, tuple(dict.fromkeys(notes))


def recorded_configurations(checkpoint: Mapping[str, Any]) -> dict[str, AnyConfiguration]:
    """The peaks that a ScalingAdvisor noted; the first one's, since all note the same."""
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if str(key).startswith("ScalingAdvisor") and state:
            return {name: peak_from(record) for name, record in state.items()}
    return {}


def peak_from(record: Mapping[str, Any]) -> AnyConfiguration:
    """The configuration in one entry of the state of a ScalingAdvisor."""
    peak = dict(record["peak"])
    if record["adaptive"]:
        return AdamConfiguration(**{**peak, "betas": tuple(peak["betas"])})
    return Configuration(**peak)


def _sizes(
    checkpoint: Mapping[str, Any], source: str, given: Mapping[str, int], adaptive: bool, notes: list[str]
) -> tuple[int, int | None]:
    """B and N: as given, else from hyper-parameters. Adam's rule does without N."""
    hyper_parameters: dict[str, Any] = {}
    for key in ("datamodule_hyper_parameters", "hyper_parameters"):
        hyper_parameters |= dict(checkpoint.get(key) or {})
    sizes = {name: given.get(name, hyper_parameters.get(name)) for name in SIZES}
    missing = [name for name in SIZES if sizes[name] is None and not (adaptive and name == "dataset_size")]
    if missing:
        what = " and ".join(f"`{name}` ({SIZES[name]})" for name in missing)
        raise ValueError(
            f"Expected `reference` to say {what}, but {source} does not: no ScalingAdvisor noted it, and its"
            f" hyper_parameters have only {sorted(map(str, hyper_parameters))}. Give it:"
            f' reference={{"path": ..., {", ".join(f"{chr(34)}{name}{chr(34)}: ..." for name in missing)}}}.'
        )
    batch = count("batch_size", sizes["batch_size"])
    if "batch_size" not in given:
        accumulated = hyper_parameters.get("accumulate_grad_batches")
        if isinstance(accumulated, int) and accumulated > 1:
            batch *= accumulated
        notes.append(
            f"The batch size of the reference, {batch}, is from the hyper_parameters in {source}, taken as examples"
            " per optimizer step of one device."
        )
    examples = sizes["dataset_size"]
    return batch, None if examples is None else count("dataset_size", examples)
