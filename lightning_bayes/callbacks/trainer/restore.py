"""Takes back what somebody's training_step does to a Trainer while it is only being read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_bayes.capture.isolation import isolated


@contextmanager
def untouched(trainer: Trainer) -> Iterator[None]:
    """Leave the Trainer as it was, whatever a training_step on a copy of the module does within.

    Random states (`isolated`), the hyper-parameters of optimizers, learning-rate schedulers, the Trainer's
    metrics, and the attributes of the datamodule and the training dataset are restored. What these
    attributes hold is not copied: a list that the dataset appends to has grown.
    """
    datamodule = getattr(trainer, "datamodule", None)
    loader = trainer.train_dataloader
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = [{key: _copy(value) for key, value in group.items() if key != "params"} for group in groups]
    # Optimizers are not among the attributes that a scheduler is restored by: its state_dict leaves them out.
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    states = [dict(scheduler.state_dict()) for scheduler in schedulers]
    holders = [
        thing for thing in (datamodule, getattr(loader, "dataset", None)) if hasattr(thing, "__dict__")
    ]
    attributes = [dict(vars(holder)) for holder in holders]
    metrics: list[dict[str, Any]] = [trainer.callback_metrics, trainer.logged_metrics]
    values = [dict(metric) for metric in metrics]
    try:
        with isolated(loader, datamodule):
            yield
    finally:
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for holder, attribute in zip(holders, attributes, strict=True):
            vars(holder).clear()
            vars(holder).update(attribute)
        for metric, value in zip(metrics, values, strict=True):
            metric.clear()
            metric.update(value)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
