"""What the figures about the evidence run: 1, 2, (a), (b), (c) and (e)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PAPER_EVIDENCE", "QUICK_EVIDENCE", "EvidencePreset"]


@dataclass(frozen=True)
class EvidencePreset:
    """The settings of figures 1 and 2, and of (a), (b), (c) and (e).

    Attributes:
        logistic_seeds: repeats of figures 1 and 2, which are cheap.
        logistic_examples: N of figures 1 and 2.
        logistic_precisions: λ of figures 1 and 2, ascending.
        lightning_precision: the one of them that is fitted by a Trainer as well.
        net_seeds: repeats of the fitted nets, (a), (b), and of (c).
        net_examples: N of the nets.
        net_hidden: units of their hidden layer.
        net_precisions: λ of (b), ascending.
        random_precisions: those of them at which random labels are fitted too, for (a).
        sharpness_batches: of (c), ascending.
        sharpness_rate: ε of (c); m is 0.9.
        sharpness_loss: the training loss at which its nets are compared, nats per example.
        sharpness_precision: λ of the prior of (c), which is trained without L2.
        langevin_seeds: repeats of (e).
        langevin_precisions: its λ, ascending.
        langevin_chains: at once.
        langevin_times: time sampled, in units of the slowest relaxation, 1/λ; half as much again before it.
    """

    logistic_seeds: int
    logistic_examples: int
    logistic_precisions: Sequence[float]
    lightning_precision: float
    net_seeds: int
    net_examples: int
    net_hidden: int
    net_precisions: Sequence[float]
    random_precisions: Sequence[float]
    sharpness_batches: Sequence[int]
    sharpness_rate: float
    sharpness_loss: float
    sharpness_precision: float
    langevin_seeds: int
    langevin_precisions: Sequence[float]
    langevin_chains: int
    langevin_times: float


def _spaced(first: int, last: int, per_decade: int) -> tuple[float, ...]:
    """λ from 10^first to 10^last, as one would write them down."""
    count = (last - first) * per_decade + 1
    return tuple(float(f"{10 ** (first + place / per_decade):.3g}") for place in range(count))


QUICK_EVIDENCE = EvidencePreset(
    logistic_seeds=6,
    logistic_examples=200,
    logistic_precisions=_spaced(-4, 5, 1),
    lightning_precision=10.0,
    net_seeds=3,
    net_examples=300,
    net_hidden=800,
    net_precisions=_spaced(-1, 2, 2),
    random_precisions=(0.1, 1.0),
    sharpness_batches=(16, 32, 64, 128, 300),
    sharpness_rate=0.1,
    sharpness_loss=0.02,
    sharpness_precision=1.0,
    langevin_seeds=4,
    langevin_precisions=(100.0, 1000.0),
    langevin_chains=32,
    langevin_times=20.0,
)
PAPER_EVIDENCE = EvidencePreset(
    logistic_seeds=10,
    logistic_examples=800,
    logistic_precisions=_spaced(-4, 5, 2),
    lightning_precision=10.0,
    net_seeds=5,
    net_examples=1000,
    net_hidden=800,
    net_precisions=_spaced(-2, 2, 2),
    random_precisions=(0.01, 0.1, 1.0, 10.0),
    sharpness_batches=(16, 32, 64, 128, 256, 512, 1000),
    sharpness_rate=0.1,
    sharpness_loss=0.02,
    sharpness_precision=1.0,
    langevin_seeds=5,
    langevin_precisions=(10.0, 100.0, 1000.0),
    langevin_chains=64,
    langevin_times=20.0,
)
