"""A random sample of the batches of a pass, and sums over all of them from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SEED = 0
"""Seed of the draw, which has a stream of its own."""
BASE_SHARE = 0.5
"""Share of the blocks that are read whose rows are the base."""


@dataclass(frozen=True)
class BlockSample:
    """Which batches of a pass have their rows read, by their numbers.

    Attributes:
        num_batches: Of the pass.
        base: Whose rows are kept together.
        held: A random sample of the others.
    """

    num_batches: int
    base: frozenset[int]
    held: frozenset[int]

    def role(self, index: int) -> bool | None:
        """Whether a batch is of the base; None for one that is not read."""
        if index in self.base:
            return True
        return False if index in self.held else None

    @property
    def in_order(self) -> list[bool]:
        """The roles of the batches that are read."""
        return [index in self.base for index in sorted(self.base | self.held)]


def draw_blocks(num_batches: int, num_blocks: int, seed: int | None = None) -> BlockSample:
    """Draw blocks without replacement; where as many are asked for as there are, all are of the base."""
    if num_blocks >= num_batches:
        return BlockSample(num_batches, frozenset(range(num_batches)), frozenset())
    generator = torch.Generator().manual_seed(SEED if seed is None else seed)
    drawn = torch.randperm(num_batches, generator=generator)[:num_blocks].tolist()
    size = max(1, int(BASE_SHARE * num_blocks))
    return BlockSample(num_batches, frozenset(drawn[:size]), frozenset(drawn[size:]))


def estimated_total(values: Sequence[float], population: int) -> tuple[float, float]:
    """Sum over a population from a simple random sample without replacement, and its standard error.

    M/h Σ f,  σ² = M² (1 − h/M) s²/h

    Args:
        values: f of the h that were drawn; one alone tells nothing of its error, which is then infinite.
        population: M.
    """
    number = len(values)
    if population == 0 or number == 0:
        return 0.0, 0.0 if population == 0 else torch.inf
    mean = sum(values) / number
    if number == population:
        return number * mean, 0.0
    if number == 1:
        return population * mean, torch.inf
    variance = sum((value - mean) ** 2 for value in values) / (number - 1)
    return population * mean, population * ((1.0 - number / population) * variance / number) ** 0.5
