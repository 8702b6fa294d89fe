"""A certified bracket about the exact evidence, from the rows that matter.

Each example's rows are turned so that they are orthogonal to one another: row i then stands for the eigenvalue
K_ii of its example's block of K, and most examples that the network is sure of have one or two rows that count.
With S the largest rows, for K positive semi-definite,

    ln det(I + K_SS) ≤ ln det(I + K) ≤ ln det(I + K_SS) + Σ_{i∉S} ln(1 + R_ii)

where R + I is the Schur complement of I + K_LL for some L within S (left: it is at least I; right: Fischer and
Hadamard). The right-hand sum is known before all of K_SS is computed, so S is as small as keeps the bracket within
the tolerance with L in it, and what it costs is known as well. On trained networks this beats low-rank factors of K
at equal cost, because their spectra decay slowly: on the 784-800-10 net of the paper (N = 1000) 30 · 10⁹ operations
leave 20 nats in the log-determinant, a greedily pivoted partial Cholesky factor 135 after 48 · 10⁹.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.numerics.cholesky import SMALL_ROUNDING, rounding_of_log_det
from lightning_bayes.row_storage.collector import cross_all, example_grams, principal_rows, smallest_set
from lightning_bayes.row_storage.newton_decrement import quadratic_form, woodbury
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import CurvatureSummary, Problem
from lightning_bayes.structures.bracket.factor import SplitFactor, factor_of
from lightning_bayes.structures.bracket.selection import Selection, operations, select
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.dual_system import inverse_on

NUM_PROBES = 64
"""Random vectors of the trace over S."""
NUM_SAMPLES = 32
"""Rows outside S that the point estimate looks at."""
ROUNDING_SHARE = 0.05
"""Share of the bracket that the allowance may take before everything is done in float64."""
IN_FLOAT64 = 2.0
"""Times that the operations of a bracket take for which float32 is not good enough."""
DECREMENT_TOLERANCE = 5e-3
"""Relative rise of the Newton decrement at which its refinement ends: about so much is missing at most."""


class BracketCurvature(DualCurvature):
    """ln det(I + K) to within twice `Problem.tolerance`, since the evidence has half of it."""

    chooses_rows = True
    searches_by_spectrum = False  # the rows that are chosen may

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._exact_at: set[tuple[float, ...]] = set()

    @override
    def update(self, chunk: RowChunk) -> None:
        super().update(chunk)
        self._exact_at.clear()

    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """Answer for one prior, to within the tolerance.

        `log_det` adds to the lower bound an estimate of what the other rows add, Σ ln(1 + R_ii) with R the Schur
        complement of all of S, from a random sample of them; its standard error is reported, and the bounds do
        not depend on it. γ is estimated from the same sample. gᵀ(G + Λ)⁻¹g is that of all rows, with K_SS as the
        preconditioner.
        """
        selection = self._select(precision)
        if selection is None:
            return super().at(precision, gradient)
        selection, factor = factor_of(selection, precision, self._accurate, self._small)
        rows = selection.rows
        # Of the type of the rows, which the residuals are of as well, also where the factor is of a better one.
        log_det, slack = factor.log_det, _allowance(rows.eigenvalues, rows.layers[0].rows.dtype)
        above = selection.residual.log1p().sum().item()
        lower, upper = max(log_det - slack, 0.0), log_det + above + slack
        gamma, gamma_error = factor.trace_of_shrinkage(NUM_PROBES, self.problem.budget.bracket_trace)
        added, added_gamma = _sampled_rest(selection, factor, precision)
        precondition = woodbury(rows.layers, inverse_on(selection.chosen, factor.solve), precision)
        return CurvatureSummary(
            log_det=min(max(log_det + added.mean().item(), lower), upper),
            bounds=(lower, upper),
            effective_parameters=gamma + added_gamma.mean().item(),
            quadratic=quadratic_form(rows.layers, precondition, precision, gradient, DECREMENT_TOLERANCE),
            log_det_stderr=_standard_error(added),
            effective_parameters_stderr=(gamma_error**2 + _standard_error(added_gamma) ** 2) ** 0.5,
        )

    @override
    def of_chosen_rows(self, precision: Mapping[str, float]) -> DualCurvature:
        """Return the exact structure of S at a prior, or of all rows where that costs hardly more.

        Its log-determinant lies below by no more than twice the tolerance, at this prior and at any that is not
        smaller for some tensor: the difference falls with each λ, since γ of a tensor falls when rows are left out.
        """
        selection = self._select(precision)
        if selection is None:
            return DualCurvature(self.problem, self._layers(precision))
        kept = replace(self.problem, num_examples=len(selection.chosen), rank=1)
        return DualCurvature(kept, selection.rows.pick(selection.chosen))

    def _select(self, precision: Mapping[str, float]) -> Selection | None:
        """S for a prior, None where the exact answer costs hardly more."""
        key = tuple(precision.values())
        selection = None if key in self._exact_at else self._worthwhile(precision)
        if selection is None:
            self._exact_at.add(key)
        return selection

    def _worthwhile(self, precision: Mapping[str, float]) -> Selection | None:
        """S, None where what it takes is not well below what the exact answer takes."""
        layers, product = self._layers(precision), self.problem.gram_width
        grams = example_grams(layers, precision)
        width, slowness = 2.0 * (self.problem.tolerance or 0.0), 1.0
        diagonal = grams.diagonal(dim1=1, dim2=2)
        most = self.problem.budget.bracket_share * operations(diagonal.numel(), product)
        allowance = _allowance(diagonal, layers[0].rows.dtype)
        if allowance > ROUNDING_SHARE * width:
            # A small exact problem that rounds too much is done in float64 as well.
            if diagonal.numel() > self._small or allowance <= SMALL_ROUNDING:
                slowness = IN_FLOAT64
            roughly = torch.linalg.eigvalsh(grams.to(self._accurate)).clamp_(min=0.0).flatten()
            if slowness * operations(len(smallest_set(roughly, width)), product) > most:
                return None
            layers = [layer.to(self._accurate) for layer in layers]
            # Again: those of float32 hold small eigenvalues to the rounding of the largest.
            grams = example_grams(layers, precision)
            allowance = _allowance(diagonal, self._accurate)
        width -= 2.0 * allowance
        selection = select(
            principal_rows(layers, grams.to(self._accurate)), width, precision, product, self.problem.budget
        )
        return None if slowness * operations(len(selection.chosen), product) > most else selection


def _allowance(diagonal: Tensor, dtype: torch.dtype) -> float:
    return rounding_of_log_det(diagonal.numel() + diagonal.sum().item(), dtype)


def _sampled_rest(
    selection: Selection, factor: SplitFactor, precision: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Samples whose means estimate Σ_{i∉S} ln(1 + R_ii), and what those rows add to γ."""
    weights = selection.residual.log1p()
    if not weights.sum() > 0.0:
        return weights.new_zeros(1), weights.new_zeros(1)
    generator = torch.Generator(device=weights.device).manual_seed(0)
    drawn = torch.multinomial(weights, NUM_SAMPLES, replacement=True, generator=generator)
    cross = cross_all(selection.rows.pick(selection.chosen), selection.rows.pick(drawn), precision)
    added, added_gamma = factor.added_by_each(selection.rows.eigenvalues[drawn], cross)
    scale = weights.sum() / weights[drawn]
    return scale * added, scale * added_gamma


def _standard_error(samples: Tensor) -> float:
    return 0.0 if len(samples) < 2 else (samples.std() / len(samples) ** 0.5).item()
