"""Bounds on the exact evidence from rows that are dropped batch by batch: linear in N, memory bounded.

Each example's rows are turned to the eigenbasis of its own block of K, as for `bracket`, and the largest of all
are kept, S, as many as the stated operations allow. K being positive semi-definite,

    ln det(I + K_SS) ≤ ln det(I + K) ≤ ln det(I + K_SS) + Σ_{i∉S} ln(1 + R_ii)

with R + I the Schur complement of I + K_LL for some L within S (left: it is at least I; right: Fischer and
Hadamard). L are *landmarks*, the largest rows of the first few thousand, so that each row's R_ii is known when it
goes. Λ = s Λ₀ may be known only after the pass: R_ii falls with s, and is kept for a ladder of s. On the right
Hadamard's Σ ln(1 + Gᵢᵢ/λᵢ) over parameters may be smaller: it grows only with ln N.

The Schur complement of all of S would give far less on the right, and needs the rows that are gone: a weighted
random sample of them, held back as they go, estimates that sum without bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.numerics.cholesky import log_det_of, rounding_of_log_det
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.row_storage.collector import (
    PrincipalRows,
    RowKeeper,
    cross_all,
    example_grams,
    principal_rows,
)
from lightning_bayes.row_storage.largest_rows import PrioritySample, RowReservoir, RowSet
from lightning_bayes.row_storage.newton_decrement import quadratic_form, woodbury
from lightning_bayes.row_storage.stored import KeptRows
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Budget, Curvature, CurvatureSummary, Problem
from lightning_bayes.structures.blocks_budget import capacity_of, num_landmarks, pool_rows
from lightning_bayes.structures.diagonal import DiagonalCurvature
from lightning_bayes.structures.dual_system import System, factorise

SEED = 0
"""Seed of the random sample, which has a stream of its own."""
LADDER = [10.0 ** (step / 2) for step in range(-6, 7)]
"""Values of s at which R_ii is kept, in units of the one that is expected."""
EXPECTED = LADDER.index(1.0)
ROUNDING_FACTOR = 64
"""Allowance for rounding in the rows and what they keep, in units of eps · tr K/λ."""


@dataclass(frozen=True)
class KeptPart:
    """S at one prior, and what is known of the rows outside.

    Attributes:
        log_det: ln det(I + K_SS).
        beyond: Σ_{i∉S} ln(1 + R_ii) with the Schur complement of the landmarks.
        added: The same with that of all of S, estimated, and its standard error; both 0 where nothing is left
            out.
        added_gamma: Its part of γ, minus its derivative in ln s, and the standard error.
    """

    layers: list[KeptRows]
    system: System
    log_det: float
    beyond: float
    added: tuple[float, float]
    added_gamma: tuple[float, float]
    budget: Budget

    def gamma(self) -> tuple[float, float]:
        """Trace of K_SS(I + K_SS)⁻¹, and its standard error."""
        return self.system.trace_of_shrinkage(self.budget.probes, self.budget.small)

    def quadratic(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> float:
        """gᵀ(G_S + Λ)⁻¹g with the matrix of S alone, an upper bound: the other directions count as flat."""
        layers = [layer.to(accumulation_dtype(self.system.factor.device)) for layer in self.layers]
        return quadratic_form(layers, woodbury(layers, self.system.solve, precision), precision, gradient)


class BlockCurvature(Curvature):
    """The largest rows of all, and what each of the others keeps beyond the landmarks among them.

    `log_det` adds to the lower bound the estimate of what the other rows add at most; γ is minus its derivative in
    the logarithm of the prior. gᵀ(G + Λ)⁻¹g is that of the kept rows, which is an upper bound: the other
    directions count as flat. Beside the first few batches, and S, it keeps about 60 bytes a row.

    Args:
        problem: Sizes.
        seed: Of the random sample.
        capacity: Rows that are kept; None for what the budget allows.
        like: Of batches that products of these rows are taken with: all are kept in the same forms.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int | None = None,
        capacity: int | None = None,
        like: RowKeeper | None = None,
    ) -> None:
        super().__init__(problem)
        self._capacity = capacity_of(problem) if capacity is None else capacity
        self._keeper = RowKeeper(like)
        self._landmarks: list[KeptRows] = []
        self._vectors = torch.empty(0)  # of K_LL [landmarks, landmarks]
        self._values = torch.empty(0)  # [landmarks]
        self._diagonal = DiagonalCurvature(problem)
        self._unit = dict(problem.strengths or dict.fromkeys(problem.shapes, 1.0))
        self._ladder = [problem.scale * step for step in LADDER]
        self._kept = RowReservoir(self._capacity)
        self._sample = PrioritySample(problem.budget.sampled_rows, SEED if seed is None else seed)
        self._dropped: list[Tensor] = []  # K_ii, then R_ii at each s of the ladder [rows, 1 + ladder]
        self._trace = 0.0
        self._last: tuple[tuple[float, ...], KeptPart] | None = None

    @override
    def update(self, chunk: RowChunk) -> None:
        self._last = None
        self._diagonal.update(chunk)
        self._keeper.add(chunk)
        whole = chunk.columns.stop == chunk.num_columns
        if whole and (self._landmarks or self._keeper.num_rows >= pool_rows(self.problem)):
            self._empty_keeper()

    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """Answer for one prior, of those in proportion to the one that the pass was made for.

        Raises:
            ValueError: If the precisions are not in proportion to those that the pass was made for.
        """
        part, slack = self.part(precision), self.allowance(precision)
        hadamard = self._diagonal.log_det_and_gamma(precision)
        log_det, gamma, stderr, gamma_error = _estimated(part, hadamard)
        lower, upper = max(part.log_det - slack, 0.0), min(part.log_det + part.beyond, hadamard[0]) + slack
        return CurvatureSummary(
            log_det=min(max(log_det, lower), upper),
            bounds=(lower, upper),
            effective_parameters=gamma,
            quadratic=part.quadratic(precision, gradient),
            log_det_stderr=stderr,
            effective_parameters_stderr=gamma_error,
        )

    @override
    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        return _estimated(self.part(precision), self._diagonal.log_det_and_gamma(precision))[:2]

    def part(self, precision: Mapping[str, float]) -> KeptPart:
        """S and the rest, see `KeptPart`; that of the last prior is remembered, for `at` after a search."""
        scale, key = self._scale(precision), tuple(precision.values())
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._last = None  # its memory is needed
        layers = self._rows_of_s()
        accurate = accumulation_dtype(self.problem.device)
        small = self.problem.budget.small
        types = (accurate,) if layers[0].num_rows <= small else (self.problem.dtype, accurate)
        system = factorise(layers, precision, types, small)
        added, added_gamma = self._sampled_rest(layers, system, precision, scale)
        log_det, beyond = log_det_of(system.factor), self._beyond(scale)
        part = KeptPart(layers, system, log_det, beyond, added, added_gamma, self.problem.budget)
        self._last = key, part
        return part

    def allowance(self, precision: Mapping[str, float]) -> float:
        """Nats that rounding may have put between a bound and what it bounds."""
        trace, dtype = self._trace / self._scale(precision), self.problem.dtype
        of_factor = rounding_of_log_det(self._rows_of_s()[0].num_rows + trace, dtype)
        return ROUNDING_FACTOR * torch.finfo(dtype).eps * trace + of_factor

    def _empty_keeper(self) -> None:
        """Sort the rows of a batch, or of the first few, into those that are kept and those that go."""
        layers = self._keeper.layers()
        self._keeper = RowKeeper(self._keeper)
        own = example_grams(layers, self._unit)
        rows = principal_rows(layers, own.to(accumulation_dtype(self.problem.device)))
        self._trace += rows.eigenvalues.sum().item()
        landmarks = self._choose_landmarks(rows) if not self._landmarks else None
        values = torch.cat([rows.eigenvalues.unsqueeze(1), self._residuals(rows)], 1).to(layers[0].rows.dtype)
        keys = values[:, 1 + EXPECTED].clone()
        if landmarks is not None:
            keys[landmarks] = torch.inf
        every = rows.pick(torch.arange(len(keys), device=keys.device))
        self._drop(self._kept.offer(RowSet({layer.names: layer for layer in every}, values), keys))

    def _drop(self, gone: Sequence[tuple[RowSet, Tensor]]) -> None:
        for rows, _ in gone:
            self._dropped.append(rows.values)
            # Not by the keys: what S leaves of a row goes with K_ii more than with what the landmarks leave.
            self._sample.offer(rows, (rows.values[:, 0] / self._ladder[EXPECTED]).log1p())

    def _choose_landmarks(self, rows: PrincipalRows) -> Tensor:
        """Set the landmarks, and return their numbers among the rows."""
        number = min(num_landmarks(self.problem), len(rows.eigenvalues), -(-self._capacity // 2))
        chosen = rows.eigenvalues.topk(number).indices
        self._landmarks = rows.pick(chosen)
        gram = cross_all(self._landmarks, self._landmarks, self._unit).to(rows.eigenvalues)
        values, self._vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
        self._values = values.clamp_(min=0.0)
        return chosen

    def _residuals(self, rows: PrincipalRows) -> Tensor:
        """R_ii = K_ii − K_iL (s + K_LL)⁻¹ K_Li of each row at each s: [rows, ladder]."""
        cross = cross_of_shared(self._landmarks, rows.layers, self._unit)
        if cross is None:
            return rows.eigenvalues.unsqueeze(1).expand(-1, len(self._ladder))
        squares = (self._vectors.to(cross).mT @ cross).square()
        inverses = (self._values + self._values.new_tensor(self._ladder).unsqueeze(1)).reciprocal()
        seen = squares.mT @ inverses.to(cross).mT
        return (rows.eigenvalues.unsqueeze(1) - seen).clamp(min=0.0)

    def _rows_of_s(self) -> list[KeptRows]:
        if self._keeper.num_rows or not self._landmarks:  # fewer than the pool
            self._empty_keeper()
        self._drop(self._kept.close())
        drawn = self._kept.rows()
        if drawn is None:
            raise ValueError("No row was kept: the training data are empty.")
        return list(drawn[0].layers.values())

    def _beyond(self, scale: float) -> float:
        """Σ_{i∉S} ln(1 + R_ii/s), with R_ii at the next larger s of the ladder, or K_ii."""
        above = [i for i, step in enumerate(self._ladder) if step >= scale * (1.0 - 1e-9)]
        column = 1 + above[0] if above else 0
        sums = ((values[:, column].to(self._values) / scale).log1p().sum() for values in self._dropped)
        return sum(part.item() for part in sums)

    def _sampled_rest(
        self, layers: list[KeptRows], system: System, precision: Mapping[str, float], scale: float
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Σ_{i∉S} ln(1 + R_ii) with the Schur complement R + I of all of S, and what it adds to γ."""
        drawn = self._sample.rows()
        if drawn is None:
            return (0.0, 0.0), (0.0, 0.0)
        sample, likely = drawn
        diagonal = sample.values[:, 0].to(self._values) / scale
        cross = cross_of_shared(layers, list(sample.layers.values()), precision)
        added, added_gamma = system.added_by_each(diagonal, cross)
        return _estimate(added, likely), _estimate(added_gamma, likely)

    def _scale(self, precision: Mapping[str, float]) -> float:
        ratios = [precision[name] / unit for name, unit in self._unit.items()]
        if max(ratios) > min(ratios) * (1.0 + 1e-9):
            raise ValueError(
                'structure="blocks" has dropped its rows for prior precisions in fixed proportions, and cannot '
                'answer for others. Use one prior precision for all parameters, or structure="kron".'
            )
        return ratios[0]


def _estimated(part: KeptPart, hadamard: tuple[float, float]) -> tuple[float, float, float, float]:
    """Log-determinant and γ from S and the sample, or Hadamard's where that is less, then their standard errors.

    Where rows are many more than parameters and the prior is weak, what S leaves of each row adds up to more than
    all parameters can hold: γ would be above their number.
    """
    log_det = part.log_det + part.added[0]
    if hadamard[0] <= log_det:
        return *hadamard, 0.0, 0.0
    gamma, error = part.gamma()
    return (
        log_det,
        gamma + part.added_gamma[0],
        part.added[1],
        (error**2 + part.added_gamma[1] ** 2) ** 0.5,
    )


def _estimate(terms: Tensor, likely: Tensor) -> tuple[float, float]:
    """Horvitz and Thompson's estimate of a sum from a sample with these probabilities, and its standard error."""
    scaled = terms / likely.to(terms)
    variance = (scaled.square() * (1.0 - likely.to(terms))).sum().item()
    return scaled.sum().item(), max(variance, 0.0) ** 0.5


def cross_of_shared(
    left: Sequence[KeptRows], right: Sequence[KeptRows], precision: Mapping[str, float]
) -> Tensor | None:
    """K between two sets of rows; a layer that one of them lacks has no rows there. None for no layer in common."""
    theirs = {layer.names: layer for layer in right}
    shared = [(layer, theirs[layer.names]) for layer in left if layer.names in theirs]
    if not shared:
        return None
    ours, others = zip(*shared, strict=True)
    return cross_all(ours, others, precision)
