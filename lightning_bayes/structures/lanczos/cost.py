"""What the estimate takes: how many rows are selected, and the operations of it all."""

from lightning_bayes.structures.base import Problem

SELECTED_PRODUCTS = 16.0
"""Products with one vector that S may take."""
SMALLEST_SELECTION = 64
EXPECTED_STEPS = 32
"""Steps of Lanczos that costs and memory are planned by."""
SKETCHED = 96
"""Directions of the sketch in the space of parameters, each of one product with G."""
MEMORY_BOUND = 8.0
"""Multiplications of a matrix product in the time in which one number is read from memory."""
CALL_FLOP = 5e6
"""Multiplications in the time that one product of one tensor in one batch takes, however little it does."""
CALLED_STEPS = 100
"""Steps of Lanczos and of conjugate gradients that these are counted for."""
OVERHEAD = 2.0
"""Time of a network's own operations, in units of its matrix products."""


def num_selected(problem: Problem) -> int:
    """|S| that costs about `SELECTED_PRODUCTS` products with a vector: K_S and its rotation for every row."""
    product = 2.0 * problem.num_examples * max(problem.map_width, problem.rank * problem.kept_width)
    if problem.budget.selected_rows is not None:
        return problem.budget.selected_rows
    budget, size = problem.budget.kept_bytes, float(SMALLEST_SELECTION)
    while problem.num_rows * size * (problem.gram_width + size) < SELECTED_PRODUCTS * product:
        size *= 2**0.5
    memory = min(budget / (problem.kept_width * problem.dtype.itemsize), (budget / 16) ** 0.5)
    return max(1, min(round(size), int(memory)))


def stored_bytes(problem: Problem) -> float:
    """Memory of all rows."""
    return float(problem.num_rows) * problem.kept_width * problem.dtype.itemsize


def lanczos_flop(problem: Problem) -> float:
    """Operations of all vectors, and of what is known exactly."""
    vectors, examples = problem.num_probes, float(problem.num_examples)
    if problem.by_products:
        once = OVERHEAD * examples * problem.map_width
        return (EXPECTED_STEPS + SKETCHED / vectors) * (3.0 + 4.0 * vectors) * once
    calls = examples / problem.batch_size * len(problem.shapes) * CALL_FLOP * 2.0 * CALLED_STEPS
    bases = 2.0 * EXPECTED_STEPS**2 * vectors * problem.num_rows * MEMORY_BOUND
    if stored_bytes(problem) > problem.budget.stored_bytes:
        steps = EXPECTED_STEPS * (4.0 + 4.0 * vectors) * OVERHEAD * examples * problem.map_width
    else:
        reading = problem.rank * problem.kept_width * max(vectors, MEMORY_BOUND)
        steps = 2.0 * EXPECTED_STEPS * examples * (vectors * problem.map_width + reading)
    return selection_flop(problem) + bases + steps + calls


def selection_flop(problem: Problem) -> float:
    """Operations of what S takes from every row."""
    size = num_selected(problem)
    return float(problem.num_rows) * size * (problem.gram_width + size)
