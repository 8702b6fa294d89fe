"""One batch read beforehand: which structure is taken, and what it will cost."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from lightning_bayes.capture.forward import Forward
from lightning_bayes.evidence.options import Method
from lightning_bayes.evidence.totals import reader_of, settle
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.priors.prior import Prior
from lightning_bayes.row_storage.collector import kept_widths
from lightning_bayes.rows.products import DataPasses
from lightning_bayes.structures.base import Problem
from lightning_bayes.structures.lanczos.cost import EXPECTED_STEPS, SKETCHED, selection_flop
from lightning_bayes.structures.lanczos.estimate import SampledLogDet
from lightning_bayes.structures.registry import LANCZOS_SEARCH, lanczos_curvature, rate, structure_seconds

REPEATS = 4
"""Batches beyond one that a step of "lanczos" is timed on."""
LARGEST_FIXED_SHARE = 0.9
"""Of the time of a step over a few batches, that may be the same for all batches."""
LEAST_SECONDS = 10.0
"""That "auto" may take in a Trainer, however short an epoch is."""


@dataclass(frozen=True)
class Rehearsal:
    """What one batch says about an evaluation before it is made.

    Attributes:
        structure: That is taken.
        reason: A sentence that says why.
        split: A sentence that says by which derivatives the rows are read.
        seconds: That the whole will take, within a factor of about three; without the loading of the data.
        measured: Of that, seconds of the answers by some structures, by a step of theirs.
    """

    structure: str
    reason: str
    split: str
    seconds: float
    measured: Mapping[str, float]


def rehearse(
    network: nn.Module,
    forward: Forward,
    likelihood: Likelihood,
    prior: Prior,
    method: Method,
    num_examples: int,
) -> Rehearsal:
    """Read one batch, twice, and choose the structure.

    Raises:
        ValueError: If the batch cannot be read.
        EvidenceUnavailableError: If outputs or gradients are not finite.
    """
    reader = reader_of(network, prior, method)
    start = time.perf_counter()
    batch = reader.read(forward, likelihood)
    passed = time.perf_counter()
    first = next(batch.chunks)
    if method.curvature == "ggn":  # again: the first batch is also where the plan is made
        start = time.perf_counter()
        batch = reader.read(forward, likelihood)
        passed = time.perf_counter()
        for chunk in batch.chunks:
            kept_widths(chunk)  # looks at all of it
    read, batches = time.perf_counter() - start, num_examples / batch.num_examples
    epoch = batches * (passed - start)
    allowed = max(LEAST_SECONDS, epoch)
    sizes = first, reader.parameters, likelihood, prior, method, num_examples
    problem, structure, reason = settle(*sizes, allowed)
    measured: dict[str, float] = {}
    if structure == "lanczos":

        def over(number: int) -> Problem:
            """The same batch several times."""
            passes = partial(
                DataPasses, network, reader.parameters, likelihood, lambda: number * [forward], reader.read
            )
            return replace(problem, passes=passes)

        measured[structure] = lanczos_seconds(over(1), over(1 + REPEATS), REPEATS, batches, read)
        problem, structure, reason = settle(*sizes, allowed, measured=measured)
    seconds = evaluation_seconds(problem, structure, read)
    return Rehearsal(structure, reason, reader.split, seconds, measured)


def evaluation_seconds(problem: Problem, structure: str, read: float) -> float:
    """Seconds of a pass and of the structure's answers.

    Args:
        problem: Sizes.
        structure: That is taken.
        read: Seconds of reading one batch.
    """
    batches = problem.num_examples / problem.batch_size
    return batches * read + structure_seconds(problem, structure)


def lanczos_seconds(few: Problem, more: Problem, extra: int, batches: float, read: float) -> float:
    """Seconds of the answers by "lanczos", by the time of one step over some batches, which it reads once more.

    Two timings, because a part of a step is done once, however many batches there are.

    Args:
        few: With passes over one batch.
        more: With passes over so many more.
        extra: That number.
        batches: Of the whole pass.
        read: Seconds of reading one batch.
    """
    curvature, once = _calibrated(few)
    whole = _calibrated(more)[1]
    each = max(whole - once, (1 - LARGEST_FIXED_SHARE) * whole) / extra
    steps, search = EXPECTED_STEPS, LANCZOS_SEARCH if few.sought else 1.0
    if few.by_products:
        steps += SKETCHED // few.num_probes
    readings = 1.0 if curvature.rereads and curvature.reads_rows else 0.0
    selecting = 0.0 if few.by_products else selection_flop(few) / rate(few.dtype, few.device)
    stepping = steps * (once + max(batches - 1.0, 0.0) * each)
    return batches * readings * read + search * (stepping + selecting)


def _calibrated(problem: Problem) -> tuple[SampledLogDet, float]:
    """The estimate over the batches of a problem, and the seconds of a step."""
    curvature = lanczos_curvature(problem)
    if problem.passes is not None and curvature.reads_rows:
        for chunk in problem.passes().chunks():
            curvature.update(chunk)
    return curvature, curvature.step_seconds()
