"""Callbacks that take a reading at the end of epochs: rehearsed on the first batch, remembered in a history."""

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_bayes.callbacks.measuring import MeasuringCallback, OnError
from lightning_bayes.callbacks.trainer.checks import check_not_sharded
from lightning_bayes.callbacks.trainer.module_reader import NetworkOption
from lightning_bayes.callbacks.trainer.restore import untouched
from lightning_bayes.capture.loss import WAY_OUT
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.functional._validation import check_options, count
from lightning_bayes.likelihoods import Likelihood, resolve_likelihood

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Reading = TypeVar("Reading", bound="DataclassInstance")


class EpochReadings(MeasuringCallback, Generic[Reading]):
    """A callback that measures at the end of epochs what a dataclass holds.

    Before the first step the trainer is checked and the first batch read, so that what cannot be measured says so
    then. What fails at a later epoch is of that epoch: one warning, and NaN.

    Attributes:
        history: List of (epoch, reading); it survives a checkpoint.
    """

    HELD = "history"
    READING: ClassVar[type[Any]]
    """What is remembered."""
    NOUN: ClassVar[str]
    """What warnings call it."""

    def __init__(
        self,
        *,
        likelihood: str | Likelihood,
        network: NetworkOption,
        every_n_epochs: int,
        batch_size: int | None,
        max_examples: int | None,
        log_key_prefix: str,
        on_error: OnError,
    ) -> None:
        super().__init__(on_error, log_key_prefix)
        check_options(batch_size, max_examples)
        if likelihood == "auto" and network is not None:
            raise ValueError(
                "Expected argument `likelihood` to be given beside `network`: without a training_step there is no "
                "loss to read it from. Use likelihood='classification', 'binary', 'regression' or a Likelihood."
            )
        if network is not None and not isinstance(network, str) and not callable(network):
            raise ValueError(
                "Expected argument `network` to be None, the name of a submodule, or a function (module, batch) -> "
                f"(outputs, targets), got {network!r}."
            )
        self.likelihood = None if likelihood == "auto" else resolve_likelihood(likelihood)
        self.network = network
        self.every_n_epochs = count("every_n_epochs", every_n_epochs)
        self.batch_size = batch_size
        self.history: list[tuple[int, Reading]] = []
        self._is_rehearsed = False
        self._num_examples = max_examples or 200

    @property
    def latest(self) -> Reading | None:
        """The last reading, None before the first."""
        return self.history[-1][1] if self.history else None

    @property
    @override
    def way_out(self) -> str:
        kind = type(self).__name__
        if self.network is not None:
            return f"Mend what network={self.network!r} runs, or leave {kind} out of this run."
        return WAY_OUT.replace("LaplaceEvidence", kind)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything that can be checked before a batch is seen."""
        self._is_rehearsed = False
        if trainer.global_step == 0:  # a new run, not one that goes on from a checkpoint
            self.history = []
        self._prepare(trainer, untouched(trainer)(partial(self._check, trainer, pl_module)))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the first batch before the first step, so that what cannot be read says so now."""
        if not self._is_rehearsed:
            self._is_rehearsed = True
            rehearse = partial(self._rehearse, trainer, pl_module, batch, batch_idx)
            self._prepare(trainer, untouched(trainer)(rehearse))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": [(epoch, asdict(reading)) for epoch, reading in self.history]}

    @override
    def _restore(self, state_dict: dict[str, Any]) -> None:
        known = {field.name for field in fields(self.READING)}  # another version's checkpoint may hold others
        self.history = [
            (epoch, self.READING(**{name: stored[name] for name in known & stored.keys()}))
            for epoch, stored in state_dict["history"]
        ]

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise where this trainer or module does not allow the measurement."""
        check_not_sharded(
            trainer, type(self).__name__, "weights", "call laplace_evidence() on a gathered checkpoint"
        )
        if self.network is None and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually, so running its training_step would step. {WAY_OUT}"
            )

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the first batch all the way; raise where that does not go."""
        raise NotImplementedError

    def _take(self, trainer: Trainer, take: Callable[[], Reading]) -> Reading | None:
        """One reading; None, and a warning, where this epoch has none.

        The first batch has been read before the first step: what fails now is of this epoch or of the user's code on
        another batch, and not worth the run.
        """
        try:
            with untouched(trainer):
                return take()
        except Exception as error:
            if self.on_error == "raise" and not isinstance(error, EvidenceUnavailableError):
                raise
            rank_zero_warn(
                f"{type(self).__name__}: no {self.NOUN} for epoch {trainer.current_epoch}; training goes on. "
                f"{type(error).__name__}: {error} (NaN is logged; an EarlyStopping that monitors it stops unless "
                "check_finite=False.)"
            )
            return None
