"""What the evidence takes from a Trainer: the training set, the prior, and what it cannot take."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_bayes.callbacks.trainer.module_reader import NetworkOption, original_network
from lightning_bayes.capture.examples import Examples, examples_from_loader
from lightning_bayes.capture.loss import WAY_OUT
from lightning_bayes.functional._validation import count, positive, string
from lightning_bayes.likelihoods import resolve_likelihood
from lightning_bayes.priors.prior import (
    Prior,
    PriorPrecision,
    optimized_prior,
    prior_from,
    trainable_names,
    weight_decay_prior,
)
from lightning_bayes.priors.subset import Subset, matching

DECOUPLED = ("AdamW", "Adafactor", "Lion", "Muon", "SGDW")
"""How the names of optimizers begin that decay weights beside the gradient."""
AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")
"""Callbacks, by the names of their classes, that save other weights than those that are trained."""
SHARDING_STRATEGIES = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


def examples_of(
    trainer: Trainer, batch_size: int | None, max_examples: int | None, mixed: bool = False
) -> Examples:
    """The training set of a Trainer that is fitting.

    Args:
        trainer: Read only.
        batch_size: See `examples_from_loader`.
        max_examples: See `examples_from_loader`.
        mixed: See `examples_from_loader`.

    Raises:
        ValueError: If there is not one DataLoader whose examples can be counted.
    """
    loader, wrapped = training_loader(trainer)
    check_stream(trainer, loader)
    at_most = max_examples
    if trainer.fast_dev_run:  # type: ignore[attr-defined] # a rehearsal of the code, not of the sums
        at_most = min(at_most or 32, 32)
    examples = examples_from_loader(loader, batch_size, at_most, num_batches(trainer, loader), mixed)
    if loader is trainer.train_dataloader:
        return examples
    return replace(examples, read=lambda: _Wrapped(examples.read(), wrapped))


class _Wrapped:
    """The batches of a loader, each in the collection that the loader came in."""

    def __init__(self, loader: Any, wrapped: Callable[[Any], Any]) -> None:
        self._loader, self._wrapped = loader, wrapped

    def __iter__(self) -> Iterator[Any]:
        return map(self._wrapped, self._loader)

    @property
    def batch_sampler(self) -> Any:
        return self._loader.batch_sampler


def training_loader(trainer: Trainer) -> "tuple[DataLoader[Any], Callable[[Any], Any]]":
    """The one loader of a Trainer, and what makes of its batch the batch that training_step gets.

    A loader in a list or a mapping, which may be nested, comes as a batch in a list or a mapping.

    Raises:
        ValueError: If there is not one torch DataLoader.
    """
    loaders: Any = trainer.train_dataloader
    keys: list[Any] = []
    while isinstance(loaders, Mapping | list | tuple) and len(loaders) == 1:
        keys.append(next(iter(loaders)) if isinstance(loaders, Mapping) else None)
        loaders = loaders[keys[-1]] if isinstance(loaders, Mapping) else loaders[0]
    if not isinstance(loaders, DataLoader):
        got = type(loaders).__name__
        if isinstance(loaders, Mapping | list | tuple):
            got = f"a collection of {len(loaders)}"
        raise ValueError(
            f"LaplaceEvidence and Stability need one torch DataLoader for training, got {got}. They speak of one "
            "training set: give fit() a single DataLoader, or leave the callback out and call laplace_evidence() on "
            "a loader of your choice after training."
        )

    def wrapped(batch: Any) -> Any:
        for key in reversed(keys):
            batch = [batch] if key is None else {key: batch}
        return batch

    return loaders, wrapped


def check_named_parts(
    module: LightningModule,
    network: NetworkOption,
    subset_of_weights: Subset = "all",
    prior_precision: PriorPrecision = "auto",
) -> None:
    """Raise a ValueError for an argument that names a submodule or parameters that the module does not have."""
    target = original_network(module, network)
    names = [name for name, _ in target.named_parameters()]
    if not names:  # they are built later, or there are none: the first batch tells
        return
    patterns = [] if isinstance(subset_of_weights, str) else list(subset_of_weights)
    given = {"subset_of_weights": patterns}
    given["prior_precision"] = list(prior_precision) if isinstance(prior_precision, Mapping) else []
    for argument, those in given.items():
        idle = [pattern for pattern in those if not any(fnmatchcase(name, pattern) for name in names)]
        if idle:
            raise ValueError(
                f"Expected argument `{argument}` to name parameters of {type(target).__name__}, got {idle}, which "
                f"match none. Its parameters are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            )


def warn_of_averages(trainer: Trainer) -> None:
    """Say so where other weights are saved, or left at the end, than those that are scored."""
    averaging = [
        type(callback).__name__
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if any(base.__name__ in AVERAGING for base in type(callback).__mro__)
    ]
    if averaging:
        rank_zero_warn(
            f"LaplaceEvidence: {averaging[0]} averages weights, and the evidence of each epoch is that of the "
            "weights that are trained, not of the average that is saved or left at the end: a ModelCheckpoint on it "
            "ranks other weights than it saves. For the evidence of the average call laplace_evidence() on it "
            "after fit."
        )


def check_stream(trainer: Trainer, loader: "DataLoader[Any]") -> None:
    """Refuse a stream that several processes read: whether each reads all of it or a shard cannot be told.

    Raises:
        ValueError: If it is so.
    """
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    if isinstance(loader.dataset, IterableDataset) and replicas > 1:
        raise ValueError(
            f"{type(loader.dataset).__name__} is an IterableDataset that {replicas} processes read, and what one "
            "sees of it may be all examples or a shard: N cannot be told. Give fit() a map-style dataset, which "
            "Lightning shards itself, or call laplace_evidence() on a loader of the whole stream after training."
        )


def num_batches(trainer: Trainer, loader: "DataLoader[Any]") -> int | None:
    """Batches of all replicas that `overfit_batches` or `limit_train_batches` leave of an epoch; None for all."""
    if isinstance(loader.dataset, IterableDataset) or trainer.num_training_batches >= len(loader):
        return None
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    return int(trainer.num_training_batches) * int(replicas)


def step_batch_size(trainer: Trainer) -> int | None:
    """Examples of one training_step, None where a batch sampler of the user's own does not say."""
    loader, _ = training_loader(trainer)
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)


