"""One pass over the data, and what it adds up to."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_bayes.capture.forward import Forward
from lightning_bayes.errors import check_finite
from lightning_bayes.evidence.intake import intake_of
from lightning_bayes.evidence.options import Method
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.priors.prior import Prior
from lightning_bayes.structures.base import Curvature
from lightning_bayes.structures.hessian import HessianCurvature


@dataclass(frozen=True)
class Totals:
    """What one pass over the data adds up to, in units of the dispersion."""

    curved: Curvature | HessianCurvature
    method: Method
    """As it was carried out: with the structure that was chosen."""
    weights: dict[str, Tensor]
    """The parameters that carry a prior."""
    gradient: dict[str, Tensor]
    """Of the summed unit loss."""
    held: tuple[str, ...]
    """Parameters that are conditioned on."""
    unit_loss: float
    null_loss: float | None
    num_examples: int
    num_terms: float
    started: float
    """By `time.perf_counter`."""


@dataclass(frozen=True)
class Rehearsal:
    """What one batch says about an evaluation before it is made."""

    method: Method
    """With the structure that is taken."""
    reason: str
    """A sentence that says why."""
    split: str
    """A sentence that says by which derivatives the rows are read."""
    seconds: float
    """That the whole will take, within a factor of about three; without the loading of the data."""


def read_all(
    network: nn.Module,
    forwards: Iterable[Forward],
    likelihood: Likelihood,
    prior: Prior,
    method: Method,
    num_examples: int,
    num_batches: int,
    announce: Callable[[str], None] = lambda sentence: None,
) -> Totals:
    """Read every batch: rows into a structure, or Hessians into their sum.

    Args:
        network: A throw-away copy in eval mode.
        forwards: One callable a batch.
        likelihood: Of the targets given the outputs.
        prior: Of parameters of `network`.
        method: How the curvature is computed.
        num_examples: Examples to expect, for the choice of a structure; the evidence counts those it sees.
        num_batches: Of the pass; where batches are sampled as blocks it must be right.
        announce: Takes the one line that says by which derivatives the rows are read.

    Raises:
        ValueError: If there is no batch, or a batch cannot be read.
        EvidenceUnavailableError: If weights, outputs or gradients are not finite.
    """
    started = time.perf_counter()
    intake = intake_of(network, likelihood, prior, method, num_examples, num_batches)
    weights = {name: parameter.detach() for name, parameter in intake.parameters.items()}
    for name, weight in weights.items():
        check_finite(weight, f"the parameter {name!r}")
    seen, batches, announced, unit_loss, num_terms = 0, 0, False, 0.0, 0.0
    null_loss: float | None = 0.0
    gradient = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for forward in forwards:
        batch = intake.take(forward)
        if not announced and intake.curved is not None:
            announce(intake.split())
            announced = True
        seen, batches = seen + batch.num_examples, batches + 1
        unit_loss += batch.unit_loss
        num_terms += batch.num_terms
        null_loss = None if null_loss is None or batch.null_loss is None else null_loss + batch.null_loss
        for name, part in batch.gradient.items():
            gradient[name] += part
    if intake.curved is None:
        raise ValueError("The training data are empty: there is nothing to take the evidence of.")
    if method.num_blocks is not None and batches != num_batches:
        raise ValueError(
            f"The data came in {batches} batches where {num_batches} were expected, and a sample of blocks of them "
            "stands for all. Use structure='blocks' without num_blocks=."
        )
    held = tuple(name for name, _ in network.named_parameters() if name not in weights)
    return Totals(
        intake.curved, intake.method, weights, gradient, held, unit_loss, null_loss, seen, num_terms, started
    )


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
    intake = intake_of(network, likelihood, prior, replace(method, num_blocks=None), num_examples, 1)
    reason, seconds = intake.plan(forward)
    return Rehearsal(replace(intake.method, num_blocks=method.num_blocks), reason, intake.split(), seconds)
