"""The gradients of one optimizer step in two batch sizes: by a copy of the module, or of training itself."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_bayes.callbacks.gradient_noise.copied_gradients import CopiedGradients
from lightning_bayes.callbacks.gradient_noise.training_gradients import TrainingGradients
from lightning_bayes.callbacks.trainer.module_reader import num_examples_of
from lightning_bayes.callbacks.trainer.optimizers import names_of_groups
from lightning_bayes.callbacks.trainer.training_set import step_batch_size
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.functional import GradientNoise

GradientMethod = Literal["auto", "per_example", "micro_batches", "split_batch"]


class StepGradients:
    """Measures the steps of one fit, each from its first micro-batch to its end.

    Args:
        method: "per_example", "split_batch" or "micro_batches"; "auto" finds out at the first batch.
        parts: Names of the layers that noise is split over.
        warn_once: Warns once of a kind of trouble: that a batch could not be measured, where others could.
    """

    def __init__(
        self, method: GradientMethod, parts: Sequence[str], warn_once: Callable[[str, str], None]
    ) -> None:
        self.method = method
        """In use; "auto" until that is known."""
        self._parts = parts
        self._warn_once = warn_once
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
        if first:
            self._follow_parameters(trainer, module)
            if self._source is None:
                self._source = self._make_source(trainer, module, batch, batch_idx)
        if isinstance(self._source, TrainingGradients):
            self._source.begin(batch, step_batch_size(trainer), first)
        elif first and self._source is not None:
            return self._measured(self._source, batch, batch_idx)
        return None

    def after_backward(self, last: bool) -> None:
        """Take in the gradients of training as they are after a micro-batch."""
        if isinstance(self._source, TrainingGradients):
            self._source.after_backward(last=last)

    def finish(self) -> list[GradientNoise] | None:
        """The noise of each part from the gradients of training; None where a copy has measured."""
        norms = self._source.finish() if isinstance(self._source, TrainingGradients) else None
        return None if norms is None else norms.noise(self._part_of, len(self._parts))

    def stop(self) -> None:
        """Let go of the module."""
        if isinstance(self._source, TrainingGradients):
            self._source.stop()
        self._source, self._names, self._trained = None, [], []

    def _make_source(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> CopiedGradients | TrainingGradients:
        """What gives the gradients; under "auto" the batch tells whether its examples can be taken apart."""
        if self.method == "auto":
            trial = CopiedGradients(trainer, module, self._names, by_example=True)
            obstacle = _too_few(trainer, batch) or trial.why_not_by_example(batch, batch_idx)
            if obstacle is None:
                self.method = "per_example"
                return trial
            self.method = "micro_batches" if num_micro_batches(trainer) > 1 else "split_batch"
            rank_zero_info(
                f'GradientNoiseScale: method="{self.method}", because examples cannot be told apart. {obstacle}'
            )
        if self.method == "micro_batches":
            return TrainingGradients(trainer, module, self._names)
        if too_few := _too_few(trainer, batch):
            raise ValueError(too_few)
        return CopiedGradients(trainer, module, self._names, by_example=self.method == "per_example")

    def _measured(self, source: CopiedGradients, batch: Any, batch_idx: int) -> list[GradientNoise] | None:
        """The noise of each part; None where the batch, and not the method, is to blame for there being none."""
        try:
            norms = source.measure(batch, batch_idx)
        except Exception as error:
            unavailable = isinstance(error, EvidenceUnavailableError)
            if not self._proved and not unavailable:
                raise
            # A batch could be measured before: what fails now is of this one, and not worth the run.
            reason = str(error) if unavailable else f"{type(error).__name__}: {error}"
            self._warn_once("failed", f"a batch could not be measured; training goes on. {reason}")
            source.give_up()
            return None
        self._proved = True
        return None if norms is None else norms.noise(self._part_of, len(self._parts))

    def _follow_parameters(self, trainer: Trainer, module: LightningModule) -> None:
        """Parameters are unfrozen during a run."""
        trained = [(id(parameter), parameter.requires_grad) for parameter in module.parameters()]
        if trained != self._trained:
            self.stop()
            self._names, self._trained = list(names_of_groups(trainer, module)), trained
            numbers = {name: number for number, name in enumerate(self._parts)}
            self._part_of = [numbers.get(layer_of(name), 0) for name in self._names]


def layer_of(name: str) -> str:
    """The module that holds a parameter; a parameter of the outermost module stands for itself."""
    return name.rpartition(".")[0] or name


def num_micro_batches(trainer: Trainer) -> int:
    """Gradients that an optimizer step is the mean of: micro-batches of all replicas."""
    return trainer.accumulate_grad_batches * trainer.world_size


def _too_few(trainer: Trainer, batch: Any) -> str | None:
    """Why batches of one example each, with nothing to compare it with, have no noise; None for others."""
    if num_examples_of(batch) != 1 or step_batch_size(trainer) != 1 or trainer.world_size > 1:
        return None
    if trainer.num_training_batches == 1:
        return (
            "GradientNoiseScale needs several examples, since one gradient has no spread, but an epoch has one, in a "
            "batch of its own. Leave GradientNoiseScale out of this run."
        )
    return (
        "GradientNoiseScale needs batches of 2 examples or more, since one gradient has no spread, but got"
        ' batch_size=1. Use larger batches, or accumulate_grad_batches of 2 or more with method="micro_batches".'
    )
