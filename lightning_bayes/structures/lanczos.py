"""An unbiased estimate of the exact evidence, for rows that are too many for a factor: selected rows, then Lanczos.

Rows stand in each example's own eigenbasis. With S the largest rows and I + Q = (I + K)/(I + K_SS) the Schur complement
on the others, D its diagonal and M = D^-½ (I + Q) D^-½,

    ln det(I + K) = ln det(I + K_SS) + Σ_{i∉S} ln(1 + Q_ii) + tr ln M .

The first term is a certified lower bound, the first two an upper one, since by Hadamard tr ln M ≤ 0. The third is
estimated by stochastic Lanczos quadrature with random signs (Ubaru, Chen & Saad 2017; with a preconditioner
Wenger et al. 2022): S and D leave it a small condition number and a small variance.
"""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.numerics.cholesky import log_det_of, rounding_of_log_det, solve
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.numerics.lanczos_quadrature import LanczosRecurrences, TraceEstimate, random_signs
from lightning_bayes.row_storage.collector import RowKeeper, cross_all
from lightning_bayes.row_storage.eigenbasis_rows import EigenbasisRows
from lightning_bayes.row_storage.newton_decrement import climbed, combine_all, dot_all, woodbury
from lightning_bayes.row_storage.stored import KeptRows
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem

NUM_PROBES = 8
"""Vectors of random signs."""
GAP_SHARE = 0.1
"""Of the standard error, that the gap between Gauss's and Gauss-Radau's rule may be at the end."""
MAX_STEPS = 200
"""Products after which Lanczos ends, with the rest of the gap in the standard error and a warning."""
SELECTED_PRODUCTS = 16.0
"""Products with one vector that S may take."""
SMALLEST_SELECTION = 64
DECREMENT_TOLERANCE = 1e-4
"""Relative rise of the Newton decrement at which its refinement ends."""


