"""What callbacks refuse, or warn of: wrong arguments, and ways to train that they cannot read."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_bayes.callbacks.trainer.module_reader import is_named
from lightning_bayes.capture.loss import WAY_OUT
from lightning_bayes.priors.prior import PriorPrecision
from lightning_bayes.priors.subset import Subset

AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")
"""Callbacks, by the names of their classes, that save other weights than those that are trained."""
SHARDING_STRATEGIES = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


def with_way_out(error: Exception, way_out: str) -> str:
    """The text of an error, with another way out than the one that `LaplaceEvidence` has."""
    return str(error).replace(WAY_OUT, way_out).strip()


def check_named_parts(
    network: nn.Module, subset_of_weights: Subset = "all", prior_precision: PriorPrecision = "auto"
) -> None:
    """Raise a ValueError for an argument that names parameters that the network does not have."""
    names = [name for name, _ in network.named_parameters()]
    if not names:  # they are built later, or there are none: the first batch tells
        return
    patterns = [] if isinstance(subset_of_weights, str) else list(subset_of_weights)
    keys = list(prior_precision) if isinstance(prior_precision, Mapping) else []
    given = {"subset_of_weights": patterns, "prior_precision": keys}
    for argument, those in given.items():
        idle = [pattern for pattern in those if not any(fnmatchcase(name, pattern) for name in names)]
        if idle:
            raise ValueError(
                f"Expected argument `{argument}` to name parameters of {type(network).__name__}, got {idle}, which "
                f"match none. Its parameters are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            )


def check_not_sharded(trainer: Trainer, who: str, what: str, remedy: str) -> None:
    """Raise a ValueError where no process has whole weights or gradients.

    Args:
        trainer: that is fitting.
        who: the name of the callback.
        what: it reads.
        remedy: beside another strategy.
    """
    if is_named(trainer.strategy, *SHARDING_STRATEGIES):
        raise ValueError(
            f"{who} cannot read {what} that {type(trainer.strategy).__name__} shards. Use strategy='ddp' or a single "
            f"device, or {remedy}."
        )


def check_automatic_optimization(module: LightningModule, who: str, function: str = "") -> None:
    """Raise a ValueError for a module that steps its optimizers itself.

    Args:
        module: in training.
        who: needs to know the steps.
        function: of `lightning_bayes.functional`, that its training_step may call in place of the callback.
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"{who} needs automatic optimization, but the LightningModule sets `automatic_optimization = False`: "
            "when it steps, and on which gradients and how many examples, is then known to it alone. Remove the "
            f"callback and use `lightning_bayes.functional{function}` inside `training_step`."
        )


def warn_of_averages(trainer: Trainer) -> None:
    """Say so where other weights are saved, or left at the end, than those that are scored."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # set without being declared
    averaging = [type(callback).__name__ for callback in callbacks if is_named(callback, *AVERAGING)]
    if averaging:
        rank_zero_warn(
            f"LaplaceEvidence: {averaging[0]} averages weights, and the evidence of each epoch is that of the "
            "weights that are trained, not of the average that is saved or left at the end: a ModelCheckpoint on it "
            "ranks other weights than it saves. For the evidence of the average call laplace_evidence() on it "
            "after fit."
        )
