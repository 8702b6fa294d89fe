"""Grows the batch where the learning rate would have decayed."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_bayes.callbacks.growth.checks import (
    check_alone,
    check_mean_loss,
    check_schedulers,
    check_trainer,
    describe,
    warnings_at_start,
)
from lightning_bayes.callbacks.growth.growing_loader import GrowingLoader, why_not_reload
from lightning_bayes.callbacks.growth.learning_rates import ScheduleSteps, StepLearningRate
from lightning_bayes.callbacks.growth.schedule import (
    BatchPlanner,
    LearningRateDecay,
    Schedule,
    decay_of,
    parse_schedule,
)
from lightning_bayes.callbacks.measuring import log_epoch
from lightning_bayes.callbacks.trainer.settings import Sizes, group_names, read_sizes
from lightning_bayes.functional import BatchGrowth
from lightning_bayes.functional._validation import optional_count, string
from lightning_bayes.functional.batch_growth import METHODS, GrowthMethod, check_rule
from lightning_bayes.functional.scaling import Rule


class BatchSizeScheduler(Callback):
    r"""Multiplies the batch by k where a schedule would have divided the learning rate by k.

    g ≈ ε N / (B (1 - m)), so that ε/k at B and ε at kB have the same noise; the latter takes k times fewer
    optimizer steps an epoch. This holds while B ≪ N: beyond `max_batch_size` the learning rate takes what is left
    of the decay, as it does where κB is no batch that can be made up.

    Either list the epochs, in place of a scheduler::

        Trainer(callbacks=[BatchSizeScheduler([60, 120, 160], factor=5)])

    or keep the scheduler that `configure_optimizers` returns, of whatever kind, and let its decays become
    batches. Each is measured from the highest learning rate so far, so that a warm-up is left alone, and the batch
    shrinks back where the learning rate rises again::

        Trainer(callbacks=[BatchSizeScheduler("lr_scheduler")])

    The batch changes at the start of epochs only. The learning rate is changed while the optimizer steps and at
    no other time: the scheduler goes on from its own, which checkpoints hold and `LearningRateMonitor` shows; what
    the optimizer used is logged under `learning_rate` (`learning_rate-SGD/pg1`, ... where groups differ), and
    B under `batch_size`. A schedule counted in steps (`interval="step"`) is stepped for the steps that are no
    longer taken, so that it ends when it would have.

    A run that is resumed from a checkpoint goes on as if it had not been interrupted.

    Args:
        schedule: epochs, counted from 0 and at least 1; or a mapping from epoch to the factor at that epoch; or
            "lr_scheduler". An epoch's factor comes on top of the earlier ones.
        factor: k for epochs that are listed; 5 by default, the paper's.
        max_batch_size: limit on B in examples; N/10 by default.
        max_device_batch_size: limit on a batch of the loader in examples, for the memory of a device.
        method: "accumulate" takes k times as many batches per step and is always possible; "reload" has the
            DataModule make its training loader anew with a larger `batch_size`, which is faster, and accumulates
            beyond `max_device_batch_size`, and wants a loss that is a mean; "auto" reloads where that limit is
            given, a DataModule has a `batch_size`, and validation would stay where it is, and accumulates
            otherwise. Batch norm sees batches of the loader: with "accumulate" they stay as small as they are.
        rule: what is kept: "linear" ε/B, as in the paper; "exact" g with its -1, which raises ε by up to
            1/(1 - B/N); "sqrt" ε/√B for Adam-like optimizers, whose batch then grows by k² for each k.
        dataset_size: N in place of the counted one; needed for an IterableDataset without length.
        log_key_prefix: put before every key.

    Raises:
        ValueError: at construction for an argument outside its domain; at the start of training for manual
            optimization, `GradientAccumulationScheduler` or a second BatchSizeScheduler beside it, DeepSpeed,
            "lr_scheduler" without a scheduler, a `method="reload"` that is not possible, and sizes that cannot
            be read.

    Reference:
        Smith, Kindermans, Ying & Le, Don't Decay the Learning Rate, Increase the Batch Size, ICLR 2018,
        arXiv:1711.00489.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        factor: float | None = None,
        max_batch_size: int | None = None,
        max_device_batch_size: int | None = None,
        method: Literal["auto", "accumulate", "reload"] = "auto",
        rule: Rule = "linear",
        dataset_size: int | None = None,
        log_key_prefix: str = "bayes/",
    ) -> None:
        super().__init__()
        self.milestones = parse_schedule(schedule, factor)
        self.max_batch_size = optional_count("max_batch_size", max_batch_size)
        self.max_device_batch_size = optional_count("max_device_batch_size", max_device_batch_size)
        self.dataset_size = optional_count("dataset_size", dataset_size)
        if method not in ("auto", *METHODS):
            raise ValueError(
                f'Expected argument `method` to be "auto", "accumulate" or "reload", but got {method!r}.'
            )
        check_rule(rule)
        self.method: Literal["auto", "accumulate", "reload"] = method
        self.rule: Rule = rule
        self.log_key_prefix = string("log_key_prefix", log_key_prefix)
        self._own_accumulation: int | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.growth: BatchGrowth | None = None
        self._prepared: BatchGrowth | None = None  # for the next epoch, when its loader is asked for
        self._planner = BatchPlanner(self.max_batch_size, self.max_device_batch_size, self.rule)
        self._limit_said = self._groups_differ = False
        self._loader: GrowingLoader | None = None
        self._decays = LearningRateDecay()
        self._steps = ScheduleSteps()
        self._learning_rate = StepLearningRate(self._decays.observe)

    @cached_property  # Lightning asks at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            schedule="lr_scheduler" if self.milestones is None else self.milestones
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_alone(self, trainer)
        check_trainer(trainer, pl_module)
        obstacle = why_not_reload(trainer)
        if self.method == "reload" and obstacle:
            raise ValueError(
                f'Expected a DataModule that method="reload" can have make larger batches, but {obstacle}. Use'
                ' method="accumulate".'
            )
        self._begin_anew()
        self._own_accumulation = trainer.accumulate_grad_batches
        limited = self.method == "auto" and self.max_device_batch_size is not None
        if obstacle is None and (self.method == "reload" or limited):
            self._loader = GrowingLoader(trainer.datamodule)  # type: ignore[attr-defined] # set without being declared
            self._loader.install()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._planner.now = sizes = read_sizes(trainer, self.dataset_size)
        if self._planner.start is None:
            self._planner.start, self._planner.start_batches = sizes, trainer.num_training_batches
        if self.milestones is None:
            check_schedulers(trainer, reloads=self._loader is not None)
        for warning in (*sizes.notes, *warnings_at_start(trainer, self.rule)):
            rank_zero_warn(f"BatchSizeScheduler: {warning}")
        # Arguments that do not fit this training set are to fail now: plan the largest batch, and take another.
        method: GrowthMethod = "accumulate" if self._loader is None else "reload"
        self._planner.plan(math.inf, method)
        if self._loader is not None:
            self._loader.check()
            check_mean_loss(trainer, pl_module)
        self._learning_rate.install(trainer.optimizers)
        if self.growth is None:
            plans = None
            if self.milestones is not None:
                decays = {epoch: decay_of(self.milestones, epoch) for epoch, _ in self.milestones}
                plans = {epoch: self._planner.plan(decay, method) for epoch, decay in decays.items()}
            start = self._planner.start
            rank_zero_info(f"BatchSizeScheduler: {describe(trainer, start, plans, self.log_key_prefix)}")
        self._take(trainer, self.growth or self._plan_now(trainer))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loader is not None:
            self._loader.arrived(trainer)
        self._planner.now = read_sizes(trainer, self.dataset_size)
        self._steps.taken = []
        growth, self._prepared = self._prepared or self._plan_now(trainer), None
        self._take(trainer, growth)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps.after_batch(trainer, pl_module, batch_idx + 1, self._planner)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_epoch(pl_module, self.log_key_prefix, self._values(trainer))
        if self._loader is not None:
            self._prepared = self._planner.plan(self._decay(trainer.current_epoch + 1), "reload")
            if not self._planner.loads(self._prepared):
                self._loader.request(trainer, self._prepared.device_batch_size)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._leave(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._planner.start is None or self.growth is None:
            return {}
        return {
            "start": {**asdict(self._planner.start), "notes": ()},
            "start_batches": self._planner.start_batches,
            "growth": asdict(self.growth),
            "prepared": None if self._prepared is None else asdict(self._prepared),
            "peaks": self._decays.peaks,
            "schedule_steps": self._steps.taken,
            "limit_said": self._limit_said,
            "groups_differ": self._groups_differ,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._planner.start = Sizes(**state_dict["start"])
        self._planner.start_batches = state_dict["start_batches"]
        self.growth = BatchGrowth(**state_dict["growth"])
        self._prepared = None if state_dict["prepared"] is None else BatchGrowth(**state_dict["prepared"])
        self._decays.peaks = list(state_dict["peaks"])
        self._steps.taken = list(state_dict["schedule_steps"])
        self._limit_said, self._groups_differ = state_dict["limit_said"], state_dict["groups_differ"]
        if self._loader is not None:
            self._loader.requested = (self._prepared or self.growth).device_batch_size

    def learning_rate_in_step(self, group: Mapping[str, Any]) -> float:
        """The learning rate of a group in a step: the scheduler's own, times what the batch takes of its decay."""
        return self._learning_rate.in_step(group)

    def _decay(self, epoch: int) -> float:
        if self.milestones is not None:
            return decay_of(self.milestones, epoch)
        return self._decays.decay(self._learning_rate.scheduled())

    def _plan_now(self, trainer: Trainer) -> BatchGrowth:
        # The loader of this epoch is there already, so that more of its batches are what can be had.
        return self._planner.plan(self._decay(trainer.current_epoch), "accumulate")

    def _take(self, trainer: Trainer, growth: BatchGrowth) -> None:
        """Train on a batch from now on."""
        if not self._planner.loads(growth):  # a run that is resumed with another batch size
            growth = self._planner.plan(growth.decay, "accumulate")
        self.growth = growth
        trainer.accumulate_grad_batches = growth.accumulation
        # Nobody else decays the learning rate at milestones; a scheduler's decay is taken back as far as B has it.
        left = growth.learning_rate_gain if self.milestones is None else growth.learning_rate_factor
        self._learning_rate.multiplier = left
        if growth.limited and not self._limit_said:
            self._limit_said = True
            rank_zero_info(
                f"BatchSizeScheduler: from epoch {trainer.current_epoch} on the batch cannot take the whole decay: B "
                f"is {growth.batch_size} and stays within `max_batch_size` (N/10 unless it is given). The learning "
                "rate takes the rest."
            )

    def _values(self, trainer: Trainer) -> dict[str, float]:
        """B and the learning rate of the latest step; one for each group where they differ."""
        if self.growth is None or self._planner.now is None:
            return {}
        used = self._learning_rate.used or self._learning_rate.scheduled()
        # Once split, always split: groups that meet again for a moment would make keys come and go.
        self._groups_differ |= len(set(used)) > 1
        # The nominal batch can exceed a small training set, a step cannot.
        values = {"batch_size": float(min(self.growth.batch_size, self._planner.now.dataset_size))}
        if not self._groups_differ:
            return values | {"learning_rate": used[0]}
        names = group_names(trainer)
        return values | {f"learning_rate-{name}": rate for name, rate in zip(names, used, strict=True)}

    def _leave(self, trainer: Trainer) -> None:
        """The Trainer, its optimizers and the DataModule as they were."""
        self._learning_rate.remove()
        if self._loader is not None:
            self._loader.arrived(trainer)
            self._loader.remove()
            self._loader = None
        if self._own_accumulation is not None:
            trainer.accumulate_grad_batches = self._own_accumulation
            self._own_accumulation = None
