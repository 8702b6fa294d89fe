"""A DataModule whose training loader is given larger batches, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning.pytorch import Trainer

from lightning_bayes.callbacks.trainer.settings import loader_batch_size
from lightning_bayes.capture.isolation import isolated


class GrowingLoader:
    """Lets a DataModule's `train_dataloader` see another `batch_size` than the rest of the program.

    The DataModule's own `batch_size`, as an attribute or among its hyper-parameters, is changed only while
    `train_dataloader` runs. So the loaders of validation stay as they are, and checkpoints hold the
    hyper-parameters that the user has given.

    Args:
        datamodule: has a `batch_size`.
    """

    def __init__(self, datamodule: Any) -> None:
        self.datamodule = datamodule
        self.requested: int | None = None
        self._reload_interval: int | None = None
        self._plain = datamodule.train_dataloader
        self._had_its_own = "train_dataloader" in vars(datamodule)

    def install(self) -> None:
        """Put a function around `train_dataloader`, on this DataModule alone."""
        plain = self._plain

        @wraps(plain)
        def train_dataloader(*args: Any, **kwargs: Any) -> Any:
            with self._batch_size(self.requested):
                return plain(*args, **kwargs)

        self.datamodule.train_dataloader = train_dataloader

    def remove(self) -> None:
        """Take the function away again."""
        if self._had_its_own:
            self.datamodule.train_dataloader = self._plain
        else:
            vars(self.datamodule).pop("train_dataloader", None)

    def request(self, trainer: Trainer, batch_size: int) -> None:
        """Ask for a loader with this batch size from the next epoch on; to be called at an epoch's end.

        `reload_dataloaders_every_n_epochs` is Lightning's own way: it counts the batches anew and with them where
        validation is due. It is 1 until `arrived` only, so that no other loader is made again.
        """
        self.requested = batch_size
        if self._reload_interval is None:
            self._reload_interval = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined] # set without being declared

    def arrived(self, trainer: Trainer) -> None:
        """Give the Trainer back its own interval."""
        if self._reload_interval is not None:
            trainer.reload_dataloaders_every_n_epochs = self._reload_interval  # type: ignore[attr-defined]
            self._reload_interval = None

    def check(self) -> None:
        """Ask for another batch size on trial, so that a fixed one is found out before the first step.

        Raises:
            ValueError: if `train_dataloader` does not follow `batch_size`.
        """
        present = self.requested or _batch_sizes(self.datamodule)[0]
        for wanted in (present, 2 * present):
            with self._batch_size(wanted), isolated(self.datamodule):
                loaded = loader_batch_size(self._plain())
            if loaded != wanted:
                raise ValueError(
                    f"Expected `{type(self.datamodule).__name__}.train_dataloader` to follow its `batch_size` with"
                    f' method="reload", but at batch_size={wanted} it returned a loader with {loaded} examples per'
                    ' batch. Make a new DataLoader from `self.batch_size` at each call, or use method="accumulate".'
                )

    @contextmanager
    def _batch_size(self, value: int | None) -> Iterator[None]:
        if value is None:
            yield
            return
        attribute = getattr(self.datamodule, "batch_size", None)
        hyper_parameter = self.datamodule.hparams.get("batch_size")
        try:
            self._set(None if attribute is None else value, None if hyper_parameter is None else value)
            yield
        finally:
            self._set(attribute, hyper_parameter)

    def _set(self, attribute: int | None, hyper_parameter: int | None) -> None:
        if attribute is not None:
            self.datamodule.batch_size = attribute
        if hyper_parameter is not None:
            self.datamodule.hparams["batch_size"] = hyper_parameter


def why_not_reload(trainer: Trainer) -> str | None:
    """What keeps batches from growing by another loader: a sentence, or None if nothing does."""
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        return "the training data come from no LightningDataModule, so there is no loader to make again"
    if not _batch_sizes(datamodule):
        return f"{type(datamodule).__name__} has no whole number `batch_size`, as an attribute or in its `hparams`"
    if isinstance(trainer.limit_train_batches, int) and not isinstance(trainer.limit_train_batches, bool):
        return f"`limit_train_batches={trainer.limit_train_batches}` would let an epoch grow with its batches"
    if getattr(trainer, "overfit_batches", 0):
        return "`overfit_batches` fixes the loader"
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if every is None or isinstance(interval, int) or (isinstance(interval, float) and interval != 1):
        return (
            f"`val_check_interval={interval}` is counted in whole batches, of which an epoch would have fewer:"
            " validation would not stay where it is"
        )
    return None


def _batch_sizes(datamodule: Any) -> list[int]:
    loaded = (getattr(datamodule, "batch_size", None), datamodule.hparams.get("batch_size"))
    return [value for value in loaded if isinstance(value, int) and not isinstance(value, bool)]
