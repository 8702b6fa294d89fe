"""The gradients of one optimizer step in two batch sizes: by a copy of the module, or of training itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_bayes.callbacks.gradient_noise.checks import (
    GradientMethod,
    check_batch_size,
    num_micro_batches,
)
from lightning_bayes.callbacks.gradient_noise.copied_gradients import CopiedGradients
from lightning_bayes.callbacks.gradient_noise.parts import layer_of
from lightning_bayes.callbacks.gradient_noise.training_gradients import TrainingGradients
from lightning_bayes.callbacks.gradient_noise.two_batch_sizes import TwoBatchSizes
from lightning_bayes.callbacks.trainer.inputs import step_batch_size
from lightning_bayes.capture.loss import WAY_OUT
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.functional import GradientNoise
from lightning_bayes.priors.prior import trainable_names

OTHER_WAYS = 'method="split_batch", or method="micro_batches" with several of them, takes any loss.'


class StepGradients:
    """Measures the steps of one fit, each from its first micro-batch to its end.

    Args:
        method: "per_example", "split_batch" or "micro_batches"; "auto" finds out at the first batch.
        parts: Names of the layers that noise is split over.
        failed: Is told why a batch could not be measured, where others could.
    """

    def __init__(self, method: GradientMethod, parts: Sequence[str], failed: Callable[[str], None]) -> None:
        self.method = None if method == "auto" else method
        """In use; None until that is known."""
        self._parts = parts
        self._failed = failed
        self._names: list[str] = []
        self._part_of: list[int] = []  # number of the part that each of them belongs to
        self._trained: list[tuple[int, bool]] = []
        self._source: CopiedGradients | TrainingGradients | None = None
        self._proved = False

    def begin(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, first: bool
    ) -> list[GradientNoise] | None:
        """Take in a micro-batch before it is trained on.

        Args:
            trainer: Of the fit.
            module: The user's.
            batch: The micro-batch.
            batch_idx: Its number.
            first: Whether it is the first of its step.

        Returns:
            The noise of each part where a copy has measured it; None where training has to, or where there is none.

        Raises:
            ValueError: If this module or loss does not allow the method.
        """
        noise = None
        if first:
            self._follow_parameters(trainer, module)
            if self.method != "micro_batches":
                noise = self._of_copy(trainer, module, batch, batch_idx)
        if self.method == "micro_batches":
            if not isinstance(self._source, TrainingGradients):
                self._source = TrainingGradients(trainer, module, self._names)
            if first:
                self._source.stop()  # what was seen of a step that was not made
            self._source.begin(batch, step_batch_size(trainer))
        return noise

    def after_backward(self, last: bool) -> None:
        """Take in the gradients of training as they are after a micro-batch."""
        if isinstance(self._source, TrainingGradients):
            self._source.after_backward(last=last)

    def finish(self) -> list[GradientNoise] | None:
        """The noise of each part from the gradients of training; None where a copy has measured."""
        return self._noise(self._source.finish()) if isinstance(self._source, TrainingGradients) else None

    @property
    def is_of_training(self) -> bool:
        """Whether the gradients are those of training."""
        return isinstance(self._source, TrainingGradients)

    def stop(self) -> None:
        """Let go of the module."""
        if isinstance(self._source, TrainingGradients):
            self._source.stop()
        self._source, self._names, self._trained = None, [], []

    def _of_copy(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> list[GradientNoise] | None:
        """Measure on a copy; under "auto" find out at the first batch how."""
        if self.method is None:
            self.method = "per_example"
            try:
                return self._measure(trainer, module, batch, batch_idx)
            except ValueError as error:
                self._source = None
                self.method = "micro_batches" if num_micro_batches(trainer) > 1 else "split_batch"
                rank_zero_info(
                    f'GradientNoiseScale: method="{self.method}", because examples cannot be told apart. '
                    + str(error).replace(WAY_OUT, "").strip()
                )
                if self.method == "micro_batches":
                    return None
        try:
            return self._measure(trainer, module, batch, batch_idx)
        except Exception as error:
            if not self._proved and not isinstance(error, ValueError):
                raise
            if not self._proved:
                raise ValueError(str(error).replace(WAY_OUT, OTHER_WAYS)) from error
            # A batch could be measured before: what fails now is of this one, and not worth the run.
            self._leave_out(trainer, f"{type(error).__name__}: {error}")
            return None

    def _measure(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> list[GradientNoise] | None:
        if not isinstance(self._source, CopiedGradients):
            check_batch_size(trainer, batch)
            self._source = CopiedGradients(trainer, module, self._names, self.method == "per_example")
        try:
            noise = self._noise(self._source.measure(batch, batch_idx))
        except EvidenceUnavailableError as error:  # the batch, or the weights, are to blame: not the method
            self._leave_out(trainer, str(error))
            return None
        self._proved = True
        return noise

    def _leave_out(self, trainer: Trainer, reason: str) -> None:
        self._failed(reason)
        if trainer.world_size > 1 and isinstance(self._source, CopiedGradients):
            self._source.nothing()  # the other processes are waiting

    def _noise(self, norms: TwoBatchSizes | None) -> list[GradientNoise] | None:
        """Of each part; None where it is NaN or infinite."""
        return None if norms is None else norms.noise(self._part_of, len(self._parts))

    def _follow_parameters(self, trainer: Trainer, module: LightningModule) -> None:
        """Parameters are unfrozen during a run."""
        trained = [(id(parameter), parameter.requires_grad) for parameter in module.parameters()]
        if trained != self._trained:
            self.stop()
            held = [p for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]]
            self._names, self._trained = trainable_names(module, held), trained
            numbers = {name: number for number, name in enumerate(self._parts)}
            self._part_of = [numbers.get(layer_of(name), 0) for name in self._names]