class LanczosCurvature(Curvature):
    """The rows of all batches, S of them exactly, and random vectors for what they leave.

    Args:
        problem: Sizes.
        num_probes: Vectors of random signs.
        num_selected: Rows of S; None for as many as cost about `SELECTED_PRODUCTS` products.
        seed: Of the vectors: the same at every prior and epoch, so that differences are surer than values.
    """

    def __init__(
        self, problem: Problem, num_probes: int = NUM_PROBES, num_selected: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(problem)
        self._num_probes, self._num_selected, self._seed = num_probes, num_selected, seed
        self._keeper = RowKeeper()
        self._batches: list[list[KeptRows]] = []

    @override
    def update(self, chunk: RowChunk) -> None:
        self._keeper.add(chunk)
        if chunk.columns.stop == chunk.num_columns:
            self._batches.append(self._keeper.layers())
            self._keeper = RowKeeper(self._keeper)

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        rows = EigenbasisRows(self._batches, precision)
        schur = SchurComplement(rows, self._largest(rows.diagonal), precision)
        estimate, gamma, gamma_stderr = schur.trace_of_log(self._num_probes, self._seed)
        slack = rounding_of_log_det(len(rows.diagonal) + rows.diagonal.sum().item(), self.problem.dtype)
        lower, upper = max(schur.log_det - slack, 0.0), schur.log_det + schur.above + slack
        return CurvatureSummary(
            log_det=schur.log_det
            + schur.above
            + estimate.value,  # not cut off at the bounds: that would be biased
            bounds=(lower, upper),
            effective_parameters=schur.gamma + gamma,
            quadratic=schur.quadratic_form(gradient),
            log_det_stderr=estimate.stderr,
            effective_parameters_stderr=gamma_stderr,
        )

    def _largest(self, diagonal: Tensor) -> Tensor:
        number = self._num_selected or num_selected(self.problem, len(diagonal))
        return diagonal.topk(min(number, len(diagonal))).indices.sort().values


def num_selected(problem: Problem, num_rows: int) -> int:
    """|S| that costs about `SELECTED_PRODUCTS` products with a vector: K_S and a triangular solve for every row."""
    product = 2.0 * problem.num_examples * max(problem.num_parameters, problem.rank * problem.kept_width)
    size = float(SMALLEST_SELECTION)
    while num_rows * size * (problem.gram_width + size) < SELECTED_PRODUCTS * product:
        size *= 2**0.5
    return round(size)


class SchurComplement:
    """I + Q of the rows outside S, by its products with vectors, and what is known of it exactly.

    Vectors are [rows] over all rows and 0 on S.

    Args:
        rows: All.
        chosen: Ascending numbers of S.
        precision: λ of each parameter tensor.

    Raises:
        EvidenceUnavailableError: If I + K_SS has no Cholesky factor in the accurate type.
    """

    def __init__(self, rows: EigenbasisRows, chosen: Tensor, precision: Mapping[str, float]) -> None:
        self._rows, self._chosen, self._precision = rows, chosen, precision
        self._selected = rows.select(chosen)
        accurate = accumulation_dtype(chosen.device)
        precise = [layer.to(accurate) for layer in self._selected]
        matrix = cross_all(precise, precise, precision)
        matrix.diagonal().add_(1.0)
        self._factor, info = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
        if info.item():
            raise EvidenceUnavailableError(
                f"I + K of {len(chosen)} selected rows is not positive definite even in {accurate}: the rows are of "
                "extreme scale. Raise the prior precision."
            )
        self.log_det = log_det_of(self._factor)
        """ln det(I + K_SS)."""
        self._remains = torch.ones_like(rows.diagonal)
        self._remains[chosen] = 0.0
        seen, twice = self._seen()
        self._diagonal = ((rows.diagonal - seen).clamp(min=0.0)) * self._remains  # Q_ii
        self._growth = (self._diagonal - twice).clamp(min=0.0) * self._remains  # minus its derivative in ln λ

    def _seen(self) -> tuple[Tensor, Tensor]:
        """K_iS A⁻¹ K_Si and K_iS A⁻² K_Si of every row, A = I + K_SS."""
        once, twice = [], []
        inverse = torch.cholesky_inverse(self._factor)
        whitener = torch.linalg.solve_triangular(
            self._factor, torch.eye(len(inverse)).to(self._factor), upper=False
        )
        for cross in self._rows.cross(self._selected):
            once.append((whitener.to(cross) @ cross).square().sum(0, dtype=self._factor.dtype))
            twice.append((inverse.to(cross) @ cross).square().sum(0, dtype=self._factor.dtype))
        return torch.cat(once), torch.cat(twice)

    @property
    def above(self) -> float:
        """Σ_{i∉S} ln(1 + Q_ii)."""
        return self._diagonal.log1p().sum().item()

    @property
    def gamma(self) -> float:
        """Minus the derivative of `log_det` + `above` in ln λ."""
        own = len(self._factor) - torch.cholesky_inverse(self._factor).diagonal().sum().item()
        return own + (self._growth / (1.0 + self._diagonal)).sum().item()

    def trace_of_log(self, num_probes: int, seed: int) -> tuple[TraceEstimate, float, float]:
        """Estimate tr ln M, and its part of γ with that one's standard error."""
        like = self._rows.diagonal.to(self._selected[0].rows.dtype)
        signs = random_signs(num_probes, like, seed) * self._remains.to(like)
        if not signs.any():
            return TraceEstimate(0.0, 0.0, 0.0), 0.0, 0.0
        scale = (1.0 + self._diagonal).rsqrt().to(like)
        recurrences = LanczosRecurrences(lambda vectors: scale * self._product(scale * vectors), signs)
        least = 1.0 / (1.0 + self._diagonal.max().item())
        while True:
            recurrences.extend()
            estimate = recurrences.trace(torch.log, least)
            if recurrences.exhausted or estimate.gap <= GAP_SHARE * estimate.stderr:
                break
            if recurrences.num_steps >= MAX_STEPS:
                warnings.warn(
                    f"structure='lanczos' has not converged in {MAX_STEPS} products: {estimate.gap:.3g} nats remain "
                    "between its two rules, half of which is in the standard error. A larger prior precision avoids it.",
                    stacklevel=2,
                )
                estimate = TraceEstimate(
                    estimate.value, math.hypot(estimate.stderr, 0.5 * estimate.gap), estimate.gap
                )
                break
        # γ's part is the derivative of tr ln M in ln t at t K: zᵀ M⁻¹ (D^-½ Q′ D^-½ − ½ (D′/D) M − ½ M (D′/D)) z.
        ratio = (self._growth / (1.0 + self._diagonal)).to(like)
        solved = recurrences.images(torch.reciprocal)
        grown = scale * self._product(scale * signs, derivative=True)
        image = recurrences.images(lambda values: values)
        entries = solved * (grown - 0.5 * ratio * image) - 0.5 * ratio
        samples = entries.sum(1, dtype=self._factor.dtype)
        spread = samples.std().item() / num_probes**0.5 if num_probes > 1 else math.inf
        return estimate, samples.mean().item(), spread

    def quadratic_form(self, gradient: Mapping[str, Tensor]) -> float:
        """gᵀ(G + Λ)⁻¹g of all rows, with S as the preconditioner."""
        like = self._selected[0].rows
        scaled = {name: part.to(like) for name, part in gradient.items()}
        inverse = woodbury(self._selected, self._solve, self._precision)
        return climbed(
            self._rows.dot, self._rows.combine, inverse, self._precision, scaled, DECREMENT_TOLERANCE
        )

    def _product(self, vectors: Tensor, derivative: bool = False) -> Tensor:
        """I + Q times vectors [k, rows]; or its derivative in t, at t = 1, where K is t K."""
        return torch.stack([self._of_one(vector, derivative) for vector in vectors])

    def _of_one(self, vector: Tensor, derivative: bool) -> Tensor:
        combined = self._rows.combine(vector)
        pulled = {name: part / self._precision[name] for name, part in combined.items()}
        solved = self._solve(dot_all(self._selected, pulled))
        if derivative:
            solved = solved + self._solve(solved)
        for name, part in combine_all(self._selected, solved):
            pulled[name] = pulled[name] - part / self._precision[name]
        image = self._rows.dot(pulled) * self._remains.to(vector)
        return image if derivative else vector + image

    def _solve(self, coefficients: Tensor) -> Tensor:
        """(I + K_SS)⁻¹ times coefficients [1, S]."""
        return solve(self._factor, coefficients.mT.to(self._factor)).mT.to(coefficients)
