"""What the noise of gradients cannot be measured on."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from torch.optim import LBFGS

from lightning_bayes.callbacks.trainer.inputs import SHARDING_STRATEGIES, step_batch_size
from lightning_bayes.callbacks.trainer.module_reader import num_examples_of

GradientMethod = Literal["auto", "per_example", "micro_batches", "split_batch"]


def check_choices(method: object, per_layer: object) -> None:
    """Raise a ValueError for arguments of `GradientNoiseScale` that are none of the choices."""
    methods = get_args(GradientMethod)
    if method not in methods:
        raise ValueError(
            f"Expected argument `method` to be one of {', '.join(map(repr, methods))}, but got {method!r}."
        )
    if not isinstance(per_layer, bool):
        raise ValueError(f"Expected argument `per_layer` to be True or False, but got {per_layer!r}.")


def check_gradients_can_be_read(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise a ValueError for ways to train whose gradients cannot be read."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            "GradientNoiseScale needs automatic optimization, but the LightningModule sets"
            " `automatic_optimization = False`: which gradients make a step is then known to it alone. Remove the"
            " callback and use `lightning_bayes.functional.gradient_noise_scale` inside `training_step`."
        )
    # By name: the strategies of `lightning` and of `pytorch_lightning` are different classes.
    if any(base.__name__ in SHARDING_STRATEGIES for base in type(trainer.strategy).__mro__):
        raise ValueError(
            f"GradientNoiseScale cannot read gradients that {type(trainer.strategy).__name__} shards. Use"
            " strategy='ddp' or a single device, or remove the callback."
        )
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(
            "GradientNoiseScale cannot read LBFGS, which takes several gradients for one step and has no batch size"
            " to advise on. Use another optimizer, or remove the callback."
        )


def check_several_micro_batches(trainer: Trainer) -> None:
    """Raise a ValueError if a step has one micro-batch only."""
    if num_micro_batches(trainer) < 2:
        raise ValueError(
            'Expected method="micro_batches" to find two micro-batches or more in a step, but got'
            ' accumulate_grad_batches=1 in one process. Use method="per_example", accumulate_grad_batches=2 or more,'
            " or several devices."
        )


def check_batch_size(trainer: Trainer, batch: Any) -> None:
    """Raise a ValueError if batches hold one example each, and there is nothing to compare it with."""
    if num_examples_of(batch) == 1 and step_batch_size(trainer) == 1 and trainer.world_size == 1:
        if trainer.num_training_batches == 1:
            raise ValueError(
                "GradientNoiseScale needs several examples, since one gradient has no spread, but an epoch has one, "
                "in a batch of its own. Leave GradientNoiseScale out of this run."
            )
        raise ValueError(
            "GradientNoiseScale needs batches of 2 examples or more, since one gradient has no spread, but got"
            " batch_size=1. Use larger batches, or accumulate_grad_batches of 2 or more with"
            ' method="micro_batches".'
        )


def num_micro_batches(trainer: Trainer) -> int:
    """Gradients that an optimizer step is the mean of: micro-batches of all replicas."""
    return trainer.accumulate_grad_batches * trainer.world_size
