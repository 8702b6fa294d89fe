"""The structures by name, and the choice between them."""

import warnings
from collections.abc import Callable

from lightning_bayes.numerics.devices import total_memory
from lightning_bayes.structures.base import Curvature, Problem
from lightning_bayes.structures.blocks_budget import blocks_cost
from lightning_bayes.structures.blocks_sampled import block_curvature
from lightning_bayes.structures.diagonal import DiagonalCurvature
from lightning_bayes.structures.full import full_cost, full_curvature
from lightning_bayes.structures.kronecker import (
    KroneckerCurvature,
    expand_kronecker_curvature,
    joint_kronecker_curvature,
)

STRUCTURES: dict[str, Callable[[Problem], Curvature]] = {
    "full": full_curvature,
    "blocks": block_curvature,
    "kron": KroneckerCurvature,
    "kron_joint": joint_kronecker_curvature,
    "kron_expand": expand_kronecker_curvature,
    "diag": DiagonalCurvature,
}

AUTO_MEMORY = 2e9
"""Bytes that "auto" lets the exact matrix and its rows take."""
AUTO_FLOP = 1.5e12
"""Operations that "auto" lets the exact matrix take: about fifteen seconds on two CPU cores."""


def choose_structure(structure: str, problem: Problem) -> tuple[str, str]:
    """Resolve "auto", and announce what will be slow.

    Args:
        structure: "auto" or a key of `STRUCTURES`.
        problem: Sizes of what is to be computed.

    Returns:
        The structure, and a sentence that says why.

    Raises:
        ValueError: If a bracket is beyond the budget of "auto"; if "full" was asked for and cannot fit in the
            machine's memory; if "full" or "blocks" was asked for where columns are sampled, or "blocks" where
            several prior precisions are to be found.
    """
    memory, flop = full_cost(problem)
    sizes = (
        f"{problem.num_parameters:,} parameters, {problem.num_rows:,} rows: exact takes about "
        f"{_readable(memory, 'B')} and {_readable(flop, 'FLOP')}"
    )
    cheaper = 'structure="kron", structure="diag" or max_examples='
    if structure == "auto":
        return _within_budget(problem, sizes)
    if problem.sampled and structure in ("full", "blocks"):
        raise ValueError(
            f"structure={structure!r} needs all columns of the Hessian's root, and they are sampled. Use "
            'structure="kron" or structure="diag".'
        )
    if structure == "blocks" and not problem.rises_together:
        raise ValueError(
            'structure="blocks" drops rows as they come, for prior precisions in fixed proportions, and several are '
            'to be found. Use prior_precision="optimize" for one, or structure="full" or structure="kron".'
        )
    if structure == "blocks" and problem.block_sample is None and _is_cheaper(problem):
        sizes += "; less than the bounds take, so structure='full' is quicker here and has no bounds to need"
    if structure == "full" and memory > total_memory(problem.device):
        raise ValueError(f'structure="full" does not fit on {problem.device}: {sizes}. Use {cheaper}.')
    if structure == "full" and flop > AUTO_FLOP:
        warnings.warn(f'structure="full" will be slow: {sizes}. Faster: {cheaper}.', stacklevel=3)
    return structure, sizes


def _within_budget(problem: Problem, sizes: str) -> tuple[str, str]:
    """The first of "full", "blocks" and "kron" that the budget allows."""
    budget = f"the budget of {_readable(AUTO_MEMORY, 'B')} and {_readable(AUTO_FLOP, 'FLOP')}"
    overrides = 'structure="full" or max_examples= overrides'
    if problem.sampled:
        return "kron", f"{sizes}, but its columns are sampled, from which there is no exact matrix"
    if _fits(*full_cost(problem)):
        return "full", f"{sizes}, within {budget}"
    if problem.tolerance is not None:
        raise ValueError(
            f"tolerance={problem.tolerance:g} is not to be had within {budget}: {sizes}. structure='full' tries it "
            "all the same, max_examples= takes fewer examples; without tolerance= the bounds are as wide as they are."
        )
    if problem.rises_together and _fits(*blocks_cost(problem)) and not _is_cheaper(problem):
        return "blocks", f"{sizes}, beyond {budget}, which allows bounds from the largest rows; {overrides}"
    return "kron", f"{sizes}, beyond {budget}; {overrides}"


def _is_cheaper(problem: Problem) -> bool:
    """Whether the exact matrix takes less than the bounds of "blocks"."""
    exact, bounds = full_cost(problem), blocks_cost(problem)
    return exact[0] <= max(bounds[0], AUTO_MEMORY) and exact[1] <= bounds[1]


def _fits(memory: float, flop: float) -> bool:
    return memory <= AUTO_MEMORY and flop <= AUTO_FLOP


def _readable(amount: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if amount < 1000:
            return f"{amount:.3g} {prefix}{unit}"
        amount /= 1000
    return f"{amount:.3g} T{unit}"
