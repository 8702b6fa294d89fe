"""One batch read beforehand: which structure is taken, and what it will cost."""

import math
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
from lightning_bayes.structures.registry import evaluation_seconds, lanczos_seconds

REPEATS = 4
"""Batches that a step of "lanczos" is timed on."""
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
        # Several times the same: what is done once a step must not count for each batch.
        repeats = min(REPEATS, math.ceil(batches))
        passes = partial(
            DataPasses, network, reader.parameters, likelihood, lambda: repeats * [forward], reader.read
        )
        once = replace(problem, passes=passes)
        measured[structure] = lanczos_seconds(once, batches, read, batches / repeats)
        problem, structure, reason = settle(*sizes, allowed, measured=measured)
    seconds = evaluation_seconds(problem, structure, read)
    return Rehearsal(structure, reason, reader.split, seconds, measured)
