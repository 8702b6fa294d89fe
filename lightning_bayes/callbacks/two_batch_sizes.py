"""Squared norms of gradients of two batch sizes, over all processes: what every way of measuring comes down to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_bayes.curvature.example_gradients import GradientSums
from lightning_bayes.functional import GradientNoise, gradient_noise_scale_from_batches


@dataclass(frozen=True)
class TwoBatchSizes:
    """Mean squared norms, by parameter, of gradients of b examples, and that of their mean over B.

    Attributes:
        small: mean ‖g_b‖² of each parameter, [P].
        small_size: b; the harmonic mean where gradients are of unequal sizes.
        large: ‖g_B‖² of each parameter, [P].
        large_size: B.
    """

    small: Tensor
    small_size: float
    large: Tensor
    large_size: float

    def noise(self, part_of: Tensor, num_parts: int) -> list[GradientNoise] | None:
        """The noise in each part of the parameters; None unless every norm is finite.

        Args:
            part_of: number of the part that each parameter belongs to, [P].
            num_parts: how many there are.
        """
        both = torch.stack([self.small, self.large])
        sums = both.new_zeros(2, num_parts).index_add_(1, part_of.to(both.device), both)
        if not bool(sums.isfinite().all()):
            return None
        return [
            # Rounding may leave a squared norm from pairs of examples a little below 0.
            gradient_noise_scale_from_batches(
                max(small, 0.0), self.small_size, max(large, 0.0), self.large_size
            )
            for small, large in zip(*sums.tolist(), strict=True)
        ]


def pooled(trainer: Trainer, sums: GradientSums) -> TwoBatchSizes | None:
    """Put the gradients of all processes together.

    Args:
        trainer: Read only; its strategy adds up.
        sums: of this process; with `totals` if there are others.

    Returns:
        None where there are fewer than two gradients in all.
    """
    squares, squared_totals = sums.squares, sums.squared_totals
    number, inverse_sizes = float(sums.num_gradients), sums.inverse_sizes
    if trainer.world_size > 1:
        if sums.totals is None:
            raise ValueError("Gradients of several processes are put together by their `totals`.")
        counts = torch.tensor([number, inverse_sizes], dtype=squares.dtype, device=squares.device)
        added = reduced(trainer, torch.cat([squares, counts]))
        squares, (number, inverse_sizes) = added[:-2], added[-2:].tolist()
        total = reduced(trainer, torch.cat(sums.totals))
        lengths = [len(total) for total in sums.totals]
        squared_totals = torch.stack([p.square().sum(dtype=squares.dtype) for p in total.split(lengths)])
    if number < 2:
        return None
    size = number / inverse_sizes
    return TwoBatchSizes(squares / number, size, squared_totals / number**2, number * size)


def reduced(trainer: Trainer, tensor: Tensor) -> Tensor:
    """The sum over processes."""
    total: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
    return total
