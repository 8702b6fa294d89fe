"""What each parameter group did over a run, kept at its peak learning rate."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_bayes.advice.checkpoints import peak_from
from lightning_bayes.callbacks.trainer.settings import TrainerConfiguration
from lightning_bayes.functional import AdamConfiguration, Configuration

FOLLOWED = ("learning_rate", "batch_size", "dataset_size", "momentum", "betas")


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
        for name in FOLLOWED:
            if getattr(configuration, name, None) != getattr(self.peak, name, None):
                self.changed.add(name)
        if configuration.learning_rate >= self.peak.learning_rate:
            self.peak = configuration

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "adaptive": isinstance(self.peak, AdamConfiguration),
            "peak": asdict(self.peak),
            "changed": sorted(self.changed),
        }

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> "PeakRecord":
        """What `state_dict` gave."""
        return PeakRecord(peak_from(state), set(state["changed"]))


def note_step(records: dict[str, PeakRecord], configuration: TrainerConfiguration) -> None:
    """Takes one optimizer step of every parameter group into account."""
    for group in configuration.groups:
        records.setdefault(group.name, PeakRecord(group.configuration)).update(group.configuration)
