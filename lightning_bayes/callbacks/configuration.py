"""Reads from a running Trainer what noise scales depend on: N, B, and each group's ε, m, τ or betas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, SparseAdam
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_bayes.callbacks.trainer_inputs import num_batches
from lightning_bayes.curvature.data import examples_from_loader
from lightning_bayes.curvature.isolation import isolated
from lightning_bayes.functional import AdamConfiguration, Configuration

# Optimizers that divide the gradient by its root mean square. RMSprop carries a `momentum`: the keys of a
# parameter group alone do not tell them from SGD.
ADAPTIVE = (Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, SparseAdam)
# Neither g nor the square-root rule is known for these. Not every supported torch has all of them.
NEITHER = tuple(
    getattr(torch.optim, name)
    for name in ("LBFGS", "Rprop", "Muon", "Adafactor")
    if hasattr(torch.optim, name)
)
# Settings of a parameter group that schedules move.
CHANGING = ("lr", "momentum", "dampening", "betas", "alpha", "rho", "eps")
# Samplers of torch, whose share of the dataset is known without drawing from them.
KNOWN_SAMPLERS = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


@dataclass(frozen=True)
class ParameterGroup:
    """One parameter group of an optimizer.

    Attributes:
        name: in the manner of `LearningRateMonitor`: "SGD", "SGD/pg1", "SGD/<name of the group>".
        configuration: a `Configuration` where g applies, an `AdamConfiguration` where it does not.
    """

    name: str
    configuration: Configuration | AdamConfiguration


@dataclass(frozen=True)
class TrainerConfiguration:
    """What the training loop, the loader and the optimizer say at this moment.

    Attributes:
        groups: every parameter group of every optimizer.
        notes: what had to be decided in reading them, each a sentence that belongs before the user.
    """

    groups: tuple[ParameterGroup, ...]
    notes: tuple[str, ...]


def read_configuration(trainer: Trainer, dataset_size: int | None = None) -> TrainerConfiguration:
    """Reads the configuration in force from a Trainer that is fitting.

    B = loader's batch size x `trainer.accumulate_grad_batches` x replicas that draw different examples

    A step after an incomplete batch, or an incomplete accumulation at the end of an epoch, sees fewer
    examples; B is the nominal one. N counts the examples that training can draw, each once and whether or not B
    divides it, as `LaplaceEvidence` does: under `limit_train_batches` all that shuffling can bring into those
    batches, without shuffling those in them.

    Args:
        trainer: between `on_train_start` and `on_train_end`.
        dataset_size: N in place of the length of the training set.

    Returns:
        Parameter groups and notes.

    Raises:
        ValueError: for manual optimization, without a training loader or with several, where N or B cannot be
            read, and for optimizers that neither noise scale describes; with the remedy.
    """
    if trainer.lightning_module is not None and not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            "Noise scale and advice need automatic optimization, but the LightningModule sets"
            " `automatic_optimization = False`: when it steps, and on how many examples, is then known to it"
            " alone. Remove the callback and use `lightning_bayes.functional` inside `training_step`."
        )
    loader = _loader(trainer)
    examples, notes = _dataset_size(loader, trainer, dataset_size)
    loader_batch = _loader_batch_size(loader)
    batch_size = loader_batch * trainer.accumulate_grad_batches * _replicas(trainer)
    if batch_size > examples:
        # An accumulation never reaches into the next epoch, so no step sees more than the training set.
        notes.append(
            f"The nominal batch of {batch_size} exceeds the {examples} training examples: every step is full"
            " batch, and the noise scale is 0."
        )
        batch_size = examples
    groups: list[ParameterGroup] = []
    for name, optimizer in _named_optimizers(trainer):
        groups += _groups(name, optimizer, batch_size, examples)
        notes += _optimizer_notes(optimizer)
    if not groups:
        raise ValueError(
            "Expected an optimizer, but `configure_optimizers` gave none. Remove the callback, or return one."
        )
    return TrainerConfiguration(tuple(groups), tuple(notes))


def changing_settings(trainer: Trainer) -> tuple[object, ...]:
    """What `read_configuration` depends on that may change within an epoch; while it does not, nor does that.

    Args:
        trainer: as `read_configuration` takes it.

    Returns:
        Values to compare with those of another step.
    """
    loader = trainer.train_dataloader
    sizes = [getattr(part, "batch_size", None) for part in (loader, getattr(loader, "batch_sampler", None))]
    values: list[object] = [id(loader), *sizes, trainer.accumulate_grad_batches, trainer.num_training_batches]
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            values += [_number(group.get(key)) for key in CHANGING]
    return tuple(values)


def _number(value: object) -> object:
    return value.item() if isinstance(value, torch.Tensor) else value  # a tensor is changed in place


def _loader(trainer: Trainer) -> Any:
    loaders = trainer.train_dataloader
    if loaders is None:
        raise ValueError(
            "Expected a training dataloader, but the Trainer has none: noise scale and advice can be"
            " read during `trainer.fit` only."
        )
    flat = list(_flatten(loaders))
    if len(flat) != 1:
        raise ValueError(
            f"Expected one training dataloader, but got a collection of {len(flat)}: examples per step"
            " and size of the training set are then not one number each. Combine the data sets into one"
            " DataLoader, or remove the callback."
        )
    return flat[0]


def _flatten(loaders: Any) -> Iterator[Any]:
    """The loaders in the collections that a CombinedLoader accepts."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if not isinstance(loaders, (list, tuple)):
        yield loaders
        return
    for loader in loaders:
        yield from _flatten(loader)


