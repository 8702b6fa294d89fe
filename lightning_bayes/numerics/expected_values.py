"""Expected values of a function of a count, by adding up its distribution."""

from collections.abc import Callable

import torch
from torch import Tensor

MISSED = 1e-10
"""Probability that the sum may leave out; what it misses of a bounded function is as small beside its bound."""
MOST_COUNTS = 2**20
AT_ONCE = 2**12


def expected_over_counts(
    log_density: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor], like: Tensor
) -> Tensor:
    """E[f(y)] over y = 0, 1, 2, … of many distributions at once, until all but `MISSED` of each has been counted.

    Args:
        log_density: ln p(y) of each distribution, for counts [k, 1, ...].
        function: f(y) of each, positive and falling.
        like: One number of each distribution.

    Raises:
        ValueError: If a distribution reaches too far to be added up.
    """
    total, probability = torch.zeros_like(like), torch.zeros_like(like)
    for start in range(0, MOST_COUNTS, AT_ONCE):
        counts = torch.arange(start, start + AT_ONCE, dtype=like.dtype, device=like.device)
        counts = counts.reshape(-1, *[1] * like.dim())
        p = log_density(counts).exp()
        total += (p * function(counts)).sum(0)
        probability += p.sum(0)
        # Rounding alone keeps a sum of float32 from 1 by more than that.
        missed = max(MISSED, 100 * torch.finfo(like.dtype).eps)
        if bool((probability >= 1 - missed).all()):
            return total
    raise ValueError(
        f"A distribution of counts reaches beyond {MOST_COUNTS:,}, too far to be added up for its Fisher information."
    )
