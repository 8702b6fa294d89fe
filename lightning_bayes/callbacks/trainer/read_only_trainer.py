"""The Trainer as a copy of a LightningModule sees it."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_bayes.capture.loss import WAY_OUT


class ReadOnlyTrainer:
    """What a copied training_step sees as its Trainer: every attribute to read, none to set, no logger."""

    def __init__(self, trainer: Trainer) -> None:
        object.__setattr__(self, "_read_only_trainer", trainer)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that isinstance(self.trainer, Trainer) holds
        return type(self._read_only_trainer)

    @property
    def logger(self) -> DummyLogger | None:
        """One that logs nothing, where the Trainer has one."""
        return None if self._read_only_trainer.logger is None else DummyLogger()

    @property
    def loggers(self) -> list[DummyLogger]:
        """As many as the Trainer has."""
        return [DummyLogger() for _ in self._read_only_trainer.loggers]

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_read_only_trainer"), name)

    def __setattr__(self, name: str, value: object) -> None:
        raise ValueError(
            f"training_step sets trainer.{name}; it is run on a copy, and must not. Set it in "
            f"another hook, such as on_train_batch_end. {WAY_OUT}"
        )