def _loader_batch_size(loader: Any) -> int:
    batch_size = getattr(loader, "batch_size", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_size is None and batch_sampler is not None:
        batch_size = getattr(batch_sampler, "batch_size", None)
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or int(batch_size) < 1:
        found = "" if batch_sampler is None else f" and a {type(batch_sampler).__name__} without `batch_size`"
        raise ValueError(
            "Expected the training dataloader to have a `batch_size`, but got"
            f" {type(loader).__name__}(batch_size={batch_size!r}){found}. Pass `batch_size=` to the"
            " DataLoader in place of batching inside the dataset, or give its batch sampler an"
            " attribute `batch_size` with the number of examples per batch."
        )
    return int(batch_size)


def _dataset_size(loader: Any, trainer: Trainer, given: int | None) -> tuple[int, list[str]]:
    """N and the notes on it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", getattr(loader, "sampler", None))
    notes = []
    if isinstance(sampler, WeightedRandomSampler) or (
        isinstance(sampler, RandomSampler) and sampler.replacement
    ):
        notes.append(
            f"{type(sampler).__name__} draws with replacement: the -1 in g = lr (N/B - 1)/(1 - m) is"
            " for drawing without, so the true noise scale is larger than the one shown by the factor"
            " 1/(1 - B/N)."
        )
    if given is not None:
        return given, notes
    counted = _counted(loader, sampler, trainer)
    if counted is None and isinstance(sampler, SubsetRandomSampler):
        return len(sampler), notes
    # Under a distributed strategy Lightning wraps a custom sampler: its length is then that of the sampler's
    # whole draw, and elsewhere the whole training set's.
    source = sampler.dataset if isinstance(sampler, DistributedSampler) else getattr(loader, "dataset", None)
    whole = _length(source)
    examples = whole if counted is None else counted.reached
    notes += _partial_draw(sampler, whole, examples)
    if counted is not None and counted.reached < counted.drawn:
        notes.append(
            f"An epoch stops after {trainer.num_training_batches} batches and does not shuffle: the"
            f" {counted.reached} of {counted.drawn} examples that it reaches count as the training set."
        )
    # Lightning sets this attribute without declaring it.
    overfit_batches = getattr(trainer, "overfit_batches", 0)
    if overfit_batches and examples == whole:
        notes.append(
            f"`overfit_batches={overfit_batches}` trains on a part of the {examples} examples"
            " that count as the size of the training set here."
        )
    if _replicas(trainer) > 1 and not isinstance(sampler, DistributedSampler):
        notes.append(
            f"The replicas draw without a DistributedSampler: {examples} examples, what one of them"
            " sees, count as the size of the training set."
        )
    return examples, notes


def _partial_draw(sampler: Any, whole: int, examples: int) -> list[str]:
    """A note where somebody's own sampler draws another number of examples than the dataset holds."""
    draws = _known_length(sampler)
    if isinstance(sampler, KNOWN_SAMPLERS) or draws is None or draws == whole:
        return []
    return [
        f"{type(sampler).__name__} draws {draws} examples an epoch from a dataset of {whole}, of which {examples}"
        " are taken as the training set; `SGDNoiseScale(dataset_size=...)` takes another size."
    ]


@dataclass(frozen=True)
class _Counted:
    """Examples that a loader draws, each once.

    Attributes:
        drawn: without a limit on the batches of an epoch.
        reached: within that limit.
    """

    drawn: int
    reached: int


# What was counted for a loader, and what the count depends on beside it. Counting can take a pass over a
# sampler, and the configuration is read at every step.
_counts: WeakKeyDictionary[DataLoader[Any], tuple[tuple[object, ...], _Counted | None]] = WeakKeyDictionary()


def _counted(loader: Any, sampler: Any, trainer: Trainer) -> _Counted | None:
    """The count that `LaplaceEvidence` takes; None for other loaders, and where it cannot be taken."""
    if not isinstance(loader, DataLoader):
        return None
    depends_on = (
        _known_length(loader.dataset),
        _known_length(sampler),
        trainer.num_training_batches,
        _replicas(trainer),
        trainer.fast_dev_run,  # type: ignore[attr-defined] # set without being declared
    )
    known = _counts.get(loader)
    if known is None or known[0] != depends_on:
        known = _counts[loader] = depends_on, _count(loader, trainer)
    return known[1]


def _count(loader: DataLoader[Any], trainer: Trainer) -> _Counted | None:
    # Somebody's own sampler is read, and may draw random numbers, which training must not miss.
    known = isinstance(getattr(loader.batch_sampler, "sampler", None), KNOWN_SAMPLERS)
    with nullcontext() if known else isolated(loader.batch_sampler):
        try:
            drawn = reached = examples_from_loader(loader, None, None).num_examples
            # A rehearsal of the code by `fast_dev_run` is to say what the run will say.
            limit = None if trainer.fast_dev_run else num_batches(trainer, loader)  # type: ignore[attr-defined]
            if limit is not None:
                reached = examples_from_loader(loader, None, None, limit).num_examples
        except Exception:  # whatever a sampler of somebody's own does when it is copied and read
            return None
    return _Counted(drawn, reached)


def _length(dataset: Any) -> int:
    examples = _known_length(dataset) or 0
    if examples < 1:
        raise ValueError(
            f"Expected a training set with a length of at least 1, but got {type(dataset).__name__}"
            " without one. Pass the number of training examples as `dataset_size=` where the callback"
            " takes it (SGDNoiseScale), or give the dataset a `__len__`."
        )
    return examples


def _known_length(collection: Any) -> int | None:
    try:
        return len(collection)
    except (TypeError, NotImplementedError):
        return None


def _replicas(trainer: Trainer) -> int:
    # Not the world size: under tensor parallelism several processes work on the same examples.
    kwargs: Mapping[str, Any] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return max(1, int(kwargs.get("num_replicas", 1)))


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


def _groups(name: str, optimizer: Any, batch_size: int, examples: int) -> list[ParameterGroup]:
    if isinstance(optimizer, NEITHER):
        raise ValueError(
            "Neither the SGD noise scale nor Adam's square-root rule describes"
            f" {type(optimizer).__name__}. Remove the callback, or train with SGD or an Adam-like optimizer."
        )
    read = _adam_configuration if is_adaptive(optimizer) else _sgd_configuration
    groups = optimizer.param_groups
    found = []
    for index, group in enumerate(groups, start=1):
        if "lr" not in group:
            raise ValueError(
                f"Expected the parameter groups of {type(optimizer).__name__} to have an `lr`, but got"
                f" {sorted(map(str, group))}. Remove the callback: without a learning rate there is no"
                " noise scale."
            )
        label = group.get("name", f"pg{index}" if len(groups) > 1 else None)
        full_name = name if label is None else f"{name}/{label}"
        found.append(ParameterGroup(full_name, read(group, batch_size, examples)))
    return found


def is_adaptive(optimizer: Any) -> bool:
    """Whether an optimizer is Adam-like: one of torch's, or another with `betas` and no `momentum`."""
    if isinstance(optimizer, ADAPTIVE):
        return True
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    return not isinstance(optimizer, SGD) and "betas" in group and "momentum" not in group


def _sgd_configuration(group: Mapping[str, Any], batch_size: int, examples: int) -> Configuration:
    momentum = float(group.get("momentum", 0.0))
    # torch.optim.SGD applies dampening in the momentum buffer only: it ignores it where there is none.
    dampening = float(group.get("dampening", 0.0)) if momentum > 0 else 0.0
    return Configuration(float(group["lr"]), batch_size, examples, momentum, dampening)


def _adam_configuration(group: Mapping[str, Any], batch_size: int, examples: int) -> AdamConfiguration:
    # The decay rates are `betas` in Adam, `alpha` in RMSprop, `rho` in Adadelta; Adagrad has none.
    single = tuple(float(group[key]) for key in ("alpha", "rho") if key in group)
    betas = tuple(float(beta) for beta in group["betas"]) if "betas" in group else single
    eps = group.get("eps", 0.0)
    return AdamConfiguration(float(group["lr"]), batch_size, betas, float(eps), examples)


def _optimizer_notes(optimizer: Any) -> list[str]:
    kind = type(optimizer).__name__
    if isinstance(optimizer, (SGD, *ADAPTIVE)):
        return []
    if is_adaptive(optimizer):
        return [f"{kind} is not an optimizer of torch.optim; having `betas`, it is taken to be Adam-like."]
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    momentum = (
        "SGD with momentum" if "momentum" in group else "SGD without momentum, since it has no `momentum`"
    )
    return [
        f"{kind} is not torch.optim.SGD; it is taken to be {momentum}. If it rescales gradients by"
        " their size, do not believe the noise scale."
    ]
