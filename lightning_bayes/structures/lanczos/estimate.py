"""An unbiased estimate of the exact log-determinant by stochastic Lanczos quadrature, with its standard error.

What is known exactly is divided out, and tr ln M of what is left is estimated with vectors of random signs (Ubaru,
Chen & Saad, SIAM J. Matrix Anal. Appl. 2017; with a preconditioner Wenger et al., ICML 2022).
"""

import logging
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.numerics.cholesky import rounding_of_log_det
from lightning_bayes.numerics.lanczos_quadrature import (
    LanczosRecurrences,
    SampledTrace,
    converge,
    random_signs,
)
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem
from lightning_bayes.structures.lanczos.cost import EXPECTED_STEPS
from lightning_bayes.structures.lanczos.known_part import KnownPart

GAP_SHARE = 0.1
"""Of the standard error, that the gap between Gauss's and Gauss-Radau's rule may be at the end."""
MAX_STEPS = 200
"""Steps after which Lanczos ends, with the rest of the gap in the standard error and a warning."""
MAX_PROBES = 1024
"""Vectors that `max_stderr` may ask for."""
DECREMENT_TOLERANCE = 1e-2
"""Share of the Newton decrement that may be missing where its refinement ends: nobody decides by less."""
SEARCH_PROBES = 2
"""Vectors that a search for the prior takes. γ to a percent gives its λ to a percent, and the log-evidence at that λ
lies below the maximum by some 1e-4 of γ/4."""


@dataclass
class _Answer:
    """The estimates at one prior, from the vectors so far."""

    known: KnownPart
    log: SampledTrace  # of ln M
    gamma: SampledTrace  # of what M⁻¹ adds to γ
    samples: list[float] = field(default_factory=list)  # zᵀ ln M z of each vector
    gap: float = 0.0
    seconds: float = 0.0

    @property
    def log_det(self) -> float:
        """The mean over the vectors."""
        return self.known.log_det + sum(self.samples) / len(self.samples)

    @property
    def effective_parameters(self) -> float:
        """γ."""
        return self.known.gamma + self.gamma.mean


