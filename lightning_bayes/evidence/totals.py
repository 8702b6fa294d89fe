"""One pass over the data, read into a curvature, and what else its batches add up to."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_bayes.capture.repeated_forwards import RepeatedForwards
from lightning_bayes.errors import EvidenceUnavailableError, check_finite
from lightning_bayes.evidence.options import DEFAULT_PROBES, Method
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.numerics.sampling_estimates import draw_blocks
from lightning_bayes.priors.prior import Prior
from lightning_bayes.row_storage.collector import kept_widths
from lightning_bayes.rows.products import DataPasses
from lightning_bayes.rows.reader import BatchSums, RowReader
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import MINUTE, Curvature, Problem
from lightning_bayes.structures.hessian_reader import HessianReader
from lightning_bayes.structures.registry import STRUCTURES, choose_structure


@dataclass(frozen=True)
class LossReduction:
    """How the loss that is trained on reduces its examples, which says what a weight decay stands for.

    Attributes:
        kind: As in PyTorch's losses.
        batch_size: Examples of one training_step.
    """

    kind: Literal["mean", "sum"]
    batch_size: int


@dataclass(frozen=True)
class Hyperparameters:
    """Where the log-evidence is taken: at a λ and a φ that are given, or at those that maximise it.

    Attributes:
        precision: λ of each parameter tensor.
        dispersion: φ.
        log_likelihood: Summed log-density of the targets at this φ, nats.
    """

    precision: dict[str, float]
    dispersion: float
    log_likelihood: float

    @property
    def scaled(self) -> dict[str, float]:
        """φλ: the prior in units of the dispersion, which the curvature is in."""
        return {name: self.dispersion * value for name, value in self.precision.items()}


@dataclass(frozen=True)
class Totals:
    """What one pass over the data adds up to, in units of the dispersion: all that the evidence is made of.

    Attributes:
        method: As it was asked for.
        structure: That was taken.
        weights: The parameters that carry a prior.
        squared_norms: ‖ω‖² of each of these.
        gradient: Of the summed unit loss.
        held: Parameters that are conditioned on.
        started: By `time.perf_counter`.
        reduction: Of the training loss, for a prior from weight decay; None for the mean of its examples.
        start: λ of each parameter of a search that ended near, at earlier weights say.
    """

    curved: Curvature
    method: Method
    structure: str
    likelihood: Likelihood
    prior: Prior
    weights: dict[str, Tensor]
    squared_norms: dict[str, float]
    gradient: dict[str, Tensor]
    held: tuple[str, ...]
    unit_loss: float
    null_loss: float | None
    num_examples: int
    num_terms: float
    num_observed: float
    started: float
    reduction: LossReduction | None = None
    start: Mapping[str, float] | None = None

    @property
    def needs_search(self) -> bool:
        """Whether some λ, or φ, is to maximise the log-evidence."""
        return bool(self.prior.optimized) or self.likelihood.optimizes_dispersion

    @cached_property
    def dispersion(self) -> float:
        """φ, as given or estimated from the unit loss alone.

        Raises:
            EvidenceUnavailableError: If the residuals that it is estimated from are all zero.
        """
        return self.likelihood.estimate_dispersion(self.unit_loss, self.num_observed)

    def at(self, dispersion: float | None = None) -> Hyperparameters:
        """λ that is given, and the log-likelihood, at one φ; the λ of an optimized parameter stands for nothing.

        Args:
            dispersion: φ, None for `Totals.dispersion`.
        """
        phi = self.dispersion if dispersion is None else dispersion
        log_likelihood = self.likelihood.log_likelihood(self.unit_loss, phi, self.num_observed)
        scale, training = 1.0, self.reduction
        if training is not None:
            terms_per_example = self.num_terms / self.num_examples
            scale = self.likelihood.loss_scale(training.kind, terms_per_example, training.batch_size, phi)
        return Hyperparameters(self.prior.precision(self.num_examples, scale), phi, log_likelihood)


def read_all(
    network: nn.Module,
    forwards: RepeatedForwards,
    likelihood: Likelihood,
    prior: Prior,
    method: Method,
    num_examples: int,
    num_batches: int,
    announce: Callable[[str], None] = lambda sentence: None,
    report: Callable[[str], object] = lambda text: None,
    seconds: float = MINUTE,
    structure: str | None = None,
    measured: Mapping[str, float] | None = None,
) -> Totals:
    """Read every batch: rows into a structure, or Hessians into their sum.

    Args:
        network: A throw-away copy in eval mode.
        forwards: One callable a batch, for one pass or, where the structure needs them, for more.
        likelihood: Of the targets given the outputs.
        prior: Of parameters of `network`.
        method: How the curvature is computed.
        num_examples: Examples to expect, for the choice of a structure; the evidence counts those it sees.
        num_batches: Of the pass; where batches are sampled as blocks it must be right.
        announce: Takes the one line that says by which derivatives the rows are read.
        report: Takes a few words on what is being done after the pass, now and then.
        seconds: That "auto" may take where its budget does not say.
        structure: In the place of the method's, where "auto" has chosen before.
        measured: Seconds that answers by some structures take, where they were measured.

    Raises:
        ValueError: If there is no batch, or a batch cannot be read.
        EvidenceUnavailableError: If weights, outputs or gradients are not finite, or no target counts.
    """
    started = time.perf_counter()
    reader = reader_of(network, prior, method)
    sample = None if method.num_blocks is None else draw_blocks(num_batches, method.num_blocks)
    weights = {name: parameter.detach() for name, parameter in reader.parameters.items()}
    squared_norms = {
        name: weight.square().sum(dtype=accumulation_dtype(weight.device)).item()
        for name, weight in weights.items()
    }
    for name, squared_norm in squared_norms.items():
        if not math.isfinite(squared_norm):  # else no entry is NaN or infinite
            check_finite(weights[name], f"the parameter {name!r}")
    curved: Curvature | None = None
    sums = BatchSums({name: torch.zeros_like(weight) for name, weight in weights.items()})
    # Which structure "auto" takes is known after the first batch.
    forwards.keep = (structure or method.structure) in ("auto", "lanczos")
    for forward in forwards():
        # By its number: a batch that is read again must draw the same then.
        batch = reader.read(forward, likelihood, sums.num_batches)
        # A batch that is left out adds its loss and gradient; its rows would cost C backward passes.
        left_out = (curved is not None and not curved.reads_rows) or (
            sample is not None and sample.role(sums.num_batches) is None
        )
        rows = () if left_out else batch.chunks
        sums.add(batch)
        for chunk in rows:
            if curved is None:
                sizes = chunk, reader.parameters, likelihood, prior, method, num_examples
                problem, taken, _ = settle(*sizes, seconds, structure, measured)
                passes = partial(DataPasses, network, reader.parameters, likelihood, forwards, reader.read)
                problem = replace(problem, block_sample=sample, passes=passes, report=report)
                curved = STRUCTURES[taken](problem)
                forwards.keep = forwards.keep and curved.rereads
                announce(reader.split)
            curved.update(chunk)
    if curved is None:
        raise ValueError("The training data are empty: there is nothing to take the evidence of.")
    if method.num_blocks is not None and sums.num_batches != num_batches:
        raise ValueError(
            f"The data came in {sums.num_batches} batches where {num_batches} were expected, and a sample of "
            "blocks of them stands for all. Use structure='blocks' without num_blocks=."
        )
    if sums.num_observed == 0.0:
        raise EvidenceUnavailableError("No target counts: the loss ignores them all.")
    held = tuple(name for name, _ in network.named_parameters() if name not in weights)
    return Totals(
        curved=curved,
        method=method,
        structure=taken,
        likelihood=likelihood,
        prior=prior,
        weights=weights,
        squared_norms=squared_norms,
        gradient=sums.gradient,
        held=held,
        unit_loss=sums.unit_loss,
        null_loss=sums.null_loss,
        num_examples=sums.num_examples,
        num_terms=sums.num_terms,
        num_observed=sums.num_observed,
        started=started,
    )


def reader_of(network: nn.Module, prior: Prior, method: Method) -> RowReader | HessianReader:
    """What reads the batches for a method."""
    if method.curvature == "ggn":
        # Without columns one that is sampled tells how the network is read.
        columns = 1 if method.by_products else method.num_samples
        return RowReader(network, prior.strengths, columns, method.backend)
    return HessianReader(network, prior.strengths, method.budget)


def settle(
    chunk: RowChunk,
    parameters: Mapping[str, nn.Parameter],
    likelihood: Likelihood,
    prior: Prior,
    method: Method,
    num_examples: int,
    seconds: float,
    structure: str | None = None,
    measured: Mapping[str, float] | None = None,
) -> tuple[Problem, str, str]:
    """Return the sizes by the first chunk of rows, the structure to take, and a sentence that says why.

    Args:
        chunk: Rows of the first batch.
        parameters: Those that carry a prior.
        likelihood: Of the targets given the outputs.
        prior: Of the parameters.
        method: As it was asked for.
        num_examples: N.
        seconds: That "auto" may take where its budget does not say.
        structure: In the place of the method's.
        measured: Seconds that answers by some structures take, where they were measured.
    """
    first = next(iter(parameters.values()))
    kept_width, gram_width, map_width = kept_widths(chunk)
    problem = Problem(
        shapes={name: parameter.shape for name, parameter in parameters.items()},
        num_examples=num_examples,
        rank=chunk.num_columns,
        batch_size=chunk.num_examples,
        kept_width=kept_width,
        gram_width=gram_width,
        map_width=map_width,
        dtype=first.dtype,
        device=first.device,
        tolerance=method.tolerance,
        sampled=method.num_samples is not None,
        strengths=prior.strengths,
        scale=float(num_examples) if prior.per_example else 1.0,
        rises_together=prior.rises_together,
        sought=bool(prior.optimized) or likelihood.optimizes_dispersion,
        curvature=method.curvature,
        budget=method.budget,
        seconds=seconds if method.budget.seconds is None else method.budget.seconds,
        num_probes=method.num_probes or DEFAULT_PROBES,
        max_stderr=None if method.max_stderr is None else 2.0 * method.max_stderr,
        seed=method.seed,
        by_products=method.by_products,
        measured=measured or {},
    )
    return problem, *choose_structure(structure or method.structure, problem)
