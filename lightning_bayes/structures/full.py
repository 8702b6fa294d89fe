"""The whole generalized Gauss-Newton matrix, nothing dropped, through whichever side is cheaper.

Primal: G = VᵀV [p, p]. Dual: K = V Λ⁻¹ Vᵀ [rows, rows]. With a tolerance, a certified bracket in their place
where it is cheaper still.
"""

import torch

from lightning_bayes.structures.base import Curvature, Problem
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.dual_system import SMALL
from lightning_bayes.structures.primal import KEPT_ROWS, PrimalCurvature


def full_curvature(problem: Problem) -> Curvature:
    """Return the exact structure that takes fewer operations, or a bracket about it if one is accepted."""
    if _primal_cost(problem)[1] <= _dual_cost(problem)[1]:
        return PrimalCurvature(problem)
    return DualCurvature(problem) if problem.tolerance is None else BracketCurvature(problem)


def full_cost(problem: Problem) -> tuple[float, float]:
    """Bytes and floating-point operations of what `full_curvature` returns."""
    return min(_primal_cost(problem), _dual_cost(problem), key=lambda cost: cost[1])


def _primal_cost(problem: Problem) -> tuple[float, float]:
    p, rows = problem.num_parameters, problem.num_rows
    # G, scaled, its factor and inverse; the rows of one batch, apart and together; those that are kept.
    batch = 2.0 * problem.batch_size * problem.rank * p * problem.dtype.itemsize
    kept = min(rows, KEPT_ROWS * p) * p * 2 * problem.dtype.itemsize  # as they came, and put together
    in_float64 = 2.0 if rows > KEPT_ROWS * p and problem.dtype != torch.float64 else 1.0
    return 4.0 * 8 * p**2 + batch + kept, in_float64 * (rows * p**2 + p**3)


def _dual_cost(problem: Problem) -> tuple[float, float]:
    rows, itemsize = problem.num_rows, problem.dtype.itemsize
    matrix = 2 * 8 if rows <= SMALL else itemsize  # with the inverse, or without
    # The rows as they came, put together, and in float64 for the Newton decrement.
    kept = rows * problem.kept_width * (2 * itemsize + 8)
    cubes = 1.0 if rows <= SMALL else 1 / 3  # the same
    return float(rows) ** 2 * matrix + kept, float(rows) ** 2 * problem.gram_width + cubes * rows**3
