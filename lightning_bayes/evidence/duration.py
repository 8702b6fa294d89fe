"""How many seconds an evaluation will take, from one batch that is timed and one matrix product."""

import time

import torch

from lightning_bayes.structures.base import Problem
from lightning_bayes.structures.blocks_budget import blocks_cost
from lightning_bayes.structures.registry import full_cost

CALIBRATION_SIZE = 768
"""Rows of the square matrices whose product is timed."""
EIGEN = 12.0
"""Multiplications of a product that an eigendecomposition of equal size takes as long as, in units of n³."""
SEARCH = 4.0
"""Factorisations that a search for the prior takes."""


def evaluation_seconds(problem: Problem, structure: str, read: float) -> float:
    """Seconds of a pass and of the structure's answers.

    Args:
        problem: Sizes.
        structure: That is taken.
        read: Seconds of reading one batch.
    """
    batches = problem.num_examples / problem.batch_size
    return batches * read + _structure_flop(problem, structure) / _rate(problem.dtype, problem.device)


def _structure_flop(problem: Problem, structure: str) -> float:
    if problem.curvature != "ggn":  # all eigenvalues, twice
        return 2.0 * EIGEN * problem.num_parameters**3
    if structure == "full":
        return full_cost(problem)[1] * (SEARCH if problem.sought else 1.0)
    if structure == "blocks":
        return blocks_cost(problem)[1]
    if structure == "diag":
        return float(problem.num_rows) * problem.num_parameters
    flop = 0.0
    for shape in problem.shapes.values():
        out, width = (shape[0], shape[1:].numel()) if len(shape) > 1 else (shape.numel(), 1)
        flop += problem.num_rows * float(out) ** 2 + problem.num_examples * float(width) ** 2
        flop += EIGEN * (
            float(min(out, problem.num_rows)) ** 3 + float(min(width, problem.num_examples)) ** 3
        )
    return flop


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications a second of a matrix product; random state is left alone."""
    matrix = torch.full((CALIBRATION_SIZE, CALIBRATION_SIZE), 0.5, dtype=dtype, device=device)
    times = []
    for _ in range(2):  # the first wakes threads up
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        times.append(time.perf_counter() - start)
    return CALIBRATION_SIZE**3 / max(min(times), 1e-9)
