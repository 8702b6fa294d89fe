"""Squared norms of gradients of two batch sizes, over all processes: what every way of measuring comes down to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_bayes.functional import GradientNoise, gradient_noise_scale_from_batches
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.rows.example_gradients import GradientSums


@dataclass(frozen=True)
class TwoBatchSizes:
    """Mean squared norms, by parameter, of gradients of b examples, and that of their mean over B.

    Attributes:
        small: mean ‖g_b‖² of each parameter, P of them.
        small_size: b; the harmonic mean where gradients are of unequal sizes.
        large: ‖g_B‖² of each parameter.
        large_size: B.
    """

    small: Sequence[float]
    small_size: float
    large: Sequence[float]
    large_size: float

    def noise(self, part_of: Sequence[int], num_parts: int) -> list[GradientNoise] | None:
        """The noise in each part of the parameters; None unless every norm is finite.

        Args:
            part_of: number of the part that each parameter belongs to, P of them.
            num_parts: how many there are.
        """
        small, large = [0.0] * num_parts, [0.0] * num_parts
        for part, of_small, of_large in zip(part_of, self.small, self.large, strict=True):
            small[part] += of_small
            large[part] += of_large
        if not all(map(math.isfinite, small + large)):
            return None
        return [
            # Rounding may leave a squared norm from pairs of examples a little below 0.
            gradient_noise_scale_from_batches(max(b, 0.0), self.small_size, max(B, 0.0), self.large_size)
            for b, B in zip(small, large, strict=True)
        ]


def scaled(sums: GradientSums, factor: float) -> GradientSums:
    """The sums of gradients that are so many times as large."""
    return GradientSums(
        sums.num_gradients,
        sums.inverse_sizes,
        [factor**2 * square for square in sums.squares],
        [factor**2 * square for square in sums.squared_totals],
        None if sums.totals is None else [total * factor for total in sums.totals],
    )


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
        device = sums.totals[0].device
        added = torch.tensor(
            [*squares, number, inverse_sizes], dtype=accumulation_dtype(device), device=device
        )
        *squares, number, inverse_sizes = reduced(trainer, added).tolist()
        total = reduced(trainer, torch.cat(sums.totals))
        parts = total.split([len(part) for part in sums.totals])
        squared_totals = torch.stack([part.square().sum() for part in parts]).tolist()
    if number < 2:
        return None
    size = number / inverse_sizes
    small = [square / number for square in squares]
    large = [square / number**2 for square in squared_totals]
    return TwoBatchSizes(small, size, large, number * size)


def reduced(trainer: Trainer, tensor: Tensor) -> Tensor:
    """The sum over processes."""
    total: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
    return total
