"""What each figure runs: the grids, and how long to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.evidence_presets import PAPER_EVIDENCE, QUICK_EVIDENCE, EvidencePreset

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """The settings of all figures.

    Attributes:
        name: of the preset, and of its folder of results.
        seeds: repeats of each run of figures 3 to 7.
        num_examples: N, except in figure 6.
        learning_rate: ε, except in figure 5.
        momentum: m, except in figure 7.
        training_time: T = ε × steps, the same for all runs.
        batch_sizes: of figure 4.
        around: batch sizes about the best one at the N, ε and m above; figures 5 and 7 move them as the paper
            predicts, so that every peak lies inside its grid.
        learning_rates: of figure 5.
        too_large: learning rates of figure 5 at which accuracy drops, left out of the slope.
        longer: the learning rate of figure 5 that is also trained for 2T.
        momenta: of figure 7.
        by_num_examples: of figure 6: N to its batch sizes.
        small_batch: of figure 3, against the full batch.
        prior_precisions: of figure 3: λ = N · weight_decay.
        points: of figure 3's curves.
        evidence: the settings of figures 1 and 2, and of (a), (b), (c) and (e).
    """

    name: str
    seeds: int
    num_examples: int
    learning_rate: float
    momentum: float
    training_time: float
    batch_sizes: Sequence[int]
    around: Sequence[int]
    learning_rates: Sequence[float]
    too_large: Sequence[float]
    longer: float
    momenta: Sequence[float]
    by_num_examples: Mapping[int, Sequence[int]]
    small_batch: int
    prior_precisions: Sequence[float]
    points: int
    evidence: EvidencePreset

    def repeated(self, seeds: int) -> Preset:
        """The same with as many repeats of everything."""
        evidence = replace(self.evidence, logistic_seeds=seeds, net_seeds=seeds, langevin_seeds=seeds)
        return replace(self, seeds=seeds, evidence=evidence)

    def run(
        self,
        batch_size: int,
        seed: int,
        *,
        num_examples: int | None = None,
        learning_rate: float | None = None,
        momentum: float | None = None,
        prior_precision: float = 0.0,
        times: float = 1.0,
    ) -> Run:
        """A run with this preset's settings but for those given.

        Args:
            batch_size: B.
            seed: of everything random.
            num_examples: N.
            learning_rate: ε; the number of steps is T/ε.
            momentum: m.
            prior_precision: λ = N · weight_decay.
            times: training time in units of T.

        Returns:
            The run.
        """
        examples = num_examples or self.num_examples
        rate = learning_rate or self.learning_rate
        return Run(
            num_examples=examples,
            batch_size=batch_size,
            learning_rate=rate,
            momentum=self.momentum if momentum is None else momentum,
            weight_decay=prior_precision / examples,
            steps=round(times * self.training_time / rate),
            seed=seed,
        )

    def batch_sizes_about(
        self, *, learning_rate: float | None = None, momentum: float | None = None
    ) -> list[int]:
        """Batch sizes `around` times ε/(1 - m) in units of this preset's; whole, from 1 to N.

        Args:
            learning_rate: ε.
            momentum: m.

        Returns:
            Batch sizes, ascending.
        """
        rate = (learning_rate or self.learning_rate) / self.learning_rate
        mass = (1 - self.momentum) / (1 - (self.momentum if momentum is None else momentum))
        moved = {max(1, round(size * rate * mass)) for size in self.around}
        return sorted(size for size in moved if size <= self.num_examples)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="quick",
            seeds=4,
            num_examples=1000,
            learning_rate=0.2,
            momentum=0.9,
            training_time=100,
            batch_sizes=(4, 8, 16, 32, 64, 128, 256, 1000),
            around=(24, 32, 48, 64, 96, 128),
            learning_rates=(0.1, 0.2, 0.4, 0.8),
            too_large=(1.6,),
            longer=0.2,
            momenta=(0.6, 0.8, 0.9, 0.95),
            by_num_examples={
                500: (24, 32, 48, 64, 96),
                1000: (32, 48, 64, 96, 128),
                2000: (32, 48, 64, 96, 128),
                4000: (48, 64, 96, 128, 192),
            },
            small_batch=60,
            prior_precisions=(0.0, 1.0, 10.0),
            points=12,
            evidence=QUICK_EVIDENCE,
        ),
        Preset(
            name="paper",
            seeds=5,
            num_examples=1000,
            learning_rate=0.1,
            momentum=0.9,
            training_time=200,
            batch_sizes=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1000),
            around=(8, 12, 16, 24, 32, 48, 64, 128),
            learning_rates=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
            too_large=(1.6,),
            longer=0.1,
            momenta=(0.6, 0.8, 0.9, 0.95, 0.975),
            by_num_examples={
                1000: (12, 16, 24, 32, 48),
                2500: (16, 24, 32, 48, 64),
                5000: (16, 24, 32, 48, 64, 96),
                10_000: (24, 32, 48, 64, 96, 128, 192),
                20_000: (32, 48, 64, 96, 128, 192, 256),
                35_000: (48, 64, 96, 128, 192, 256, 384),
                50_000: (64, 96, 128, 192, 256, 384, 512, 768),
            },
            small_batch=30,
            prior_precisions=(0.0, 0.1, 1.0, 10.0),
            points=40,
            evidence=PAPER_EVIDENCE,
        ),
    )
}
