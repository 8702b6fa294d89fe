"""What the optimizers of a Trainer say: which parameters they hold, their weight decay as a prior, steps of SGD."""

from collections.abc import Collection
from inspect import unwrap
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import SGD

from lightning_bayes.advice.optimizer_groups import is_adaptive
from lightning_bayes.callbacks.trainer.settings import learning_rate_in_step
from lightning_bayes.loss_curvature.stability_reading import SGDStep
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


def names_of_groups(trainer: Trainer, network: nn.Module) -> dict[str, int]:
    """The trainable parameters of a network that an optimizer holds, and the number of their group.

    Raises:
        ValueError: If there is none.
    """
    group_of = {p: index for index, group in enumerate(_groups(trainer)) for p in group["params"]}
    named = dict(network.named_parameters())
    return {name: group_of[named[name]] for name in trainable_names(network, group_of)}


def prior_of(
    trainer: Trainer,
    network: nn.Module,
    prior_precision: PriorPrecision,
    subset: Subset,
    last_layer: Collection[str] | None,
) -> Prior:
    """The prior that was asked for, or under "auto" the one that the optimizer's weight decay is.

    Where all weight decay is zero, "auto" is "optimize". Only parameters that an optimizer holds count.

    Args:
        trainer: Read only.
        network: That the user trains.
        prior_precision: As asked for.
        subset: Patterns of the names of the parameters that take part, or a word.
        last_layer: Names of its parameters, where that alone takes part.

    Raises:
        ValueError: If no parameter has a proper prior, or patterns do not fit the parameters.
    """
    group_of = names_of_groups(trainer, network)
    names = last_layer if isinstance(subset, str) else matching(group_of, subset)
    if prior_precision not in ("auto", "optimize_per_group"):
        named = dict(network.named_parameters())
        return prior_from(network, prior_precision, [named[name] for name in group_of], names)
    if names is not None:
        group_of = {name: index for name, index in group_of.items() if name in names}
    if prior_precision == "optimize_per_group":
        return optimized_prior(group_of)
    groups = _groups(trainer)
    decays = {name: float(groups[index].get("weight_decay", 0.0)) for name, index in group_of.items()}
    if not any(decays.values()):
        return optimized_prior(dict.fromkeys(decays, "all"))
    return weight_decay_prior(decays)


def announce_prior(
    trainer: Trainer, network: nn.Module, prior_precision: PriorPrecision, subset: Subset, prior: Prior
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
    if prior_precision == "auto" and any(map(_is_decoupled, trainer.optimizers)):
        rank_zero_warn(
            "LaplaceEvidence: decoupled weight decay (AdamW) is not a Gaussian prior; λ = N·weight_decay is an "
            "approximation. Give prior_precision= to choose the prior yourself."
        )


def why_not_sgd(trainer: Trainer) -> str | None:
    """Why the edge of stability of SGD is not that of the optimizer; None where it is.

    Raises:
        ValueError: If the optimizer climbs.
    """
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(
                f"Stability is that of going down a loss, but {name} was given maximize=True. Return the "
                "negative loss from training_step in its place."
            )
        if is_adaptive(optimizer):
            return (
                f"{name} divides each gradient by its own size, so it steps in another geometry than that of the "
                "Hessian, and 2(1 + m)/h is not its edge of stability"
            )
        # torch wraps `step` at the first use of a class. A subclass with a step of its own (LARS) is another.
        if not isinstance(optimizer, SGD) or unwrap(type(optimizer).step) is not unwrap(SGD.step):
            return f"{name} is not torch.optim.SGD, and where it becomes unstable is not known here"
    return None


def sgd_steps(trainer: Trainer) -> list[SGDStep]:
    """The present settings of each parameter group, in the order of `names_of_groups`."""
    in_step = learning_rate_in_step(trainer)
    return [_step(group, in_step(group)) for group in _groups(trainer)]


def _step(group: dict[str, Any], learning_rate: float) -> SGDStep:
    names = ("momentum", "dampening", "nesterov", "weight_decay")
    try:
        momentum, dampening, weight_decay = (float(group[names[i]]) for i in (0, 1, 3))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        settings = {name: group.get(name) for name in names}
        raise ValueError(
            f"The settings of a parameter group of SGD cannot be read as numbers: {settings} ({error}). Leave"
            " Stability out, or give the group those of torch.optim.SGD."
        ) from error
    # torch.optim.SGD applies dampening in the momentum buffer only: it ignores it where there is none.
    return SGDStep(
        learning_rate=learning_rate,
        momentum=momentum,
        dampening=dampening if momentum else 0.0,
        nesterov=bool(group["nesterov"]),
        weight_decay=weight_decay,
    )


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _is_decoupled(optimizer: Any) -> bool:
    """Whether an optimizer decays weights beside the gradient, as AdamW does."""
    decayed = any(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
    named_so = type(optimizer).__name__.startswith(DECOUPLED)
    return bool(decayed and (named_so or optimizer.defaults.get("decoupled_weight_decay", False)))
