"""Averages the two parts of the gradient noise over steps, apart from each other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_bayes.functional import GradientNoise
from lightning_bayes.functional._validation import count, fraction


class GradientNoiseMetric(Metric):
    r"""Exponential moving averages of tr Σ and ‖G‖², bias-corrected as Adam's are; their ratio is taken last.

    mₜ = ρ mₜ₋₁ + (1 - ρ) xₜ,    wₜ = ρ wₜ₋₁ + (1 - ρ),    average = mₜ / wₜ

    Both are linear in what is measured, and stay unbiased; a ratio that is averaged, or a ‖G‖² that is
    clamped at 0 before, does not.

    Args:
        ema: ρ, in [0, 1): the average reaches back over about 1/(1 - ρ) measurements. 0 keeps the last one.
        num_parts: parts that the parameters are measured in, such as layers; tr Σ and ‖G‖² add up over them.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: naming the argument that is outside its domain.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    sums: Tensor
    weight: Tensor

    def __init__(self, ema: float = 0.95, num_parts: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ema = fraction("ema", ema)
        self.num_parts = count("num_parts", num_parts)
        # Means over processes: what each of them averages is unbiased, and so is the mean.
        zeros = torch.zeros(2, self.num_parts, dtype=torch.float64)  # tr Σ and ‖G‖² of each part
        self.add_state("sums", zeros, dist_reduce_fx="mean", persistent=True)
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean", persistent=True)

    def update(self, noise: Sequence[GradientNoise]) -> None:
        """Take in one measurement.

        Args:
            noise: of each part; a ‖G‖² below 0 counts as it is.
        """
        measured = [[part.trace for part in noise], [part.squared_norm for part in noise]]
        gain = 1.0 - self.ema
        self.sums.lerp_(torch.tensor(measured, dtype=self.sums.dtype, device=self.sums.device), gain)
        self.weight.mul_(self.ema).add_(gain)

    def compute(self) -> Tensor:
        """The averages of tr Σ and ‖G‖² of all parameters and their ratio B_simple, `[3]`, over processes as well."""
        trace, squared_norm = self._averages().sum(1).unbind()
        ratio = torch.where(squared_norm > 0, trace / squared_norm, torch.nan)
        return torch.stack([trace, squared_norm, ratio])

    def total(self) -> GradientNoise | None:
        """The noise in all parameters, of this process; None before the first measurement."""
        if self.weight.item() == 0.0:
            return None
        trace, squared_norm = self._averages().sum(1).tolist()
        return GradientNoise.of(trace, squared_norm)

    def parts(self) -> list[GradientNoise]:
        """The noise in each part, of this process; empty before the first measurement."""
        if self.weight.item() == 0.0:
            return []
        return [GradientNoise.of(*pair) for pair in self._averages().T.tolist()]

    def _averages(self) -> Tensor:
        return self.sums / self.weight
