"""Logs the SGD noise scale while training."""

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bayes.callbacks.measuring import MeasuringCallback, OnError, guarded
from lightning_bayes.callbacks.trainer.loss_reduction import forget_reduction, note_reduction
from lightning_bayes.callbacks.trainer.settings import (
    TrainerConfiguration,
    changing_settings,
    makes_a_step,
    read_configuration,
)
from lightning_bayes.functional import AdamConfiguration
from lightning_bayes.functional._validation import optional_count


class SGDNoiseScale(MeasuringCallback):
    r"""Logs the noise scale of SGD, read from the running Trainer.

    g = ε (N/B - 1) (1 - τ) / (1 - m)

    N counts the examples that training draws, each once; without shuffling, `limit_train_batches` leaves those
    of so many batches. B counts the examples of one optimizer step: loader batch x accumulation x replicas. ε,
    m and τ are the optimizer's, at the moment of its step, so that schedules are followed. ε is that of the mean
    loss: where training_step returns a sum over its b examples, which is read from a copy before the first step,
    the learning rate counts b times.

    The value of an epoch is the one in force **at its last optimizer step**. (At the end of an epoch
    Lightning has already moved its schedulers on to the next, so the callback reads when the optimizer
    steps.) It is logged in `on_train_epoch_end`, so that `ModelCheckpoint` and `EarlyStopping` can monitor
    it; with `val_check_interval` below 1 those two look at validation's end unless told otherwise
    (`save_on_train_epoch_end=True`, `check_on_train_epoch_end=True`).

    Keys, with the prefix: `noise_scale` while all parameter groups agree; one key per group from the moment
    they differ, in the style of `LearningRateMonitor`: `noise_scale-SGD/pg1`. g is not a quantity of
    Adam-like optimizers: they get `adam_noise_scale` (ε/√B, what Adam's square-root rule keeps) and a
    statement at the start.

    Args:
        logging_interval: "epoch"; or "step" for the value of every `log_every_n_steps`-th optimizer step as
            well as that of the epoch.
        dataset_size: N in place of the counted one; needed for an IterableDataset without
            length.
        log_key_prefix: put before every key.
        on_error: "warn" for one warning, NaN under the keys and a fit that goes on, where this Trainer, module, loss
            or dataset does not allow the measurement; "raise" for an error.

    Raises:
        ValueError: at construction for an argument outside its domain; at the start of fit for a second
            SGDNoiseScale with the same prefix. Manual optimization, several training loaders, a batch size or a
            dataset size that cannot be read, and an optimizer that has neither noise scale are what `on_error` is
            about.

    Example::

        trainer = Trainer(callbacks=[SGDNoiseScale()])

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5; for Adam Malladi et al., NeurIPS 2022,
        arXiv:2205.10287.
    """

    LOGGED = ("noise_scale", "adam_noise_scale")
    ALWAYS_LOGGED = ("noise_scale",)

    def __init__(
        self,
        *,
        logging_interval: Literal["epoch", "step"] = "epoch",
        dataset_size: int | None = None,
        log_key_prefix: str = "bayes/",
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(on_error, log_key_prefix)
        if logging_interval not in ("epoch", "step"):
            raise ValueError(
                f'Expected argument `logging_interval` to be "epoch" or "step", but got {logging_interval!r}.'
            )
        self.logging_interval = logging_interval
        self.dataset_size = optional_count("dataset_size", dataset_size)
        self._in_force: dict[str, float] | None = None
        self._settings: tuple[object, ...] | None = None
        self._groups_differ = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, lambda: self._begin(trainer))

    def _begin(self, trainer: Trainer) -> None:
        forget_reduction(trainer)
        self._in_force, self._groups_differ = None, False
        configuration = read_configuration(trainer, self.dataset_size)
        for note in configuration.notes:
            rank_zero_warn(f"SGDNoiseScale: {note}")
        adaptive = [
            group.name for group in configuration.groups if isinstance(group.configuration, AdamConfiguration)
        ]
        if adaptive:
            rank_zero_info(
                "SGDNoiseScale: the SGD noise scale does not describe optimizers that divide gradients by their"
                f" own size, here {' and '.join(adaptive)}. Logging `{self.log_key_prefix}adam_noise_scale` ="
                " learning rate / sqrt(batch size) instead, the quantity that Adam's square-root rule keeps."
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settings = None  # the training set may have grown

    @override
    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        note_reduction(trainer, pl_module, batch, batch_idx)

    @override
    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not makes_a_step(trainer, optimizer):
            return
        settings = changing_settings(trainer)
        if self._in_force is None or settings != self._settings:  # most steps are made as the one before
            self._in_force = self._named_scales(read_configuration(trainer, self.dataset_size))
            self._settings = settings
        if self.logging_interval == "step":
            values = self._in_force
            self._log_step(trainer, lambda: values)

    @override
    @guarded
    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._in_force is None:
            # No optimizer step yet (a skipped epoch): what the next step would use.
            self._in_force = self._named_scales(read_configuration(trainer, self.dataset_size))
        self._log_epoch(trainer, pl_module, self._in_force)

    def noise_scales(self, configuration: TrainerConfiguration) -> dict[str, float]:
        """Log keys and values of a configuration.

        Args:
            configuration: as `read_configuration` gives it.

        Returns:
            One key for each kind of noise scale on which the groups agree, else one per group.
        """
        named = self._named_scales(configuration)
        return {f"{self.log_key_prefix}{name}": value for name, value in named.items()}

    def _named_scales(self, configuration: TrainerConfiguration) -> dict[str, float]:
        """Return the same by names without their prefix."""
        scales_of: dict[str, dict[str, float]] = {}
        for group in configuration.groups:
            adaptive = isinstance(group.configuration, AdamConfiguration)
            kind = "adam_noise_scale" if adaptive else "noise_scale"
            scales_of.setdefault(kind, {})[group.name] = group.configuration.noise_scale
        # Once split, always split: groups that meet again for a moment would make keys come and go.
        self._groups_differ |= any(len(set(values.values())) > 1 for values in scales_of.values())
        named: dict[str, float] = {}
        for kind, values in scales_of.items():
            if self._groups_differ:
                named |= {f"{kind}-{name}": value for name, value in values.items()}
            else:
                named[kind] = next(iter(values.values()))
        return named
