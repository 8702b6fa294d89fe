"""An unbiased estimate of the exact evidence, for rows that are too many for a factor: selected rows, then Lanczos.

Rows stand in each example's own eigenbasis. With S the largest rows and I + Q = (I + K)/(I + K_SS) the Schur complement
on the others, D its diagonal and M = D^-½ (I + Q) D^-½,

    ln det(I + K) = ln det(I + K_SS) + Σ_{i∉S} ln(1 + Q_ii) + tr ln M .

The first term is a certified lower bound, the first two an upper one, since by Hadamard tr ln M ≤ 0. The third is
estimated by stochastic Lanczos quadrature with random signs (Ubaru, Chen & Saad 2017; with a preconditioner
Wenger et al. 2022): S and D leave it a small condition number and a small variance.
"""

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_bayes.numerics.cholesky import rounding_of_log_det
from lightning_bayes.numerics.lanczos_quadrature import LanczosRecurrences, SampledTrace, random_signs
from lightning_bayes.row_storage.eigenbasis_rows import EigenbasisRows
from lightning_bayes.row_storage.row_products import BatchCollector, RereadRows, RowProducts, StoredRows
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem
from lightning_bayes.structures.schur_complement import SchurComplement, SelectedRows

GAP_SHARE = 0.1
"""Of the standard error, that the gap between Gauss's and Gauss-Radau's rule may be at the end."""
MAX_STEPS = 200
"""Steps after which Lanczos ends, with the rest of the gap in the standard error and a warning."""
MAX_PROBES = 1024
"""Vectors that `max_stderr` may ask for."""
EXPECTED_STEPS = 40
"""By which the memory of the bases is planned."""
SELECTED_PRODUCTS = 16.0
"""Products with one vector that S may take."""
SMALLEST_SELECTION = 64
DECREMENT_TOLERANCE = 1e-3
"""Relative rise of the Newton decrement at which its refinement ends."""
SEARCH_PROBES = 2
"""Vectors that a search for the prior takes. γ to a percent gives its λ to a percent, and the log-evidence at that λ
lies below the maximum by some 1e-4 of γ/4."""


@dataclass
class _Answer:
    """The estimates at one prior, from the vectors so far."""

    schur: SchurComplement
    log: SampledTrace  # of ln M
    gamma: SampledTrace  # of M⁻¹ D^-½ Q' D^-½
    middle: float = 0.0  # Σ over vectors of zᵀ ln M z
    gap: float = 0.0


