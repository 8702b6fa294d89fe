"""The parameter groups of an optimizer, live or from a checkpoint, as configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, SparseAdam

from lightning_bayes.functional.configuration import AdamConfiguration, AnyConfiguration, Configuration

# Optimizers that divide the gradient by its root mean square. RMSprop carries a `momentum`: the keys of a
# parameter group alone do not tell them from SGD.
ADAPTIVE = (Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, SparseAdam)
# Neither g nor the square-root rule is known for these. Not every supported torch has all of them.
NEITHER = tuple(
    getattr(torch.optim, name)
    for name in ("LBFGS", "Rprop", "Muon", "Adafactor")
    if hasattr(torch.optim, name)
)
# What a parameter group of an adaptive optimizer has and one of SGD has not: Adam's, RMSprop's, Adadelta's and
# Adagrad's keys. A checkpoint holds the groups, but not the class.
ADAPTIVE_KEYS = ("betas", "alpha", "rho", "lr_decay")
# The keys of LBFGS, Rprop, Muon and Adafactor, and of ASGD, whose `alpha` is another.
OTHER_KEYS = ("max_iter", "etas", "ns_steps", "beta2_decay", "lambd")
# What is read from a parameter group.
READ = ("lr", "initial_lr", "max_lr", "momentum", "dampening", "nesterov", "betas", "alpha", "rho", "eps")


@dataclass(frozen=True)
class ParameterGroup:
    """One parameter group of an optimizer.

    Attributes:
        name: in the manner of `LearningRateMonitor`: "SGD", "SGD/pg1", "SGD/<name of the group>".
        configuration: a `Configuration` where g applies, an `AdamConfiguration` where it does not.
    """

    name: str
    configuration: AnyConfiguration


def groups_of(
    name: str,
    optimizer: Any,
    batch_size: int,
    examples: int,
    learning_rate: Callable[[Mapping[str, Any]], float],
    *,
    scheduled: bool = False,
) -> list[ParameterGroup]:
    """The configuration of each parameter group of an optimizer.

    Args:
        name: of the optimizer.
        optimizer: with `param_groups`.
        batch_size: B, examples per optimizer step.
        examples: N.
        learning_rate: gives that of a group at present.
        scheduled: whether to take the learning rate that the schedule is about, in place of the present one.

    Returns:
        One entry a group.

    Raises:
        ValueError: for an optimizer that neither noise scale describes, or without learning rate.
    """
    if isinstance(optimizer, NEITHER):
        raise ValueError(
            "Neither the SGD noise scale nor Adam's square-root rule describes"
            f" {type(optimizer).__name__}. Remove the callback, or train with SGD or an Adam-like optimizer."
        )
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(
            f"Expected {type(optimizer).__name__} to have `param_groups`, a list of dicts as in torch.optim, but got"
            f" {type(groups).__name__}. Remove the callback: where an optimizer keeps its learning rate is not known."
        )
    adaptive = is_adaptive(optimizer)
    its_groups = []
    for full_name, group in zip(names_of(name, groups), groups, strict=True):
        if "lr" not in group:
            raise ValueError(
                f"Expected the parameter groups of {type(optimizer).__name__} to have an `lr`, but got"
                f" {sorted(map(str, group))}. Remove the callback: without a learning rate there is no"
                " noise scale."
            )
        try:
            rate = scheduled_learning_rate(group) if scheduled else learning_rate(group)
            configuration = configuration_of(group, rate, batch_size, examples, adaptive=adaptive)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            settings = {key: value for key, value in group.items() if key in READ}
            raise ValueError(
                f"The settings of {full_name} cannot be read as those of SGD or an Adam-like optimizer: {settings}"
                f" ({type(error).__name__}: {error}). Remove the callback: without them there is no noise scale."
            ) from error
        its_groups.append(ParameterGroup(full_name, configuration))
    return its_groups


def names_of(optimizer: str, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """`LearningRateMonitor`'s names of the parameter groups of an optimizer."""
    labels = [
        group.get("name", f"pg{index}" if len(groups) > 1 else None)
        for index, group in enumerate(groups, start=1)
    ]
    return [optimizer if label is None else f"{optimizer}/{label}" for label in labels]


def is_adaptive(optimizer: Any) -> bool:
    """Whether an optimizer is Adam-like: one of torch's, or another with `betas` and no `momentum`."""
    if isinstance(optimizer, ADAPTIVE):
        return True
    groups = getattr(optimizer, "param_groups", None)
    group = groups[0] if groups else {}
    return not isinstance(optimizer, SGD) and "betas" in group and "momentum" not in group


def configuration_of(
    group: Mapping[str, Any], learning_rate: float, batch_size: int, examples: int | None, *, adaptive: bool
) -> AnyConfiguration:
    """One parameter group as a configuration.

    Args:
        group: the options that the optimizer keeps for it.
        learning_rate: ε, from the group or from its schedule.
        batch_size: B, examples per optimizer step.
        examples: N; None, for an adaptive optimizer, where it is unknown.
        adaptive: whether the optimizer divides the gradient by its own size.

    Returns:
        A `Configuration`, or for adaptive optimizers an `AdamConfiguration`.

    Raises:
        ValueError: for a value outside its domain.
    """
    if adaptive:
        # The decay rates are `betas` in Adam, `alpha` in RMSprop, `rho` in Adadelta; Adagrad has none.
        single = tuple(float(group[key]) for key in ("alpha", "rho") if key in group)
        betas = tuple(float(beta) for beta in group["betas"]) if "betas" in group else single
        return AdamConfiguration(learning_rate, batch_size, betas, float(group.get("eps", 0.0)), examples)
    if examples is None:
        raise ValueError("Expected argument `examples` to be a number for SGD, but got None.")
    momentum = float(group.get("momentum", 0.0))
    # torch.optim.SGD applies dampening in the momentum buffer only: it ignores it where there is none.
    dampening = float(group.get("dampening", 0.0)) if momentum > 0 else 0.0
    nesterov = bool(group.get("nesterov", False)) and momentum > 0 and dampening == 0
    return Configuration(learning_rate, batch_size, examples, momentum, dampening, nesterov)


def scheduled_learning_rate(group: Mapping[str, Any]) -> float:
    """The largest learning rate that a parameter group says its schedule is about, before the run or after it.

    A scheduler of torch writes down the base rate as `initial_lr`, OneCycleLR the peak as `max_lr`.
    """
    rates = [group[key] for key in ("lr", "initial_lr", "max_lr") if group.get(key) is not None]
    return max(map(float, rates))


def optimizer_notes(optimizer: Any) -> list[str]:
    """What had to be assumed of an optimizer that is not one of torch's."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, (SGD, *ADAPTIVE)):
        return []
    if is_adaptive(optimizer):
        return [f"{kind} is not an optimizer of torch.optim; having `betas`, it is taken to be Adam-like."]
    first: Mapping[str, Any] = next(iter(getattr(optimizer, "param_groups", ())), {})
    momentum = "with momentum" if "momentum" in first else "without momentum, since it has no `momentum`"
    return [
        f"{kind} is not torch.optim.SGD; it is taken to be SGD {momentum}. If it rescales gradients by"
        " their size, do not believe the noise scale."
    ]
