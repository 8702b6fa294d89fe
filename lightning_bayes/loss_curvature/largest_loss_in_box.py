"""The largest loss in a small box about the weights, as far as a few steps of L-BFGS-B find it."""

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor

from lightning_bayes.loss_curvature.mean_loss import MeanLoss

BOX = 1e-3
"""ε of Keskar et al., who also take 5e-4."""
ITERATIONS = 10
"""Iterations of L-BFGS-B, as many as theirs."""


def largest_loss_in_box(function: MeanLoss, direction: Tensor, box: float = BOX) -> tuple[float, float]:
    """Maximise f(x + y) over |yᵢ| ≤ ε (|xᵢ| + 1), in all p coordinates (A = I), by 10 iterations of L-BFGS-B.

    A minimum is a stationary point, from which no ascent starts, and a well trained network is nearly at one. The
    ascent therefore starts in a corner of the box, the one with the largest loss of three: where the gradient
    points, y = ε (|x| + 1) sign(∇f), and to both sides where the eigenvector of the largest curvature does.

    Args:
        function: f, at x.
        direction: v, [p].
        box: ε.

    Returns:
        The loss at x, and the largest that was found: a lower bound on the largest in the box.
    """
    center = function.flat()
    half_width = box * (center.abs() + 1.0)
    loss, gradient = function.value_and_gradient()
    best = loss

    def at(shift: Tensor) -> tuple[float, Tensor]:
        nonlocal best
        with function.moved_to(center + shift):
            value, slope = function.value_and_gradient()
        best = max(best, value)
        return value, slope

    def negative(shift: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = at(torch.from_numpy(shift).to(center))
        return -value, -_numpy(slope)

    corners = [
        torch.where(vector >= 0.0, half_width, -half_width) for vector in (gradient, direction, -direction)
    ]
    start = max(corners, key=lambda corner: at(corner)[0])
    ends = _numpy(half_width)
    minimize(
        negative,
        _numpy(start),
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(-ends, ends),
        options={"maxiter": ITERATIONS},
    )
    return loss, best


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()
