"""One pass over the data into a curvature, and the curvature into the evidence."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_bayes.curvature.base import Curvature, Problem
from lightning_bayes.curvature.errors import EvidenceUnavailableError, check_finite
from lightning_bayes.curvature.gram import kept_widths
from lightning_bayes.curvature.hessian import BatchHessian, HessianCurvature, HessianReader
from lightning_bayes.curvature.likelihoods import Likelihood
from lightning_bayes.curvature.prior_search import FixedWeights, maximize_evidence, squared_norms
from lightning_bayes.curvature.priors import Prior
from lightning_bayes.curvature.reader import BatchRows, RowReader
from lightning_bayes.curvature.rows import RowBlock
from lightning_bayes.curvature.structures import STRUCTURES, choose_structure
from lightning_bayes.evidence import Evidence
from lightning_bayes.functional import evidence as terms
from lightning_bayes.options import Method

__all__ = [
    "Forward",
    "LossScale",
    "Totals",
    "evidence_of",
    "fixed_weights",
    "mean_loss",
    "read_all",
    "rehearse",
]

LARGEST_SPECTRUM = 4096
"""Rows or parameters of an exact matrix up to which a search for one λ takes all its eigenvalues."""

Forward = Callable[[], tuple[Tensor, Tensor]]
"""Runs the network on one batch and returns its outputs, with their graph, and the targets."""

LossScale = Callable[[float, float], float]
"""From the loss's terms per example and the dispersion to s of `Prior.precision`."""


def mean_loss(terms_per_example: float, dispersion: float) -> float:
    """Return s of a loss that is the mean per-example negative log-likelihood."""
    return 1.0


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

    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        """Log-determinant and effective parameters at a prior, in units of the dispersion."""
        nothing = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        summary = self.curved.at(precision, nothing)
        return summary.log_det, summary.effective_parameters

    @property
    def cheap_spectrum(self) -> bool:
        """Whether eigenvalues serve a search better than factors: not of a bracket or a large exact matrix."""
        if self.method.tolerance is not None:  # the rows that a bracket keeps are others at each prior
            return False
        if self.method.structure != "full" or isinstance(self.curved, HessianCurvature):
            return True
        return min(self.curved.problem.num_rows, self.curved.problem.num_parameters) <= LARGEST_SPECTRUM


