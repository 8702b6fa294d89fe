"""What a run starts with and has at present, and the batches that follow from a decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_bayes.callbacks.trainer.settings import Sizes
from lightning_bayes.functional import BatchGrowth, grow_batch
from lightning_bayes.functional.batch_growth import GrowthMethod
from lightning_bayes.functional.scaling import Rule


@dataclass
class BatchPlanner:
    """`grow_batch` for the Trainer at hand.

    Attributes:
        max_batch_size: as in `grow_batch`.
        max_device_batch_size: as in `grow_batch`.
        rule: as in `grow_batch`.
        start: at the first step, however often the run is resumed; None before it.
        start_batches: of an epoch then; infinite where that is not known.
        now: in this epoch.
    """

    max_batch_size: int | None
    max_device_batch_size: int | None
    rule: Rule
    start: Sizes | None = None
    start_batches: float = 0.0
    now: Sizes | None = None

    def plan(self, decay: float, method: GrowthMethod) -> BatchGrowth:
        """The batch for a decay, of loaders' batches as they are now ("accumulate") or of larger ones."""
        if self.start is None or self.now is None:
            raise RuntimeError("BatchSizeScheduler plans between `on_train_start` and `on_train_end` only.")
        device = (self.now if method == "accumulate" else self.start).device_batch_size
        return grow_batch(
            decay,
            device_batch_size=device,
            accumulation=self.start.accumulation,
            replicas=self.now.replicas,
            dataset_size=self.now.dataset_size,
            batch_size=self.start.batch_size,
            max_batch_size=self.max_batch_size,
            max_device_batch_size=self.max_device_batch_size,
            method=method,
            rule=self.rule,
        )

    def plans(self, decays: Iterable[tuple[int, float]], method: GrowthMethod) -> Mapping[int, BatchGrowth]:
        """The batches from each of several epochs on."""
        return {epoch: self.plan(decay, method) for epoch, decay in decays}

    def loads(self, growth: BatchGrowth) -> bool:
        """Whether the loader of this epoch has the batches that a growth is made of."""
        return self.now is not None and growth.device_batch_size == self.now.device_batch_size