class SampledLogDet(Curvature):
    """The estimate, whatever is known beforehand.

    The vectors are the same at every prior and epoch, so that differences are surer than values.

    Args:
        problem: Sizes.
    """

    costly_priors = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.shape = dict(problem.strengths or dict.fromkeys(problem.shapes, 1.0))
        """Λ of each tensor, which every prior is a multiple of."""
        self._answers: dict[float, _Answer] = {}
        self.num_steps = self.num_products = 0
        """Of Lanczos, at all priors so far; a product is of one vector."""
        self.product_seconds = 0.0

    @abstractmethod
    def known_part(self, scale: float) -> KnownPart:
        """What is known exactly at `scale` times `shape`."""

    def scale_of(self, precision: Mapping[str, float]) -> float:
        """Of which multiple of `shape` a prior is."""
        name, value = next(iter(precision.items()))
        return value / self.shape[name]

    @abstractmethod
    def like(self) -> Tensor:
        """A vector [n] of the type and on the device of those of the known part."""

    def step_seconds(self) -> float:
        """Seconds of one step of all vectors over the batches so far."""
        known, signs = self.known_part(1.0), random_signs(range(self.problem.num_probes), self.like())
        known.product(signs)  # warms up
        start = time.perf_counter()
        known.product(signs)
        return time.perf_counter() - start

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        answer = self._answer(precision, self.problem.num_probes)
        self._refined(answer)
        known = answer.known
        slack = rounding_of_log_det(known.magnitude, self.problem.dtype)
        value, missing = known.quadratic_form(gradient, DECREMENT_TOLERANCE)
        return CurvatureSummary(
            # Not cut off at the bounds: that would bias it.
            log_det=answer.log_det,
            bounds=(max(known.bounds[0] - slack, 0.0), known.bounds[1] + slack),
            effective_parameters=answer.effective_parameters,
            quadratic=value,
            log_det_stderr=math.hypot(answer.log.stderr, 0.5 * answer.gap),
            effective_parameters_stderr=answer.gamma.stderr,
            log_det_dof=answer.log.degrees_of_freedom,
            quadratic_error=missing,
            samples=tuple(known.log_det + sample for sample in answer.samples),
        )

    @override
    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        answer = self._answer(precision, min(SEARCH_PROBES, self.problem.num_probes))
        return answer.log_det, answer.effective_parameters

    def _answer(self, precision: Mapping[str, float], num_probes: int) -> _Answer:
        """The estimates at a prior from so many vectors at least, and from more until `max_stderr` is met."""
        scale = self.scale_of(precision)
        if scale not in self._answers:
            self._answers[scale] = _Answer(self.known_part(scale), SampledTrace(), SampledTrace())
        answer = self._answers[scale]
        while (missing := num_probes - answer.log.num_vectors) > 0:
            self._add_vectors(answer, -(-missing // -(-missing // self._at_once)))
        return answer

    def _refined(self, answer: _Answer) -> None:
        """Add vectors until the standard error is `max_stderr` at most, having said what that costs."""
        most, stderr = self.problem.max_stderr, answer.log.stderr
        if most is None or stderr <= most:
            return
        before = answer.log.num_vectors
        wanted = math.ceil(1.05 * before * (stderr / most) ** 2)
        seconds = (wanted - before) * answer.seconds / before
        cost = (
            f"a standard error of {0.5 * most:.3g} nats takes about {wanted:,} random vectors in the place of "
            f"{before}, which gave {0.5 * stderr:.3g}: some {seconds:,.0f} s more"
        )
        if wanted > MAX_PROBES:
            warnings.warn(
                f"structure='lanczos' stays at its {before} vectors: {cost}, beyond {MAX_PROBES:,} vectors. Ask for "
                "so many by num_probes=, or accept a larger max_stderr=.",
                stacklevel=2,
            )
            return
        logging.getLogger("lightning_bayes").info("structure='lanczos': %s.", cost)
        while answer.log.stderr > most and answer.log.num_vectors < MAX_PROBES:
            wanted = math.ceil(1.05 * answer.log.num_vectors * (answer.log.stderr / most) ** 2)
            self._add_vectors(answer, min(self._at_once, max(2, wanted - answer.log.num_vectors)))
        if answer.log.stderr > most:
            warnings.warn(
                f"structure='lanczos': {answer.log.num_vectors:,} random vectors gave a standard error of "
                f"{0.5 * answer.log.stderr:.3g} nats, above max_stderr={0.5 * most:.3g}. num_probes= asks for more.",
                stacklevel=2,
            )

    @property
    def _at_once(self) -> int:
        """Vectors whose bases fit the memory."""
        basis = len(self.like()) * self.problem.dtype.itemsize * EXPECTED_STEPS
        return max(1, int(self.problem.budget.basis_bytes // basis))

    def _add_vectors(self, answer: _Answer, number: int) -> None:
        """Run Lanczos from some more vectors until their two rules agree to a part of the standard error."""
        known, seen, started = answer.known, answer.log.num_vectors, time.perf_counter()
        first = self.problem.seed * 2**20 + seen
        signs = known.masked(random_signs(range(first, first + number), self.like()))
        share = (number / max(self.problem.num_probes, number)) ** 0.5
        if not signs.any():  # all rows are selected
            answer.log.add(signs, signs)
            answer.gamma.add(signs, signs)
            answer.samples += [0.0] * number
            return
        recurrences = LanczosRecurrences(known.product, signs)

        # Of the trace of ln M, whose entries are of the size of its logarithms, about 1.
        rounding = rounding_of_log_det(len(signs[0]), self.problem.dtype)

        def watch(steps: int, gap: float) -> None:
            self.problem.report(f"lanczos, step {steps}: {0.5 * gap:.3g} nats between its rules")

        middle, gap = converge(recurrences, _log, known.least, GAP_SHARE * share, MAX_STEPS, watch, rounding)
        answer.log.add(signs, recurrences.images(_log, known.least))
        answer.gamma.add(signs, known.gamma_image(signs, recurrences.images(_reciprocal, known.least)))
        answer.samples += middle.tolist()
        self.num_steps += recurrences.num_steps
        self.num_products += recurrences.num_steps * number
        self.product_seconds += recurrences.product_seconds
        if not math.isfinite(answer.log.stderr + answer.log_det):
            raise EvidenceUnavailableError(
                f"structure='lanczos' overflows in {self.problem.dtype}: the prior precision is too small for it. "
                "Use a float64 model or a larger prior precision."
            )
        answer.seconds += time.perf_counter() - started
        total = seen + number
        answer.gap = (answer.gap * seen + gap * number) / total
        if answer.gap > max(answer.log.stderr, rounding) and not recurrences.exhausted:
            warnings.warn(
                f"structure='lanczos' has not converged in {recurrences.num_steps} steps: {0.5 * answer.gap:.3g} "
                "nats remain between its two rules, half of which is in the standard error. A larger prior precision "
                "avoids it.",
                stacklevel=2,
            )


def _log(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.log()


def _reciprocal(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.reciprocal()
