"""Says after training which learning rate or batch size keeps the noise when something changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bayes.advice.optimizer_groups import ParameterGroup
from lightning_bayes.advice.references import Reference, ReferenceLike, comparisons_with, read_reference
from lightning_bayes.callbacks.advice.peak_record import PeakRecord, note_step
from lightning_bayes.callbacks.advice.report import emit
from lightning_bayes.callbacks.advice.targets import check_targets
from lightning_bayes.callbacks.measurements import measured
from lightning_bayes.callbacks.measuring import MeasuringCallback, OnError, guarded
from lightning_bayes.callbacks.trainer.loss_reduction import forget_reduction, note_reduction
from lightning_bayes.callbacks.trainer.settings import (
    TrainerConfiguration,
    changing_settings,
    makes_a_step,
    read_configuration,
)
from lightning_bayes.functional import (
    AdamAdvice,
    AdamConfiguration,
    Advice,
    Comparison,
    Configuration,
    SavedAdvice,
    advise,
    advise_adam,
)
from lightning_bayes.functional._validation import string
from lightning_bayes.functional.advice.trainer_check import AnyAdvice, with_trainer_check
from lightning_bayes.functional.check import Measurements
from lightning_bayes.functional.configuration import Targets

SCHEDULE_NOTE = (
    "The learning rate followed a schedule; the one shown is its peak. Multiply the whole schedule by"
    " the ratio of the advised to the present one."
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
        self.advice: list[Advice | AdamAdvice] = []
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
            check_targets(trainer, configuration, self.targets)
        # Only a resumed run has records of its own past: a second fit from the start, or one of another
        # model, begins anew.
        if trainer.global_step == 0 or self._records.keys() != {group.name for group in configuration.groups}:
            self._records = {}
        # Asked on every process: it is the same on all.
        self._directory = trainer.log_dir if trainer.loggers else None
        self._due = True
        if self.reference is not None:  # of another kind of optimizer it is refused before the first batch
            self._compare(read_configuration(trainer, scheduled=True).groups)
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
            self._compare(read_configuration(trainer, scheduled=True).groups)
            self._say(self.reference)

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
        if self.targets is not None:
            self.advice = self._advise(trained, self.targets, measured(trainer))
        if self.reference is not None:
            self._compare([ParameterGroup(name, record.peak) for name, record in trained.items()])
        configurations = {name: record.peak for name, record in trained.items()}
        saved = SavedAdvice(configurations, tuple(self.advice), tuple(self.comparisons))
        others = [other for other in trainer.callbacks if isinstance(other, ScalingAdvisor)]  # type: ignore[attr-defined]
        emit(trainer, saved, self.log_key_prefix, self._directory, others.index(self))

    @override
    def _check_alone(self, trainer: Trainer) -> None:
        """Two callbacks with one `state_key` would overwrite each other's state in checkpoints."""
        for other in trainer.callbacks:  # type: ignore[attr-defined] # set without being declared
            if isinstance(other, ScalingAdvisor) and other is not self and other.state_key == self.state_key:
                raise ValueError(
                    "Expected the ScalingAdvisor callbacks of a Trainer to differ in their targets, but two have"
                    f" {self.targets}: they would give the same advice and cannot share a checkpoint. Remove one."
                )

    def _compare(self, groups: Sequence[ParameterGroup]) -> None:
        if self.reference is not None:
            self.comparisons = comparisons_with(self.reference, groups)

    def _say(self, reference: Reference) -> None:
        for note in reference.notes:
            rank_zero_info(f"ScalingAdvisor: {note}")
        for comparison in self.comparisons:
            say = rank_zero_warn if comparison.differs else rank_zero_info
            say(f"ScalingAdvisor: {comparison.summary}")

    def _advise(
        self, records: Mapping[str, PeakRecord], targets: Targets, known: Measurements
    ) -> list[Advice | AdamAdvice]:
        """Advice for each set of parameter groups with the same configuration and history."""
        alike: dict[tuple[Configuration | AdamConfiguration, frozenset[str]], list[str]] = {}
        for name, record in records.items():
            alike.setdefault((record.peak, frozenset(record.changed)), []).append(name)
        largest = max(peak.learning_rate for peak, _ in alike)
        return [
            self._advise_group(
                ParameterGroup(", ".join(names), peak), targets, known, changed, peak.learning_rate / largest
            )
            for (peak, changed), names in alike.items()
        ]

    def _advise_group(
        self,
        group: ParameterGroup,
        targets: Targets,
        known: Measurements,
        changed: frozenset[str],
        share: float,
    ) -> Advice | AdamAdvice:
        arguments: dict[str, Any] = {f"target_{name}": value for name, value in targets.given().items()}
        notes = [] if self._latest is None else list(self._latest.notes)
        if targets.learning_rate is not None and share != 1:
            arguments["target_learning_rate"] = targets.learning_rate * share
            notes.append(
                "The target learning rate is that of the parameter group with the largest; this group's"
                " is multiplied alike."
            )
        if "learning_rate" in changed:
            notes.append(SCHEDULE_NOTE)
        if changed - {"learning_rate"}:
            names = " and ".join(sorted(changed - {"learning_rate"})).replace("_", " ")
            notes.append(f"The {names} changed during the run: the present values are those at the peak.")
        arguments |= {"gradient_noise_scale": known.gradient_noise_scale, "ema_decay": self.ema_decay}
        if isinstance(group.configuration, AdamConfiguration):
            return self._complete(advise_adam(group.configuration, name=group.name, **arguments), notes)
        arguments["largest_eigenvalue"] = known.largest_eigenvalue
        return self._complete(advise(group.configuration, name=group.name, **arguments), notes)

    def _complete(self, advice: AnyAdvice, notes: Sequence[str]) -> AnyAdvice:
        """The advice with what the Trainer adds to it."""
        if self._latest is not None:
            sizes = self._latest.sizes
            advice = with_trainer_check(
                advice,
                loader_batch_size=sizes.device_batch_size,
                accumulate_grad_batches=sizes.accumulation,
                replicas=sizes.replicas,
            )
        return replace(advice, notes=(*advice.notes, *notes))
