"""The structures by name, the choice between them, and what they take."""

import time
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from lightning_bayes.structures.base import MINUTE, Budget, Curvature, Problem, total_memory
from lightning_bayes.structures.blocks import BlockCurvature
from lightning_bayes.structures.blocks_budget import blocks_cost
from lightning_bayes.structures.blocks_sampled import SampledBlockCurvature
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.diagonal import DiagonalCurvature
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.hessian import HessianCurvature
from lightning_bayes.structures.kronecker import KroneckerCurvature
from lightning_bayes.structures.lanczos.cost import lanczos_flop
from lightning_bayes.structures.lanczos.estimate import SampledLogDet
from lightning_bayes.structures.lanczos.parameter_space import ParameterSpaceLanczos
from lightning_bayes.structures.lanczos.row_space import RowSpaceLanczos
from lightning_bayes.structures.primal import PrimalCurvature

DEFAULT_SAMPLES = 64
"""Columns that "auto" samples of more outputs than `Budget.columns`, where all are beyond its budget."""
ROOT_COPIES = 3.0
"""Copies of the root of one batch that exist while it is formed."""
CALIBRATION_SIZE = 768
"""Rows of the square matrices whose product is timed."""
EIGEN = 12.0
"""Time of an eigendecomposition n × n, in units of n³ multiplications of a matrix product."""
SEARCH = 4.0
"""Factorisations that a search for the prior takes."""
LANCZOS_SEARCH = 2.5
"""The same of all vectors: a search takes few of them."""
BACKWARD_FLOP = 1e8
"""Operations that one call of a backward pass counts as, however little it does: about a millisecond."""


def full_curvature(problem: Problem) -> Curvature:
    """Return the whole matrix, nothing dropped, through whichever side takes fewer operations.

    Primal: G = VᵀV [p, p]. Dual: K = V Λ⁻¹ Vᵀ [rows, rows], or with a tolerance a certified bracket about it, where
    that is cheaper still. The true Hessian has one side.
    """
    if problem.curvature != "ggn":
        return HessianCurvature(problem)
    if _primal_cost(problem)[1] <= _dual_cost(problem)[1]:
        return PrimalCurvature(problem)
    return DualCurvature(problem) if problem.tolerance is None else BracketCurvature(problem)


def block_curvature(problem: Problem) -> Curvature:
    """Return the bounds from all rows, or from those of a sample of the batches."""
    return BlockCurvature(problem) if problem.block_sample is None else SampledBlockCurvature(problem)


def lanczos_curvature(problem: Problem) -> SampledLogDet:
    """Return the estimate in the space of rows, or in that of parameters where not all columns are read."""
    return ParameterSpaceLanczos(problem) if problem.by_products else RowSpaceLanczos(problem)


STRUCTURES: dict[str, Callable[[Problem], Curvature]] = {
    "full": full_curvature,
    "lanczos": lanczos_curvature,
    "blocks": block_curvature,
    "kron": KroneckerCurvature,
    "kron_joint": partial(KroneckerCurvature, joint=True),
    "kron_expand": partial(KroneckerCurvature, expand=True),
    "diag": DiagonalCurvature,
}


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
    p, rows, available = problem.num_parameters, problem.num_rows, total_memory(problem.device)
    if problem.curvature != "ggn":
        return "full", f"The Hessian of {p:,} parameters is dense"
    memory, flop = full_cost(problem)
    takes = f"{_readable(memory, 'B')} and {_readable(flop, 'FLOP')}"
    sizes = f"{p:,} parameters, {rows:,} rows: exact takes about {takes}"
    cheaper = 'structure="kron", structure="diag" or max_examples='
    if structure == "auto":
        return _within_budget(problem, sizes)
    if problem.sampled and structure in ("full", "blocks"):
        raise ValueError(
            f"structure={structure!r} needs all columns of the Hessian's root, and they are sampled. Use "
            'structure="kron" or structure="diag".'
        )
    if structure in ("blocks", "lanczos") and not problem.rises_together:
        raise ValueError(
            f'structure="{structure}" selects rows as they come, for prior precisions in fixed proportions, and '
            'several are to be found. Use prior_precision="optimize" for one, or structure="full" or '
            'structure="kron".'
        )
    if structure == "blocks" and problem.block_sample is None and _is_cheaper(problem):
        sizes += "; less than the bounds take, so structure='full' is quicker here and has no bounds to need"
    if structure == "full" and memory > available:
        raise ValueError(f'structure="full" does not fit on {problem.device}: {sizes}. Use {cheaper}.')
    if structure == "full" and structure_seconds(problem, structure) > problem.seconds:
        warnings.warn(f'structure="full" will be slow: {sizes}. Faster: {cheaper}.', stacklevel=3)
    return structure, sizes


