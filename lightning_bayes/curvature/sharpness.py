"""The largest loss in a small box about the weights, as far as a few steps of L-BFGS-B find it."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor

from lightning_bayes.curvature.mean_loss import MeanLoss

__all__ = ["BOX", "Rise", "largest_loss_in_box"]

BOX = 1e-3
"""ε of Keskar et al., who also take 5e-4."""
ITERATIONS = 10
"""Of L-BFGS-B, as theirs."""


@dataclass(frozen=True)
class Rise:
    """The loss at the weights, and the largest that was found near them."""

    loss: float
    largest: float


def largest_loss_in_box(function: MeanLoss, direction: Tensor, box: float = BOX) -> Rise:
    """Maximise f(x + y) over |yᵢ| ≤ ε (|xᵢ| + 1), in all p coordinates (A = I), by 10 iterations of L-BFGS-B.

    A minimum x is a stationary point, from which no ascent starts, and the loss of a well trained network is nearly one.
    The ascent therefore starts in the corner of the box to which the eigenvector of the largest
    curvature points: y = ±ε (|x| + 1) sign(v), the sign that has the larger loss.

    Args:
        function: f, at x.
        direction: v, [p].
        box: ε.

    Returns:
        The loss at x, and the largest that was found: a lower bound on the largest in the box.
    """
    start = function.flat()
    half_width = box * (start.abs() + 1.0)
    corner = torch.where(direction >= 0.0, half_width, -half_width)
    best = loss = function.value()

    def descend(shift: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        with function.moved_to(start + torch.from_numpy(shift).to(start)):
            value, gradient = function.value_and_gradient()
        best = max(best, value)
        return -value, -gradient.double().cpu().numpy()

    values = []
    for sign in (1.0, -1.0):
        with function.moved_to(start + sign * corner):
            values.append(function.value())
    best = max(best, *values)
    ends = half_width.double().cpu().numpy()
    minimize(
        descend,
        (corner if values[0] >= values[1] else -corner).double().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(-ends, ends),
        options={"maxiter": ITERATIONS},
    )
    return Rise(loss, best)
