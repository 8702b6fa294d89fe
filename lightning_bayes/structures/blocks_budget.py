"""What the bounds of `blocks` may take, and how many rows that lets them keep."""

from lightning_bayes.structures.base import Problem

SEARCHED_SHARE = 0.125
"""Share of `Budget.kept_flop` for each prior where several are tried."""
MIN_LANDMARKS = 128
"""Landmark rows where the data are many."""
LANDMARK_FLOP = 7e11
"""Operations that the choice of the number of landmarks goes by."""
POOL_BYTES = 1e9
"""Memory of the rows that are held back to choose the landmarks from, where they are long."""


def blocks_cost(problem: Problem) -> tuple[float, float]:
    """Bytes and floating-point operations of `BlockCurvature`."""
    landmarks, kept = num_landmarks(problem), min(capacity_of(problem), problem.num_rows)
    held = min(problem.num_rows, pool_rows(problem) + problem.batch_size * problem.rank)
    memory = held * _row_bytes(problem, landmarks) + _kept_bytes(problem, kept)
    flop = _flop(problem, landmarks) + _kept_flop(problem, kept)
    return memory + 16.0 * problem.num_parameters + 40.0 * landmarks**2, flop


def capacity_of(problem: Problem, rows_held: int = 0) -> int:
    """Rows of S, as many as the budget allows, to a factor of the root of two.

    Args:
        problem: Sizes.
        rows_held: Rows that every factor of K_SS is applied to.
    """
    budget = problem.budget
    flop = budget.kept_flop * (SEARCHED_SHARE if problem.sought else 1.0)
    capacity = float(budget.least_kept)
    while True:
        larger = capacity * 2**0.5
        needed = _kept_flop(problem, larger) + 2.0 * rows_held * larger**2
        if needed > flop or _kept_bytes(problem, larger) > budget.kept_bytes:
            return round(capacity)
        capacity = larger


def _kept_flop(problem: Problem, rows: float) -> float:
    return rows**2 * problem.gram_width + rows**3 / 3


def _kept_bytes(problem: Problem, rows: float) -> float:
    """The matrix; the rows, those that wait, and in float64 for the Newton decrement."""
    matrix = 2 * 8 if rows <= problem.budget.small else problem.dtype.itemsize
    return rows**2 * matrix + rows * problem.kept_width * (2.5 * problem.dtype.itemsize + 8)


def pool_rows(problem: Problem) -> int:
    """Rows of the first batches that are held back."""
    return int(min(problem.budget.pool_rows, POOL_BYTES / _row_bytes(problem, problem.budget.landmarks)))


def _row_bytes(problem: Problem, landmarks: int) -> float:
    """A row as it came, put together, turned, and on its way to S, and its products with the landmarks."""
    return (4.0 * problem.kept_width + 3.0 * landmarks) * problem.dtype.itemsize


def _flop(problem: Problem, landmarks: int) -> float:
    to_landmarks = 2 * landmarks * problem.gram_width + 2 * landmarks**2
    return float(problem.num_rows) * (to_landmarks + 2 * problem.rank * problem.gram_width)


def num_landmarks(problem: Problem) -> int:
    """Landmark rows, a power of two where they are fewer than all."""
    landmarks = problem.budget.landmarks
    while landmarks > MIN_LANDMARKS and _flop(problem, landmarks) > LANDMARK_FLOP:
        landmarks //= 2
    return min(landmarks, problem.num_rows)
