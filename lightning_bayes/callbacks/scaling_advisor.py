"""Says after training which learning rate or batch size keeps the noise when something changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bayes.callbacks.advice_table import advice_renderable, advice_text
from lightning_bayes.callbacks.configuration import ParameterGroup, TrainerConfiguration, read_configuration
from lightning_bayes.functional import (
    AdamAdvice,
    AdamConfiguration,
    Advice,
    Configuration,
    advise,
    advise_adam,
)
from lightning_bayes.functional._validation import string
from lightning_bayes.functional.adam_advice import check_adam_targets
from lightning_bayes.functional.configuration import Targets

SCHEDULE_CAVEAT = (
    "The learning rate followed a schedule; the one shown is its peak. Multiply the whole schedule by"
    " the ratio of the advised to the present one."
)


@dataclass
class PeakRecord:
    """What one parameter group did over the run.

    Attributes:
        peak: the configuration at the step with the largest learning rate, the latest of equals.
        changed: which of "learning_rate", "batch_size", "dataset_size", "momentum" and "betas" were not constant.
    """

    peak: Configuration | AdamConfiguration
    changed: set[str] = field(default_factory=set)

    def update(self, configuration: Configuration | AdamConfiguration) -> None:
        """Takes one optimizer step into account."""
        for name in ("learning_rate", "batch_size", "dataset_size", "momentum", "betas"):
            if getattr(configuration, name, None) != getattr(self.peak, name, None):
                self.changed.add(name)
        if configuration.learning_rate >= self.peak.learning_rate:
            self.peak = configuration


class ScalingAdvisor(Callback):
    """Advises at the end of fit how to change batch size, learning rate, momentum or data and keep the noise.

    g = ε (N/B - 1) (1 - τ) / (1 - m) stays, by its exact inverse and by the linear rule B ∝ ε N / (1 - m);
    for Adam-like optimizers ε/√B, by the square-root rule with betas and eps.

    Give what is to change. A batch size as target is answered by a learning rate and the other way round;
    momentum or dataset size by both, of which one is to be taken; batch size and learning rate together by
    what becomes of g and the single change that restores it.

    After fit, or when Ctrl-C ends it, a table is printed (on rank zero), logged as text under `advice` to
    loggers that take text (TensorBoard), and kept as data in `advice`, one entry per set of parameter groups
    with the same values. Under a learning-rate schedule the advice is for its peak and multiplies the whole
    schedule. The peak survives a checkpoint.

    Args:
        target_batch_size: examples per optimizer step wanted: loader batch x accumulation x replicas.
        target_learning_rate: (peak) learning rate wanted. Where parameter groups have different ones it is
            that of the largest, and the others are multiplied alike.
        target_momentum: momentum wanted, in [0, 1); SGD only.
        target_dataset_size: number of training examples wanted.
        reference: not supported yet; leave it None.
        log_key_prefix: put before `advice`.

    Raises:
        ValueError: at construction without a target, or for one outside its domain; at the start of
            training for a target batch larger than the training set, a momentum target with an Adam-like
            optimizer, a second advisor with the same targets, and whatever `SGDNoiseScale` refuses.

    Example::

        advisor = ScalingAdvisor(target_batch_size=512)
        Trainer(callbacks=[advisor]).fit(model, loader)
        advisor.advice[0].exact.learning_rate

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5; for Adam Malladi et al., NeurIPS 2022,
        arXiv:2205.10287.
    """

    def __init__(
        self,
        *,
        target_batch_size: int | None = None,
        target_learning_rate: float | None = None,
        target_momentum: float | None = None,
        target_dataset_size: int | None = None,
        reference: object | None = None,
        log_key_prefix: str = "bayes/",
    ) -> None:
        super().__init__()
        self.targets = Targets(target_batch_size, target_learning_rate, target_momentum, target_dataset_size)
        if reference is not None:
            raise ValueError(
                f"Expected argument `reference` to be None, but got {reference!r}: advice relative to"
                " another run is not supported yet. Leave it out to take the present run as reference;"
                " for another one call `lightning_bayes.functional.advise` with its Configuration."
            )
        self.log_key_prefix = string("log_key_prefix", log_key_prefix)
        self.advice: list[Advice | AdamAdvice] = []
        self._records: dict[str, PeakRecord] = {}
        self._notes: tuple[str, ...] = ()
        self._due = False

    @property
    @override
    def state_key(self) -> str:
        # Two advisors with different targets can be in one Trainer.
        return self._generate_state_key(**asdict(self.targets))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_alone(trainer)
        self.advice = []
        configuration = read_configuration(trainer)
        self._notes = configuration.notes
        for group in configuration.groups:
            if isinstance(group.configuration, AdamConfiguration):
                check_adam_targets(self.targets)
            self.targets.check_against(int(group.configuration.dataset_size or 0))
        # Only a resumed run has records of its own past: a second fit from the start, or one of another
        # model, begins anew.
        if trainer.global_step == 0 or self._records.keys() != {group.name for group in configuration.groups}:
            self._records = {}
        self._due = True

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._record(read_configuration(trainer))

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

    def _emit(self, trainer: Trainer) -> None:
        """Keeps the advice as data, prints it and logs it as text."""
        self._due = False
        self.advice = self._advise()
        if not self.advice:
            rank_zero_warn(
                "ScalingAdvisor: no optimizer step with a learning rate above 0 was taken: no advice."
            )
            return
        if not trainer.is_global_zero:
            return
        Console().print(advice_renderable(self.advice))
        text = advice_text(self.advice)
        for logger in trainer.loggers:
            # Not every logger takes text; TensorBoard's does, whichever Lightning package made it.
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if callable(add_text):
                # As a code block: TensorBoard renders text as Markdown.
                add_text(f"{self.log_key_prefix}advice", f"```\n{text}\n```", trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            name: {
                "adaptive": isinstance(record.peak, AdamConfiguration),
                "peak": asdict(record.peak),
                "changed": sorted(record.changed),
            }
            for name, record in self._records.items()
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._records = {}
        for name, state in state_dict.items():
            peak = dict(state["peak"])
            if state["adaptive"]:
                record = PeakRecord(AdamConfiguration(**{**peak, "betas": tuple(peak["betas"])}))
            else:
                record = PeakRecord(Configuration(**peak))
            record.changed = set(state["changed"])
            self._records[name] = record

    def _check_alone(self, trainer: Trainer) -> None:
        """Two callbacks with one `state_key` would overwrite each other's state in checkpoints."""
        for other in trainer.callbacks:  # type: ignore[attr-defined] # set without being declared
            if isinstance(other, ScalingAdvisor) and other is not self and other.state_key == self.state_key:
                raise ValueError(
                    "Expected the ScalingAdvisor callbacks of a Trainer to differ in their targets, but two have"
                    f" {self.targets}: they would give the same advice and cannot share a checkpoint. Remove one."
                )

    def _record(self, configuration: TrainerConfiguration) -> None:
        for group in configuration.groups:
            if group.name in self._records:
                self._records[group.name].update(group.configuration)
            else:
                self._records[group.name] = PeakRecord(group.configuration)

    def _advise(self) -> list[Advice | AdamAdvice]:
        """Advice for each set of parameter groups with the same configuration and history."""
        alike: dict[tuple[Configuration | AdamConfiguration, frozenset[str]], list[str]] = {}
        for name, record in self._records.items():
            if record.peak.learning_rate > 0:
                alike.setdefault((record.peak, frozenset(record.changed)), []).append(name)
        largest = max((peak.learning_rate for peak, _ in alike), default=0.0)
        return [
            self._advise_group(ParameterGroup(", ".join(names), peak), changed, peak.learning_rate / largest)
            for (peak, changed), names in alike.items()
        ]

    def _advise_group(
        self, group: ParameterGroup, changed: frozenset[str], share: float
    ) -> Advice | AdamAdvice:
        targets = {f"target_{name}": value for name, value in asdict(self.targets).items()}
        caveats = list(self._notes)
        if self.targets.learning_rate is not None and share != 1:
            targets["target_learning_rate"] = self.targets.learning_rate * share
            caveats.append(
                "The target learning rate is that of the parameter group with the largest; this group's"
                " is multiplied alike."
            )
        if "learning_rate" in changed:
            caveats.append(SCHEDULE_CAVEAT)
        if changed - {"learning_rate"}:
            names = " and ".join(sorted(changed - {"learning_rate"})).replace("_", " ")
            caveats.append(f"The {names} changed during the run: the present values are those at the peak.")
        if isinstance(group.configuration, AdamConfiguration):
            adam = advise_adam(group.configuration, name=group.name, **targets)
            return replace(adam, caveats=(*adam.caveats, *caveats))
        sgd = advise(group.configuration, name=group.name, **targets)
        return replace(sgd, caveats=(*sgd.caveats, *caveats))
