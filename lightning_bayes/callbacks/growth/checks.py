"""What `BatchSizeScheduler` refuses and what it says."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bayes.advice.optimizer_groups import is_adaptive
from lightning_bayes.callbacks.trainer.checks import check_automatic_optimization
from lightning_bayes.callbacks.trainer.module_reader import is_named
from lightning_bayes.callbacks.trainer.restore import untouched
from lightning_bayes.callbacks.trainer.settings import Sizes
from lightning_bayes.callbacks.trainer.training_loss import TrainingLoss
from lightning_bayes.functional import BatchGrowth
from lightning_bayes.functional.scaling import Rule


def check_alone(callback: Callback, trainer: Trainer) -> None:
    """Raise a ValueError for a second callback that sets how many batches a step takes."""
    for other in trainer.callbacks:  # type: ignore[attr-defined] # set without being declared
        sets_it = is_named(other, "GradientAccumulationScheduler", "BatchSizeScheduler")
        if sets_it and other is not callback:
            raise ValueError(
                f"Expected BatchSizeScheduler to be alone in setting the batch size, but got {type(other).__name__}"
                " beside it. Remove one of them; `Trainer(accumulate_grad_batches=...)` sets the batch size to start"
                " with."
            )


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Raise a ValueError for ways to train that leave BatchSizeScheduler no hold on the batch."""
    check_automatic_optimization(module, "BatchSizeScheduler", ".grow_batch")
    if is_named(trainer.strategy, "DeepSpeedStrategy"):
        raise ValueError(
            f"BatchSizeScheduler cannot change how many batches {type(trainer.strategy).__name__} accumulates: its"
            " engine fixes that at the start. Use another strategy."
        )


def check_mean_loss(trainer: Trainer, module: LightningModule) -> None:
    """Raise a ValueError for a summed loss: its gradient grows with the loader's batch, as ε would.

    A loss that cannot be read is taken to be a mean.
    """
    with untouched(trainer), torch.enable_grad():
        try:
            loss = TrainingLoss(trainer, module, None, None, None, 1)
            reduction = loss.reader.read(loss.batches[0], 0).reduction
        except ValueError:
            return
    if reduction == "sum":
        raise ValueError(
            'Expected a loss that is a mean over the batch with method="reload", but got a sum: from a batch k times'
            " as large its gradient is k times as large, which undoes the growth. Use the mean, or"
            ' method="accumulate".'
        )


def check_schedulers(trainer: Trainer, reloads: bool) -> None:
    """Raise a ValueError where there is no learning-rate decay to read, or not in time."""
    configs = trainer.lr_scheduler_configs
    if not configs:
        raise ValueError(
            'Expected a learning-rate scheduler with BatchSizeScheduler("lr_scheduler"), but `configure_optimizers`'
            " returned none. Return one, or list the epochs: BatchSizeScheduler([30, 60], factor=5)."
        )
    if reloads and any(config.reduce_on_plateau for config in configs):
        raise ValueError(
            "Expected a learning-rate scheduler that decides before the next loader is made, but got"
            ' ReduceLROnPlateau with method="reload". Use method="accumulate".'
        )


def warnings_at_start(trainer: Trainer, rule: Rule) -> list[str]:
    """What is allowed, and may not be meant."""
    warnings = []
    if trainer.max_steps not in (None, -1):
        warnings.append(
            f"`max_steps={trainer.max_steps}` counts optimizer steps, of which an epoch has fewer as the batch"
            " grows: the run sees more examples. `max_epochs` keeps it as long as it was."
        )
    names = sorted({type(optimizer).__name__ for optimizer in trainer.optimizers if is_adaptive(optimizer)})
    if names and rule != "sqrt":
        warnings.append(
            f"{' and '.join(names)} with rule={rule!r}: k times the batch for a learning rate divided by k, as Smith"
            ' et al. did with Adam too. By the SDE of Malladi et al. it is k squared times: rule="sqrt".'
        )
    if rule == "sqrt" and len(names) == 0:
        warnings.append(
            'rule="sqrt" is for Adam-like optimizers; the noise of SGD is kept by "linear" or "exact".'
        )
    return warnings


def describe(
    trainer: Trainer, start: Sizes, plans: Mapping[int, BatchGrowth] | None, log_key_prefix: str
) -> str:
    """What becomes of batches, learning rates and the number of optimizer steps.

    Args:
        trainer: that is fitting.
        start: the sizes at the first step.
        plans: the batch from each milestone on; None for the decays of the user's own schedulers.
        log_key_prefix: of the keys that show them.
    """
    if plans is None:
        kinds = sorted({type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs})
        names = " and ".join(kinds)
        return (
            f"the decays of {names} become larger batches. LearningRateMonitor shows what {names} asks for,"
            f" `{log_key_prefix}learning_rate` what is used, `{log_key_prefix}batch_size` the examples of a step."
        )
    phases = [f"B = {start.batch_size}"]
    for epoch, plan in plans.items():
        left = 1 / plan.learning_rate_factor
        remainder = "" if math.isclose(left, 1) else f" with the learning rate / {left:.4g}"
        phases.append(f"{plan.batch_size} from epoch {epoch}{remainder}")
    return f"{', '.join(phases)}.{_steps(trainer, start, plans)}"


def _steps(trainer: Trainer, start: Sizes, plans: Mapping[int, BatchGrowth]) -> str:
    epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
    if epochs < 0 or math.isinf(batches):
        return ""
    before = math.ceil(batches / start.accumulation) * epochs
    firsts = [0, *(min(epoch, epochs) for epoch in plans)]
    divisors = [
        start.accumulation,
        *(plan.batch_size / start.batch_size * start.accumulation for plan in plans.values()),
    ]
    lasts = [*firsts[1:], epochs]
    after = sum(
        math.ceil(batches / divisor) * (last - first)
        for first, last, divisor in zip(firsts, lasts, divisors, strict=True)
    )
    return f" {after} optimizer steps in {epochs} epochs, in place of {before}."