def _within_budget(problem: Problem, sizes: str) -> tuple[str, str]:
    """The first of "full", "lanczos" and "kron" that the budget allows."""
    budget = f"the budget of {_readable(problem.budget.memory, 'B')} and {problem.seconds:.3g} s"
    overrides = 'structure="full" or max_examples= overrides'
    if problem.sampled:
        return "kron", f"{sizes}, but its columns are sampled, from which there is no exact matrix"
    exact = structure_seconds(problem, "full")
    if full_cost(problem)[0] <= problem.budget.memory and exact <= problem.seconds:
        return "full", f"{sizes}, within {budget}"
    if problem.tolerance is not None:
        raise ValueError(
            f"tolerance={problem.tolerance:g} is not to be had within {budget}: {sizes}. structure='full' tries it "
            "all the same, max_examples= takes fewer examples; without tolerance= the bounds are as wide as they are."
        )
    beyond = f"{sizes}, beyond {budget}"
    if not problem.rises_together:
        return "kron", f"{beyond}; {overrides}"
    seconds = structure_seconds(problem, "lanczos")
    if seconds <= problem.seconds:
        return "lanczos", (
            f"{beyond}, which allows {problem.num_probes} random vectors for what the largest rows leave (about "
            f"{seconds:.2g} s); {overrides}"
        )
    return "kron", (
        f"{beyond}; structure='lanczos' gives the exact value with a standard error in about {_duration(seconds)}, "
        "max_examples= takes fewer examples; num_probes= and max_stderr= have no effect on 'kron'"
    )


def samples_of_many_columns(
    outputs: Tensor, num_examples: int, num_parameters: int, batch_size: int, budget: Budget
) -> str | None:
    """Say why columns of the root are sampled: they are many, and all of them beyond the budget. None for all.

    Each parameter counts once for each position of the outputs: of all their dimensions but the smallest, which holds
    the classes as a rule.

    Args:
        outputs: Of the network, the examples first.
        num_examples: N.
        num_parameters: p.
        batch_size: Examples at a time.
        budget: Of "auto".
    """
    columns, sizes = outputs[:1].numel(), [*outputs.shape[1:]] or [1]
    memory = ROOT_COPIES * min(batch_size, num_examples) * columns**2 * outputs.element_size()
    calls = columns * -(-num_examples // batch_size)
    each = 6.0 * num_parameters * (columns / min(sizes) if len(sizes) > 1 else 1.0)
    flop = num_examples * columns * each + calls * BACKWARD_FLOP
    seconds = flop / rate(outputs.dtype, outputs.device)
    allowed = MINUTE if budget.seconds is None else budget.seconds
    if columns <= budget.columns or (memory <= budget.memory and seconds <= allowed):
        return None
    return (
        f"The loss has {columns:,} outputs per example, so structure='auto' takes structure='kron' with "
        f"num_samples={DEFAULT_SAMPLES} random columns of the loss Hessian's root: all of them take about "
        f'{memory / 1e9:.3g} GB and {_duration(seconds)} to read. structure="kron" with '
        'num_samples=None takes all columns; structure="full" or tolerance= goes for the exact value.'
    )


def _is_cheaper(problem: Problem) -> bool:
    """Whether the exact matrix takes less than the bounds of "blocks"."""
    exact, bounds = full_cost(problem), blocks_cost(problem)
    return exact[0] <= max(bounds[0], problem.budget.memory) and exact[1] <= bounds[1]


def _readable(amount: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if amount < 1000:
            return f"{amount:.3g} {prefix}{unit}"
        amount /= 1000
    return f"{amount:.3g} T{unit}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.2g} min"


def full_cost(problem: Problem) -> tuple[float, float]:
    """Bytes and floating-point operations of what `full_curvature` returns for rows."""
    return min(_primal_cost(problem), _dual_cost(problem), key=lambda cost: cost[1])


def _primal_cost(problem: Problem) -> tuple[float, float]:
    p, rows, most = (
        problem.num_parameters,
        problem.num_rows,
        problem.budget.primal_rows * problem.num_parameters,
    )
    # G, scaled, its factor and inverse; the rows of one batch, apart and together; those that are kept.
    batch = 2.0 * problem.batch_size * problem.rank * p * problem.dtype.itemsize
    kept = min(rows, most) * p * 2 * problem.dtype.itemsize  # as they came, and put together
    in_float64 = 2.0 if rows > most and problem.dtype != torch.float64 else 1.0
    return 4.0 * 8 * p**2 + batch + kept, in_float64 * (rows * p**2 + p**3)


def _dual_cost(problem: Problem) -> tuple[float, float]:
    rows, itemsize = problem.num_rows, problem.dtype.itemsize
    matrix = 2 * 8 if rows <= problem.budget.small else itemsize  # with the inverse, or without
    # The rows as they came, put together, and in float64 for the Newton decrement.
    kept = rows * problem.kept_width * (2 * itemsize + 8)
    cubes = 1.0 if rows <= problem.budget.small else 1 / 3  # the same
    return float(rows) ** 2 * matrix + kept, float(rows) ** 2 * problem.gram_width + cubes * rows**3


def structure_seconds(problem: Problem, structure: str) -> float:
    """Seconds of a structure's answers without the reading of the rows, within a factor of about three."""
    if structure in problem.measured:
        return problem.measured[structure]
    return _structure_flop(problem, structure) / rate(problem.dtype, problem.device)


def _structure_flop(problem: Problem, structure: str) -> float:
    if problem.curvature != "ggn":  # all eigenvalues, twice
        return 2.0 * EIGEN * problem.num_parameters**3
    if structure == "full":
        return full_cost(problem)[1] * (SEARCH if problem.sought else 1.0)
    if structure == "lanczos":
        return (LANCZOS_SEARCH if problem.sought else 1.0) * lanczos_flop(problem)
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


@cache
def rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications a second of a matrix product, measured once; random state is left alone."""
    matrix = torch.full((CALIBRATION_SIZE, CALIBRATION_SIZE), 0.5, dtype=dtype, device=device)
    times = []
    for _ in range(2):  # the first wakes threads up
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        times.append(time.perf_counter() - start)
    return CALIBRATION_SIZE**3 / max(min(times), 1e-9)
