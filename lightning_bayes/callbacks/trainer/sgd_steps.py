"""How the optimizers of a Trainer step, where they are SGD."""

from collections.abc import Iterator
from inspect import unwrap
from typing import Any

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import SGD

from lightning_bayes.callbacks.trainer.settings import is_adaptive, learning_rate_in_step
from lightning_bayes.loss_curvature.stability_reading import SGDStep
from lightning_bayes.priors.prior import trainable_names


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


def names_of_groups(trainer: Trainer, network: nn.Module) -> dict[str, int]:
    """The trainable parameters of a network that an optimizer holds, and the number of their group.

    Raises:
        ValueError: If there is none.
    """
    group_of = {
        parameter: index for index, group in enumerate(_groups(trainer)) for parameter in group["params"]
    }
    named = dict(network.named_parameters())
    return {name: group_of[named[name]] for name in trainable_names(network, group_of)}


def _groups(trainer: Trainer) -> Iterator[dict[str, Any]]:
    return (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
