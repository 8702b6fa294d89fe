"""What the bounds of `blocks` may take, and how many rows that lets them keep."""

from lightning_bayes.structures.base import Problem
from lightning_bayes.structures.dual_system import SMALL

KEPT_FLOP = 3e11
"""Operations that K_SS and its factor may take at each prior that is tried, which says how large S is."""
KEPT_BYTES = 6e8
"""Memory of K_SS and of the rows of S."""
SEARCHED_SHARE = 0.125
"""Of these operations where the prior is sought, so that several are tried."""
SMALLEST_CAPACITY = 64
"""Rows of S that are kept whatever they take."""
MAX_LANDMARKS = 1024
"""Landmark rows where the data are few; halved until the pass fits `LANDMARK_FLOP`."""
MIN_LANDMARKS = 128
"""Landmark rows where the data are many."""
LANDMARK_FLOP = 7e11
"""Operations that the choice of the number of landmarks goes by."""
POOL_ROWS = 8192
"""Rows of the first batches that are held back to choose the landmarks from, where they are short."""
POOL_BYTES = 1e9
"""Memory of these where they are long."""


def blocks_cost(problem: Problem) -> tuple[float, float]:
    """Bytes and floating-point operations of `BlockCurvature`."""
    landmarks, kept = num_landmarks(problem), min(capacity_of(problem), problem.num_rows)
    held = min(problem.num_rows, pool_rows(problem) + problem.batch_size * problem.rank)
    memory = held * _row_bytes(problem, landmarks) + _kept_bytes(problem, kept)
    flop = _flop(problem, landmarks) + _kept_flop(problem, kept)
    return memory + 16.0 * problem.num_parameters + 40.0 * landmarks**2, flop


def capacity_of(problem: Problem, rows_held: int = 0) -> int:
    """Rows of S, as many as `KEPT_FLOP` and `KEPT_BYTES` allow, to a factor of the root of two.

    Args:
        problem: Sizes.
        rows_held: Rows that every factor of K_SS is applied to.
    """
    flop = KEPT_FLOP * (SEARCHED_SHARE if problem.sought else 1.0)
    capacity = float(SMALLEST_CAPACITY)
    while True:
        larger = capacity * 2**0.5
        needed = _kept_flop(problem, larger) + 2.0 * rows_held * larger**2
        if needed > flop or _kept_bytes(problem, larger) > KEPT_BYTES:
            return round(capacity)
        capacity = larger


def _kept_flop(problem: Problem, rows: float) -> float:
    return rows**2 * problem.gram_width + rows**3 / 3


def _kept_bytes(problem: Problem, rows: float) -> float:
    """The matrix; the rows, those that wait, and in float64 for the Newton decrement."""
    matrix = 2 * 8 if rows <= SMALL else problem.dtype.itemsize
    return rows**2 * matrix + rows * problem.kept_width * (2.5 * problem.dtype.itemsize + 8)


def pool_rows(problem: Problem) -> int:
    """Rows of the first batches that are held back."""
    return int(min(POOL_ROWS, POOL_BYTES / _row_bytes(problem, MAX_LANDMARKS)))


def _row_bytes(problem: Problem, landmarks: int) -> float:
    """A row as it came, put together, turned, and on its way to S, and its products with the landmarks."""
    return (4.0 * problem.kept_width + 3.0 * landmarks) * problem.dtype.itemsize


def _flop(problem: Problem, landmarks: int) -> float:
    to_landmarks = 2 * landmarks * problem.gram_width + 2 * landmarks**2
    return float(problem.num_rows) * (to_landmarks + 2 * problem.rank * problem.gram_width)


def num_landmarks(problem: Problem) -> int:
    """Landmark rows, a power of two where they are fewer than all."""
    landmarks = MAX_LANDMARKS
    while landmarks > MIN_LANDMARKS and _flop(problem, landmarks) > LANDMARK_FLOP:
        landmarks //= 2
    return min(landmarks, problem.num_rows)