def read_all(
    network: nn.Module,
    forwards: Iterable[Forward],
    likelihood: Likelihood,
    prior: Prior,
    method: Method,
    num_examples: int,
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
        announce: Takes the one line that says by which derivatives the rows are read.

    Raises:
        ValueError: If there is no batch, or a batch cannot be read.
        EvidenceUnavailableError: If weights, outputs or gradients are not finite.
    """
    started = time.perf_counter()
    intake = _intake(network, likelihood, prior, method, num_examples)
    weights = {name: parameter.detach() for name, parameter in intake.parameters.items()}
    for name, weight in weights.items():
        check_finite(weight, f"the parameter {name!r}")
    seen, unit_loss, num_terms = 0, 0.0, 0.0
    null_loss: float | None = 0.0
    gradient = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for forward in forwards:
        batch = intake.take(forward)
        if seen == 0:
            announce(intake.split())
        seen += batch.num_examples
        unit_loss += batch.unit_loss
        num_terms += batch.num_terms
        null_loss = None if null_loss is None or batch.null_loss is None else null_loss + batch.null_loss
        for name, part in batch.gradient.items():
            gradient[name] += part
    if intake.curved is None:
        raise ValueError("The training data are empty: there is nothing to take the evidence of.")
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
) -> tuple[Method, str, str]:
    """Read one batch and choose the structure.

    Returns:
        The method with that structure, a sentence that says why, and one that says by which derivatives the
        rows are read.

    Raises:
        ValueError: If the batch cannot be read.
        EvidenceUnavailableError: If outputs or gradients are not finite.
    """
    intake = _intake(network, likelihood, prior, method, num_examples)
    reason = intake.plan(forward)
    return intake.method, reason, intake.split()


class _Intake(Protocol):
    """Reads batches into a curvature."""

    parameters: dict[str, nn.Parameter]
    method: Method

    @property
    def curved(self) -> Curvature | HessianCurvature | None:
        """What was read, None before the first batch."""
        ...

    def take(self, forward: Forward) -> BatchRows | BatchHessian:
        """Read one batch."""
        ...

    def plan(self, forward: Forward) -> str:
        """Settle `method` by one batch and say why it is what it is."""
        ...

    def split(self) -> str:
        """Say by which derivatives batches are read."""
        ...


def _intake(
    network: nn.Module,
    likelihood: Likelihood,
    prior: Prior,
    method: Method,
    num_examples: int,
) -> _Intake:
    if method.is_hessian:
        return _HessianIntake(network, likelihood, prior, method)
    return _RowIntake(network, likelihood, prior, method, num_examples)


class _RowIntake:
    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        prior: Prior,
        method: Method,
        num_examples: int,
    ) -> None:
        self._reader = RowReader(network, prior.strengths, method.num_samples, method.backend)
        self._prior = prior
        self._likelihood = likelihood
        self._num_examples = num_examples
        self.parameters = self._reader.parameters
        self.method = method
        self.curved: Curvature | None = None

    def take(self, forward: Forward) -> BatchRows:
        batch = self._reader.read(forward, self._likelihood)
        for block in batch.blocks:
            if self.curved is None:
                problem, _ = self._settle(block)
                self.curved = STRUCTURES[self.method.structure](problem)
            self.curved.update(block)
        return batch

    def plan(self, forward: Forward) -> str:
        return self._settle(next(self._reader.read(forward, self._likelihood).blocks))[1]

    def split(self) -> str:
        return self._reader.split()

    def _settle(self, block: RowBlock) -> tuple[Problem, str]:
        first = next(iter(self.parameters.values()))
        kept_width, gram_width = kept_widths(block)
        problem = Problem(
            shapes={name: parameter.shape for name, parameter in self.parameters.items()},
            num_examples=self._num_examples,
            rank=block.num_columns,
            batch_size=block.num_examples,
            kept_width=kept_width,
            gram_width=gram_width,
            dtype=first.dtype,
            device=first.device,
            tolerance=self.method.tolerance,
            sampled=self.method.num_samples is not None,
            strengths=self._prior.strengths,
            scale=float(self._num_examples) if self._prior.per_example else 1.0,
            rises_together=self._prior.rises_together,
            sought=bool(self._prior.optimized),
        )
        if problem.sampled and self.method.structure == "auto":
            structure, reason = "kron", f"{block.num_columns} columns are sampled"
        else:
            structure, reason = choose_structure(self.method.structure, problem)
        self.method = replace(self.method, structure=structure)
        return problem, reason


class _HessianIntake:
    def __init__(self, network: nn.Module, likelihood: Likelihood, prior: Prior, method: Method) -> None:
        self._reader = HessianReader(network, prior.strengths)
        self._likelihood = likelihood
        self.parameters = self._reader.parameters
        self.method = replace(method, structure="full")
        self.curved: HessianCurvature | None = None

    def take(self, forward: Forward) -> BatchHessian:
        batch = self._reader.read(forward, self._likelihood)
        if self.curved is None:
            first = next(iter(self.parameters.values()))
            self.curved = HessianCurvature(
                {name: parameter.shape for name, parameter in self.parameters.items()},
                first.device,
                rounding=torch.finfo(first.dtype).eps,
                only_positive=self.method.curvature == "hessian_positive",
            )
        self.curved.add(batch)
        return batch

    def plan(self, forward: Forward) -> str:
        num_parameters = sum(parameter.numel() for parameter in self.parameters.values())
        self._reader.read(forward, self._likelihood)
        return f"The Hessian of {num_parameters:,} parameters is dense"

    def split(self) -> str:
        return "The Hessian is formed by autograd, twice"


def fixed_weights(
    totals: Totals, likelihood: Likelihood, prior: Prior, loss_scale: LossScale
) -> FixedWeights:
    """What the search for a prior needs to know of the totals."""
    if totals.num_terms == 0.0:
        raise EvidenceUnavailableError("No target counts: the loss ignores them all.")
    per_example = totals.num_terms / totals.num_examples
    return FixedWeights(
        curved=totals.curved,
        likelihood=likelihood,
        unit_loss=totals.unit_loss,
        num_terms=totals.num_terms,
        squared_norms=squared_norms(totals.weights),
        sizes={name: weight.numel() for name, weight in totals.weights.items()},
        precision_at=lambda dispersion: prior.precision(
            totals.num_examples, loss_scale(per_example, dispersion)
        ),
        total=None if totals.cheap_spectrum else totals.log_det_and_gamma,
    )


def evidence_of(
    totals: Totals, likelihood: Likelihood, prior: Prior, loss_scale: LossScale = mean_loss
) -> Evidence:
    """The evidence at the prior and the dispersion that were given, or at those that maximise it.

    Raises:
        EvidenceUnavailableError: If a term overflows, or the cost has no minimum to expand about.
    """
    weights = fixed_weights(totals, likelihood, prior, loss_scale)
    optimum = maximize_evidence(weights, prior)
    precision, dispersion = optimum.precision, optimum.dispersion
    # In units of the dispersion φ the curvature is that of the unit loss and the prior is φλ.
    scaled = {name: dispersion * value for name, value in precision.items()}
    slope = {name: totals.gradient[name] + scaled[name] * weight for name, weight in totals.weights.items()}
    summary = totals.curved.at(scaled, slope)
    log_likelihood = likelihood.log_likelihood(totals.unit_loss, dispersion, totals.num_terms)
    if not all(map(math.isfinite, (log_likelihood, summary.log_det, summary.quadratic))):
        raise EvidenceUnavailableError(
            f"The evidence overflows: log-likelihood {log_likelihood:g}, log-determinant {summary.log_det:g}, "
            f"squared Newton step {summary.quadratic:g}."
        )
    penalty = 0.5 * sum(precision[name] * norm for name, norm in weights.squared_norms.items())

    def value(log_det: float) -> float:
        return terms.log_evidence(log_likelihood, penalty, terms.log_occam_factor(log_det))

    subset = totals.method.subset_of_weights
    below = negative = None
    if isinstance(totals.curved, HessianCurvature):
        below, negative = totals.curved.counts(scaled)
    distinct = set(precision.values())
    return Evidence(
        log_evidence=value(summary.log_det),
        lower=value(summary.bounds[1]),
        upper=value(summary.bounds[0]),
        log_evidence_ratio=None if totals.null_loss is None else value(summary.log_det) + totals.null_loss,
        log_likelihood=log_likelihood,
        weight_penalty=penalty,
        log_occam_factor=terms.log_occam_factor(summary.log_det),
        effective_parameters=summary.effective_parameters,
        newton_decrement=0.5 * summary.quadratic / dispersion,
        prior_precision=distinct.pop() if len(distinct) == 1 else precision,
        num_examples=totals.num_examples,
        num_parameters=sum(weights.sizes.values()),
        structure=totals.method.structure,
        curvature=totals.method.curvature,
        seconds=time.perf_counter() - totals.started,
        effective_parameters_stderr=summary.effective_parameters_stderr,
        noise_variance=dispersion if likelihood.name == "regression" else None,
        fixed_parameters=totals.held,
        log_evidence_stderr=0.5 * summary.log_det_stderr,
        prior_optimized=bool(prior.optimized),
        num_eigenvalues_below_prior=below,
        num_negative_eigenvalues=negative,
        num_samples=totals.method.num_samples,
        subset_of_weights=subset if isinstance(subset, str) else tuple(subset),
    )
