"""Reads from a running Trainer what noise scales depend on: N, B, and each group's ε, m, τ or betas."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_bayes.advice.optimizer_groups import (
    ParameterGroup,
    groups_of,
    names_of,
    optimizer_notes,
)
from lightning_bayes.callbacks.trainer.checks import check_automatic_optimization
from lightning_bayes.callbacks.trainer.loss_reduction import reduction_of
from lightning_bayes.callbacks.trainer.training_set import (
    dataset_size_of,
    flatten,
    replicas_of,
    training_loader,
)

# Settings of a parameter group that schedules move, beside its learning rate.
CHANGING = ("momentum", "dampening", "betas", "alpha", "rho", "eps")


@dataclass(frozen=True)
class Sizes:
    """Examples per optimizer step, and those of the training set.

    Attributes:
        device_batch_size: examples of one batch of the loader, on each replica.
        accumulation: batches per optimizer step.
        replicas: processes that draw different examples.
        dataset_size: N.
        notes: what had to be decided in counting N.
    """

    device_batch_size: int
    accumulation: int
    replicas: int
    dataset_size: int
    notes: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        """Nominal examples per optimizer step, B."""
        return self.device_batch_size * self.accumulation * self.replicas


@dataclass(frozen=True)
class TrainerConfiguration:
    """What the training loop, the loader and the optimizer say at this moment.

    Attributes:
        groups: every parameter group of every optimizer.
        notes: what had to be decided in reading them, each a sentence that belongs before the user.
        sizes: what a step's batch is made up of.
    """

    groups: tuple[ParameterGroup, ...]
    notes: tuple[str, ...]
    sizes: Sizes


def read_sizes(trainer: Trainer, dataset_size: int | None = None) -> Sizes:
    """Reads B, what it is made up of, and N from a Trainer that is fitting.

    Args:
        trainer: between `on_train_start` and `on_train_end`.
        dataset_size: N in place of the length of the training set.

    Returns:
        The sizes; `read_configuration` says what they mean.

    Raises:
        ValueError: without a training loader or with several, and where N or B cannot be read.
    """
    loader = training_loader(trainer)
    examples, notes = dataset_size_of(loader, trainer, dataset_size)
    return Sizes(
        loader_batch_size(loader),
        trainer.accumulate_grad_batches,
        replicas_of(trainer),
        examples,
        tuple(notes),
    )


def loader_batch_size(loader: Any) -> int:
    """Examples per batch of a loader, or a ValueError where it does not say."""
    batch_size = getattr(loader, "batch_size", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_size is None and batch_sampler is not None:
        batch_size = getattr(batch_sampler, "batch_size", None)
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or int(batch_size) < 1:
        sampler = (
            "" if batch_sampler is None else f" and a {type(batch_sampler).__name__} without `batch_size`"
        )
        remedy = (
            "Pass `batch_size=` to the DataLoader in place of batching inside the dataset, or give its batch sampler"
            " an attribute `batch_size` with the number of examples per batch."
        )
        if not isinstance(loader, DataLoader):
            remedy = "Give a torch DataLoader, or remove the callback."
            if hasattr(loader, "__dict__"):
                remedy = (
                    f"Give the {type(loader).__name__} attributes `batch_size`, the number of examples per batch, and"
                    " `dataset`, whose length is that of the training set; or remove the callback."
                )
        raise ValueError(
            "Expected the training dataloader to have a `batch_size`, but got"
            f" {type(loader).__name__}(batch_size={batch_size!r}){sampler}. {remedy}"
        )
    return int(batch_size)


def read_configuration(
    trainer: Trainer, dataset_size: int | None = None, *, scheduled: bool = False
) -> TrainerConfiguration:
    """Reads the configuration in force from a Trainer that is fitting.

    B = loader's batch size x `trainer.accumulate_grad_batches` x replicas that draw different examples

    A step after an incomplete batch, or an incomplete accumulation at the end of an epoch, sees fewer
    examples; B is the nominal one. N counts the examples that training can draw, each once and whether or not B
    divides it, as `LaplaceEvidence` does: under `limit_train_batches` all that shuffling can bring into those
    batches, without shuffling those in them.

    Args:
        trainer: between `on_train_start` and `on_train_end`.
        dataset_size: N in place of the length of the training set.
        scheduled: whether to take the learning rate that a schedule is about (its base, or OneCycleLR's peak) in
            place of the present one.

    Returns:
        Parameter groups and notes.

    Raises:
        ValueError: for manual optimization, without a training loader or with several, where N or B cannot be
            read, and for optimizers that neither noise scale describes; with the remedy.
    """
    if trainer.lightning_module is not None:
        check_automatic_optimization(trainer.lightning_module, "A noise scale")
    sizes = read_sizes(trainer, dataset_size)
    batch_size, examples, notes = sizes.batch_size, sizes.dataset_size, list(sizes.notes)
    if batch_size > examples:
        # An accumulation never reaches into the next epoch, so no step sees more than the training set.
        notes.append(
            f"The nominal batch of {batch_size} exceeds the {examples} training examples: every step is full"
            " batch, and the noise scale is 0."
        )
        batch_size = examples
    groups: list[ParameterGroup] = []
    in_step = learning_rate_in_step(trainer)
    for name, optimizer in _named_optimizers(trainer):
        notes += optimizer_notes(optimizer)
        groups += groups_of(name, optimizer, batch_size, examples, in_step, scheduled=scheduled)
    if not groups:
        raise ValueError(
            "Expected an optimizer, but `configure_optimizers` gave none. Remove the callback, or return one."
        )
    if reduction_of(trainer) == "sum":
        averaged = sizes.accumulation * sizes.replicas
        groups = [
            replace(
                group,
                configuration=replace(group.configuration, reduction="sum", averaged_batches=averaged),
            )
            for group in groups
        ]
    return TrainerConfiguration(tuple(groups), tuple(notes), sizes)


def makes_a_step(trainer: Trainer, optimizer: Any) -> bool:
    """Whether the step that Lightning announces moves weights: in a pass without gradients it does not.

    StochasticWeightAveraging appends an epoch for the statistics of batch norm, in which it accumulates all batches
    and leaves out the backward pass.

    Args:
        trainer: in `on_before_optimizer_step`.
        optimizer: that is to step.
    """
    if getattr(trainer.fit_loop, "_skip_backward", False):
        return False
    if trainer.strategy.handles_gradient_accumulation:  # DeepSpeed keeps the gradients itself
        return True
    groups = getattr(optimizer, "param_groups", ())
    return any(parameter.grad is not None for group in groups for parameter in group["params"])


def changing_settings(trainer: Trainer) -> tuple[object, ...]:
    """What `read_configuration` depends on that may change within an epoch; while it does not, nor does that.

    Args:
        trainer: as `read_configuration` takes it.

    Returns:
        Values to compare with those of another step.
    """
    loader = next(flatten(trainer.train_dataloader), None)
    sizes = [getattr(part, "batch_size", None) for part in (loader, getattr(loader, "batch_sampler", None))]
    values: list[object] = [id(loader), *sizes, trainer.accumulate_grad_batches, trainer.num_training_batches]
    in_step = learning_rate_in_step(trainer)
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            rate = group.get("lr")
            values.append(in_step(group) if _is_number(rate) else _comparable(rate))
            values += [_comparable(group.get(key)) for key in CHANGING]
    return tuple(values)


def learning_rate_in_step(trainer: Trainer) -> Callable[[Mapping[str, Any]], float]:
    """Gives a group's learning rate in a step, which under BatchSizeScheduler is not the one between steps.

    Args:
        trainer: a callback of its that has a method of this name is asked.

    Returns:
        A function of the group.
    """
    for callback in getattr(trainer, "callbacks", ()):
        if callable(in_step := getattr(callback, "learning_rate_in_step", None)):
            return cast(Callable[[Mapping[str, Any]], float], in_step)
    return lambda group: float(group["lr"])


def _comparable(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()  # a tensor is changed in place
    # As is a list, which an optimizer of somebody's own may keep.
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _named_optimizers(trainer: Trainer) -> list[tuple[str, Any]]:
    """Optimizers with `LearningRateMonitor`'s names: the class, numbered from the second of a class on."""
    named: list[tuple[str, Any]] = []
    seen: dict[str, int] = {}
    for wrapped in trainer.optimizers:
        # DeepSpeed wraps the optimizer that holds the parameter groups.
        optimizer = getattr(wrapped, "optimizer", wrapped)
        kind = type(optimizer).__name__
        named.append((f"{kind}-{seen[kind]}" if kind in seen else kind, optimizer))
        seen[kind] = seen.get(kind, 0) + 1
    return named


def group_names(trainer: Trainer) -> list[str]:
    """The names of all parameter groups, those of one optimizer after those of the one before it."""
    return [
        full
        for name, optimizer in _named_optimizers(trainer)
        for full in names_of(name, optimizer.param_groups)
    ]
