"""Says after training which learning rate or batch size keeps the noise when something changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bayes.advice.optimizer_groups import ParameterGroup
from lightning_bayes.advice.references import ReferenceLike, comparisons_with, read_reference
from lightning_bayes.callbacks.advice.peak_record import PeakRecord, note_step
from lightning_bayes.callbacks.advice.report import emit, way_to_more_examples
from lightning_bayes.callbacks.measurements import measured
from lightning_bayes.callbacks.measuring import MeasuringCallback, OnError, guarded
from lightning_bayes.callbacks.trainer.loss_reduction import forget_reduction, note_reduction
from lightning_bayes.callbacks.trainer.settings import (
    TrainerConfiguration,
    changing_settings,
    makes_a_step,
    read_configuration,
)
from lightning_bayes.functional import Advice, Comparison, SavedAdvice
from lightning_bayes.functional._validation import string
from lightning_bayes.functional.advice.advise import advice_on
from lightning_bayes.functional.advice.trainer_check import with_trainer_check
from lightning_bayes.functional.check import Measurements
from lightning_bayes.functional.configuration import AnyConfiguration, Targets

SCHEDULE_NOTE = (
    "The learning rate followed a schedule; the one shown is its peak. Multiply the whole schedule by"
    " the ratio of the advised to the present one."
)
SHARE_NOTE = (
    "The target learning rate is that of the parameter group with the largest; this group's"
    " is multiplied alike."
)


class ScalingAdvisor(MeasuringCallback):
    """Advises at the end of fit how to change batch size, learning rate, momentum or data and keep the noise.

    g = ε (N/B - 1) (1 - τ) / (1 - m) stays, by its exact inverse and by the linear rule B ∝ ε N / (1 - m);
    for Adam-like optimizers ε/√B, by the square-root rule with betas and eps.

    Give what is to change. A batch size as target is answered by a learning rate and the other way round;
    momentum or dataset size by both, of which one is to be taken; batch size and learning rate together by
    what becomes of g and the single change that restores it.

    After fit, or when Ctrl-C ends it, answer, table and checks are printed (on rank zero), logged as text under
    `advice` to loggers that take text (TensorBoard) and as hyper-parameters, saved as `scaling_advice.json` in
    the Trainer's log_dir where there is a logger, and kept as data in `advice`, one entry per set of parameter
    groups with the same values. Under a learning-rate schedule the advice is for its peak and multiplies the
    whole schedule. The peak survives a checkpoint.

    Each move carries checks: what it was held against. A GradientNoiseScale and a Stability callback in the same
    Trainer give the gradient noise scale and the curvature for them; without, those checks say "not measured".

    With a reference, a known-good run, the noise is compared at the start of training, and once more at its end:
    where it differs by more than 1 %, a warning says which single change restores it. `comparisons` holds it.

    Args:
        target_batch_size: examples per optimizer step wanted: loader batch x accumulation x replicas.
        target_learning_rate: (peak) learning rate wanted. Where parameter groups have different ones it is
            that of the largest, and the others are multiplied alike.
        target_momentum: momentum wanted, in [0, 1); SGD only.
        target_dataset_size: number of training examples wanted.
        reference: a known-good run, with or without a target: the path of a Lightning checkpoint, of a log
            directory or of a saved `scaling_advice.json`; a Configuration or a dict of one; or a dict with the "path"
            of a checkpoint and the "batch_size" and "dataset_size" that it does not hold.
        ema_decay: decay of an average of the weights, if there is one, to be told what becomes of it.
        log_key_prefix: put before `advice`.
        on_error: "warn" for one warning, no advice and a fit that goes on, where this Trainer allows none; "raise"
            for an error.

    Raises:
        ValueError: at construction without target and reference, for one outside its domain, or for a reference
            that does not hold a configuration; at the start of training for a target batch larger than the training
            set, a momentum target with an Adam-like optimizer, a reference of another kind of optimizer, a second
            advisor with the same targets, and whatever `SGDNoiseScale` refuses.

    Example::

        advisor = ScalingAdvisor(target_batch_size=512)
        Trainer(callbacks=[advisor]).fit(model, loader)
        advisor.advice[0].exact.learning_rate

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5; for Adam Malladi et al., NeurIPS 2022,
        arXiv:2205.10287.
    """

    HELD = "advice"

    def __init__(
        self,
        *,
        target_batch_size: int | None = None,
        target_learning_rate: float | None = None,
        target_momentum: float | None = None,
        target_dataset_size: int | None = None,
        reference: ReferenceLike | None = None,
        ema_decay: float | None = None,
        log_key_prefix: str = "bayes/",
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(on_error)
        self.reference = None if reference is None else read_reference(reference)
        targets = (target_batch_size, target_learning_rate, target_momentum, target_dataset_size)
        self.targets = None if reference is not None and targets == (None,) * 4 else Targets(*targets)
        self.ema_decay = Measurements(ema_decay=ema_decay).ema_decay
        self.log_key_prefix = string("log_key_prefix", log_key_prefix)
        self.advice: list[Advice[Any]] = []
        self.comparisons: list[Comparison] = []
        self._records: dict[str, PeakRecord] = {}
        self._latest: TrainerConfiguration | None = None
        self._settings: tuple[object, ...] | None = None
        self._directory: str | None = None
        self._due = False
        self._said = True

    @cached_property  # Lightning asks at every hook
    @override
    def state_key(self) -> str:
        # Two advisors with different targets can be in one Trainer.
        return self._generate_state_key(**({} if self.targets is None else asdict(self.targets)))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = False
        self._prepare(trainer, lambda: self._begin(trainer))

    def _begin(self, trainer: Trainer) -> None:
        forget_reduction(trainer)
        self.advice, self.comparisons, self._settings = [], [], None
        self._latest = configuration = read_configuration(trainer)
        if self.targets is not None:
            for group in configuration.groups:
                self.targets.check_for(group.configuration)
            examples = configuration.sizes.dataset_size
            try:
                self.targets.check_against(examples)
            except ValueError as error:
                way = way_to_more_examples(trainer, examples, int(self.targets.batch_size or 0))
                raise ValueError(f"{error} {way}") from error
        # Only a resumed run has records of its own past: a second fit from the start, or one of another
        # model, begins anew.
        if trainer.global_step == 0 or self._records.keys() != {group.name for group in configuration.groups}:
            self._records = {}
        # Asked on every process: it is the same on all.
        self._directory = trainer.log_dir if trainer.loggers else None
        self._due = True
        if self.reference is not None:  # of another kind of optimizer it is refused before the first batch
            groups = read_configuration(trainer, scheduled=True).groups
            self.comparisons = comparisons_with(self.reference, groups)
        self._said = False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settings = None  # the training set may have grown

    @override
    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        note_reduction(trainer, pl_module, batch, batch_idx)
        if self.reference is not None and not self._said:  # the noise of a sum is known by now
            self._said = True
            groups = read_configuration(trainer, scheduled=True).groups
            self.comparisons = comparisons_with(self.reference, groups)
            for note in self.reference.notes:
                rank_zero_info(f"ScalingAdvisor: {note}")
            for comparison in self.comparisons:
                say = rank_zero_warn if comparison.differs else rank_zero_info
                say(f"ScalingAdvisor: {comparison.summary}")

    @override
    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not makes_a_step(trainer, optimizer):
            return
        settings = changing_settings(trainer)
        if settings != self._settings:
            self._settings, self._latest = settings, read_configuration(trainer)
            note_step(self._records, self._latest)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._emit(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning skips `on_fit_end` on Ctrl-C, after which the advice is wanted as well; not in the middle
        # of a later test.
        if isinstance(exception, KeyboardInterrupt) and self._due:
            self._emit(trainer)
        self._due = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: record.state_dict() for name, record in self._records.items()}

    @override
    def _restore(self, state_dict: dict[str, Any]) -> None:
        self._records = {name: PeakRecord.from_state_dict(state) for name, state in state_dict.items()}

    @guarded
    def _emit(self, trainer: Trainer) -> None:
        """Keeps the advice as data, prints, logs and saves it."""
        self._due = False
        trained = {name: record for name, record in self._records.items() if record.peak.learning_rate > 0}
        if not trained:
            rank_zero_warn(
                "ScalingAdvisor: no optimizer step with a learning rate above 0 was taken: no advice."
            )
            return
        self.advice = self._advise(trained, trainer)
        configurations = {name: record.peak for name, record in trained.items()}
        if self.reference is not None:
            groups = [ParameterGroup(name, peak) for name, peak in configurations.items()]
            self.comparisons = comparisons_with(self.reference, groups)
        saved = SavedAdvice(configurations, tuple(self.advice), tuple(self.comparisons))
        others = [other for other in trainer.callbacks if isinstance(other, ScalingAdvisor)]  # type: ignore[attr-defined]
        emit(trainer, saved, self.log_key_prefix, self._directory, others.index(self))

    def _advise(self, records: Mapping[str, PeakRecord], trainer: Trainer) -> list[Advice[Any]]:
        """Advice for each set of parameter groups with the same configuration and history."""
        if self.targets is None or self._latest is None:
            return []
        alike: dict[tuple[AnyConfiguration, tuple[str, ...]], list[str]] = {}
        for name, record in records.items():
            alike.setdefault((record.peak, tuple(_history(record.changed))), []).append(name)
        largest = max(peak.learning_rate for peak, _ in alike)
        known, sizes, advice = measured(trainer, self.ema_decay), self._latest.sizes, []
        for (peak, history), names in alike.items():
            targets, share, notes = self.targets, peak.learning_rate / largest, self._latest.notes
            if targets.learning_rate is not None and share != 1:
                targets = replace(targets, learning_rate=targets.learning_rate * share)
                notes += (SHARE_NOTE,)
            piece = with_trainer_check(
                advice_on(peak, targets, known, ", ".join(names)),
                loader_batch_size=sizes.device_batch_size,
                accumulate_grad_batches=sizes.accumulation,
                replicas=sizes.replicas,
            )
            advice.append(replace(piece, notes=(*piece.notes, *notes, *history)))
        return advice

    @override
    def _check_alone(self, trainer: Trainer) -> None:
        """Two callbacks with one `state_key` would overwrite each other's state in checkpoints."""
        for other in trainer.callbacks:  # type: ignore[attr-defined] # set without being declared
            if isinstance(other, ScalingAdvisor) and other is not self and other.state_key == self.state_key:
                raise ValueError(
                    "Expected the ScalingAdvisor callbacks of a Trainer to differ in their targets, but two have"
                    f" {self.targets}: they would give the same advice and cannot share a checkpoint. Remove one."
                )


def _history(changed: set[str]) -> Iterator[str]:
    """What is to be said of settings that changed during the run."""
    if "learning_rate" in changed:
        yield SCHEDULE_NOTE
    if others := sorted(changed - {"learning_rate"}):
        names = " and ".join(others).replace("_", " ")
        yield f"The {names} changed during the run: the present values are those at the peak."
