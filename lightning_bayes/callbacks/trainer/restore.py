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
    holders = [datamodule, getattr(loader, "dataset", None)]
    attributes = [vars(holder) for holder in holders if hasattr(holder, "__dict__")]
    metrics: list[dict[str, Any]] = [trainer.callback_metrics, trainer.logged_metrics]
    before = [{key: _copy(value) for key, value in group.items()} for group in groups]
    before += [dict(values) for values in (*attributes, *metrics)]
    # Optimizers are not among the attributes that a scheduler is restored by: its state_dict leaves them out.
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    states = [dict(scheduler.state_dict()) for scheduler in schedulers]
    try:
        with isolated(loader, datamodule):
            yield
    finally:
        for present, former in zip((*groups, *attributes, *metrics), before, strict=True):
            present.clear()
            present.update(former)
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