def prior_of(
    trainer: Trainer,
    network: nn.Module,
    prior_precision: PriorPrecision,
    subset: Collection[str] | None = None,
) -> Prior:
    """The prior that was asked for, or under "auto" the one that the optimizer's weight decay is.

    Where all weight decay is zero, "auto" is "optimize". Only parameters that an optimizer holds count, and
    of these only `subset` where it is given.

    Raises:
        ValueError: If no parameter has a proper prior, or patterns do not fit the parameters.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    group_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
    if prior_precision not in ("auto", "optimize_per_group"):
        return prior_from(network, prior_precision, group_of, subset)
    named = dict(network.named_parameters())
    its_group = {name: group_of[named[name]] for name in trainable_names(network, group_of)}
    if subset is not None:
        its_group = {name: index for name, index in its_group.items() if name in subset}
    if prior_precision == "optimize_per_group":
        return optimized_prior(its_group)
    decays = {name: float(groups[index].get("weight_decay", 0.0)) for name, index in its_group.items()}
    if not any(decays.values()):
        return optimized_prior(dict.fromkeys(decays, "all"))
    return weight_decay_prior(decays)


def subset_of(trainer: Trainer, network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that some optimizer holds and some pattern matches.

    Raises:
        ValueError: If a pattern matches none.
    """
    held = [
        p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
    ]
    return matching(trainable_names(network, held), patterns)


def announce_prior(
    trainer: Trainer, network: nn.Module, prior: Prior, prior_precision: PriorPrecision, subset: Subset
) -> None:
    """Say which parameters are left out and why, and what "auto" has chosen."""
    if prior.fixed_parameters:
        rank_zero_info(
            f"LaplaceEvidence: {list(prior.fixed_parameters)} have no weight decay, hence no proper prior, and are "
            "held at their values."
        )
    if prior_precision == "auto" and prior.optimized:
        rank_zero_info(
            "LaplaceEvidence: all weight decay is 0, so prior_precision='auto' is 'optimize': one λ for all "
            "parameters, which maximises the log-evidence at the weights of each epoch."
        )
    known = {*prior.strengths, *prior.fixed_parameters}
    left_out = [name for name, _ in network.named_parameters() if name not in known]
    if left_out:
        outside = "" if subset == "all" else ", or outside subset_of_weights"
        rank_zero_info(f"LaplaceEvidence: {left_out} are left out: frozen, or in no optimizer{outside}.")
    if prior_precision == "auto" and any(is_decoupled(optimizer) for optimizer in trainer.optimizers):
        rank_zero_warn(
            "LaplaceEvidence: decoupled weight decay (AdamW) is not a Gaussian prior; λ = N·weight_decay is an "
            "approximation. Give prior_precision= to choose the prior yourself."
        )


def is_decoupled(optimizer: Any) -> bool:
    """Whether an optimizer decays weights beside the gradient, as AdamW does."""
    decayed = any(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
    named_so = type(optimizer).__name__.startswith(DECOUPLED)
    return bool(decayed and (named_so or optimizer.defaults.get("decoupled_weight_decay", False)))


def check_trainer(
    trainer: Trainer, pl_module: LightningModule, network: NetworkOption, who: str = "LaplaceEvidence"
) -> None:
    """Raise a ValueError for ways to train whose weights or loss cannot be read."""
    # By name: the strategies of `lightning` and of `pytorch_lightning` are different classes.
    if any(base.__name__ in SHARDING_STRATEGIES for base in type(trainer.strategy).__mro__):
        raise ValueError(
            f"{who} cannot read weights that {type(trainer.strategy).__name__} shards. Use "
            "strategy='ddp' or a single device, or call laplace_evidence() on a gathered checkpoint."
        )
    if network is None and not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(pl_module).__name__} optimizes manually, so running its training_step would step. "
            f"{WAY_OUT.replace('LaplaceEvidence', who)}"
        )


def check_arguments(
    likelihood: object, network: object, every_n_epochs: object, max_overhead: object, log_key_prefix: object
) -> None:
    """Raise a ValueError for arguments of `LaplaceEvidence` that are wrong whatever the Trainer."""
    if likelihood != "auto":
        resolve_likelihood(likelihood)  # type: ignore[arg-type]
    elif network is not None:
        raise ValueError(
            "Expected argument `likelihood` to be given beside `network`: without a training_step there is no loss "
            "to read it from. Use likelihood='classification', 'binary', 'regression' or a Likelihood."
        )
    if network is not None and not isinstance(network, str) and not callable(network):
        raise ValueError(
            "Expected argument `network` to be None, the name of a submodule, or a function (module, batch) -> "
            f"(outputs, targets), got {network!r}."
        )
    count("every_n_epochs", every_n_epochs)
    if max_overhead is not None:
        positive("max_overhead", max_overhead)
    string("log_key_prefix", log_key_prefix)