class LanczosCurvature(Curvature):
    """The rows of all batches, S of them exactly, and random vectors for what they leave.

    The vectors are the same at every prior and epoch, so that differences are surer than values.

    Args:
        problem: Sizes.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._shape = problem.strengths or dict.fromkeys(problem.shapes, 1.0)
        self._rows = EigenbasisRows(self._shape, num_selected(problem))
        self._collector = BatchCollector()
        self._stored = StoredRows()
        # Without a way to read them again rows are stored whatever they take.
        self.rereads = problem.passes is not None and stored_bytes(problem) > problem.budget.stored_bytes
        self._selected: SelectedRows | None = None
        self._answers: dict[float, _Answer] = {}
        self._seconds = 0.0  # of the last prior's first vectors

    @override
    def update(self, chunk: RowChunk) -> None:
        layers = self._collector.add(chunk)
        if layers is not None:
            self._rows.add(layers)
            if not self.rereads:
                self._stored.add(layers)

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        started = time.perf_counter()
        answer = self._answer(precision, self.problem.num_probes)
        self._seconds = time.perf_counter() - started
        self._refined(answer)
        schur = answer.schur
        log_det = schur.log_det_selected + schur.log_det_bound
        slack = rounding_of_log_det(
            len(self._rows) + schur.diagonal.sum().item() + schur.gamma_selected, self.problem.dtype
        )
        value, missing = schur.quadratic_form(gradient, DECREMENT_TOLERANCE)
        vectors = answer.log.num_vectors
        return CurvatureSummary(
            # Not cut off at the bounds: that would bias it.
            log_det=log_det + answer.middle / vectors,
            bounds=(max(schur.log_det_selected - slack, 0.0), log_det + slack),
            effective_parameters=schur.gamma_selected + answer.gamma.mean,
            quadratic=value,
            log_det_stderr=math.hypot(answer.log.stderr, 0.5 * answer.gap),
            effective_parameters_stderr=answer.gamma.stderr,
            log_det_dof=answer.log.degrees_of_freedom,
            quadratic_error=missing,
        )

    @override
    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        answer = self._answer(precision, min(SEARCH_PROBES, self.problem.num_probes))
        schur = answer.schur
        log_det = schur.log_det_selected + schur.log_det_bound + answer.middle / answer.log.num_vectors
        return log_det, schur.gamma_selected + answer.gamma.mean

    def _answer(self, precision: Mapping[str, float], num_probes: int) -> _Answer:
        """The estimates at a prior from so many vectors at least, and from more until `max_stderr` is met."""
        selected = self._selected
        if selected is None:
            selected = self._selected = SelectedRows(self._rows, self._products())
        name, value = next(iter(precision.items()))
        scale = value / self._shape[name]
        if scale not in self._answers:
            self._answers[scale] = _Answer(SchurComplement(selected, scale), SampledTrace(), SampledTrace())
        answer = self._answers[scale]
        while (missing := num_probes - answer.log.num_vectors) > 0:
            self._add_vectors(answer, -(-missing // -(-missing // self._at_once)))
        return answer

    def _refined(self, answer: _Answer) -> None:
        """Add vectors until the standard error is `max_stderr` at most, having said what that costs."""
        most, stderr = self.problem.max_stderr or math.inf, answer.log.stderr
        if stderr <= most:
            return
        before = answer.log.num_vectors
        wanted = math.ceil(1.05 * before * (stderr / most) ** 2)
        seconds = (wanted - before) * self._seconds / before
        cost = (
            f"a standard error of {0.5 * most:.3g} nats takes about {wanted:,} random vectors in the place of {before}, "
            f"which gave {0.5 * stderr:.3g}: some {seconds:,.0f} s more"
        )
        if wanted > MAX_PROBES:
            warnings.warn(
                f"structure='lanczos' stays at its {before} vectors: {cost}, beyond {MAX_PROBES:,}. Say so by num_probes= "
                "to have it all the same, or accept a larger max_stderr=.",
                stacklevel=2,
            )
            return
        logging.getLogger("lightning_bayes").info("structure='lanczos': %s.", cost)
        while answer.log.stderr > most and answer.log.num_vectors < 2 * wanted:
            self._add_vectors(answer, min(self._at_once, max(2, wanted - answer.log.num_vectors)))

    def _products(self) -> RowProducts:
        passes = self.problem.passes
        return RereadRows(passes) if self.rereads and passes is not None else self._stored

    @property
    def _at_once(self) -> int:
        """Vectors whose bases fit the memory."""
        basis = len(self._rows) * self.problem.dtype.itemsize * EXPECTED_STEPS
        return max(1, int(self.problem.budget.basis_bytes // basis))

    def _add_vectors(self, answer: _Answer, number: int) -> None:
        """Run Lanczos from some more vectors until their two rules agree to a part of the standard error."""
        schur, seen = answer.schur, answer.log.num_vectors
        first = self.problem.seed * 2**20 + seen
        diagonal = self._rows.diagonal()
        signs = schur.masked(random_signs(range(first, first + number), diagonal.to(self.problem.dtype)))
        if not signs.any():  # all rows are selected
            answer.log.add(signs, signs)
            answer.gamma.add(signs, signs)
            return
        recurrences = LanczosRecurrences(schur.product, signs)
        share, stderr, due = (number / max(self.problem.num_probes, number)) ** 0.5, math.inf, 1
        while True:
            recurrences.extend()
            middle, gaps = recurrences.between(_log, schur.least)
            gap = gaps.mean().item()
            if recurrences.exhausted or recurrences.num_steps >= MAX_STEPS:
                break
            # The images cost as much as a reorthogonalisation: now and then, and where the gap seems small enough.
            if recurrences.num_steps == due or gap <= GAP_SHARE * share * stderr:
                due = 2 * recurrences.num_steps
                trial = SampledTrace()
                trial.add(signs, recurrences.images(_log))
                stderr = trial.stderr
                if gap <= GAP_SHARE * share * stderr:
                    break
        answer.log.add(signs, recurrences.images(_log))
        answer.gamma.add(signs, schur.growth(recurrences.images(_reciprocal)))
        answer.middle += middle.sum().item()
        total = seen + number
        answer.gap = (answer.gap * seen + gap * number) / total
        if answer.gap > answer.log.stderr:
            warnings.warn(
                f"structure='lanczos' has not converged in {recurrences.num_steps} steps: {0.5 * answer.gap:.3g} nats "
                "remain between its two rules, half of which is in the standard error. A larger prior precision "
                "avoids it.",
                stacklevel=2,
            )


def _log(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.log()


def _reciprocal(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.reciprocal()


def num_selected(problem: Problem) -> int:
    """|S| that costs about `SELECTED_PRODUCTS` products with a vector: K_S and its rotation for every row."""
    product = 2.0 * problem.num_examples * max(problem.num_parameters, problem.rank * problem.kept_width)
    memory = problem.budget.kept_bytes / (problem.kept_width * problem.dtype.itemsize)
    size = float(SMALLEST_SELECTION)
    while problem.num_rows * size * (problem.gram_width + size) < SELECTED_PRODUCTS * product:
        size *= 2**0.5
    return max(1, min(round(size), int(memory), int((problem.budget.kept_bytes / 16) ** 0.5)))


def stored_bytes(problem: Problem) -> float:
    """Memory of all rows."""
    return float(problem.num_rows) * problem.kept_width * problem.dtype.itemsize
