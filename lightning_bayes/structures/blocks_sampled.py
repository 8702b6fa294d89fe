"""A bound on the exact evidence from the rows of some batches alone, drawn at random: for data beyond a pass of rows.

The batches of the data are blocks. Some, the *base*, give the kept rows S as in `blocks`; for the others Fischer's
inequality on the Schur complement of I + K_SS says

    ln det(I + K) ≤ ln det(I + K_base) + Σ_b ln det(I + R_bb),    R_bb = K_bb − K_bS (I + K_SS)⁻¹ K_Sb .

The sum over all blocks outside the base is estimated from a simple random sample of them, without bias. (Without a
base these are Fischer's blocks of K, which know nothing of one another and add up to far more.) The left-hand side
is not below ln det(I + K_SS), whatever was drawn: that bound is certain.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.numerics.sampling_estimates import estimated_total
from lightning_bayes.row_storage.collector import RowKeeper, cross_all
from lightning_bayes.row_storage.stored import KeptRows
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem
from lightning_bayes.structures.blocks import BlockCurvature, KeptPart, cross_of_shared
from lightning_bayes.structures.blocks_budget import capacity_of


class SampledBlockCurvature(Curvature):
    """`BlockCurvature` of the base, and some of the other blocks as they are.

    `log_det` and the upper bound are the estimate, with its standard error; γ is minus its derivative in the
    logarithm of the prior. gᵀ(G + Λ)⁻¹g is that of the kept rows, an upper bound.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if problem.block_sample is None:
            raise ValueError("Expected a problem with a sample of blocks.")
        self._sample = problem.block_sample
        roles = self._sample.in_order
        base = replace(problem, num_examples=sum(roles) * problem.batch_size)
        # What S costs each block that is held out is of the same budget.
        rows_held = (len(roles) - sum(roles)) * problem.batch_size * problem.rank
        capacity = capacity_of(base, rows_held)
        # Which way a layer's rows are kept is settled once: K between two batches needs both kept alike.
        self._keeper = RowKeeper()
        self._base = BlockCurvature(base, capacity=capacity, like=self._keeper)
        self._roles = iter(roles)
        self._role = True
        self._held: list[list[KeptRows]] = []

    def update(self, chunk: RowChunk) -> None:
        """Take in the rows of the batches that are read, in their order."""
        if chunk.columns.start == 0:
            self._role = next(self._roles)
            self._keeper = RowKeeper(self._keeper)
        if self._role:
            self._base.update(chunk)
            return
        self._keeper.add(chunk)
        if chunk.columns.stop == chunk.num_columns:
            self._held.append(self._keeper.layers())

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        part = self._base.part(precision)
        log_det, gamma, stderr, gamma_error = self._numbers(part, precision)
        return CurvatureSummary(
            log_det=log_det,
            bounds=(max(part.log_det - self._base.allowance(precision), 0.0), log_det),
            effective_parameters=gamma,
            quadratic=part.quadratic(precision, gradient),
            log_det_stderr=stderr,
            effective_parameters_stderr=gamma_error,
            upper_stderr=stderr,
        )

    @override
    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        return self._numbers(self._base.part(precision), precision)[:2]

    def _numbers(self, part: KeptPart, precision: Mapping[str, float]) -> tuple[float, float, float, float]:
        """Log-determinant and γ, then their standard errors."""
        estimates = [self._of_block(part, layers, precision) for layers in self._held]
        population = self._sample.num_batches - len(self._sample.base)
        log_det, stderr = estimated_total([value for value, _ in estimates], population)
        gamma, gamma_error = estimated_total([value for _, value in estimates], population)
        own, own_error = part.gamma()
        return (
            part.log_det + part.added[0] + log_det,
            own + part.added_gamma[0] + gamma,
            (stderr**2 + part.added[1] ** 2) ** 0.5,
            (gamma_error**2 + own_error**2 + part.added_gamma[1] ** 2) ** 0.5,
        )

    def _of_block(
        self, part: KeptPart, layers: list[KeptRows], precision: Mapping[str, float]
    ) -> tuple[float, float]:
        """What one block adds to the log-determinant and to γ."""
        own = cross_all(layers, layers, precision).to(accumulation_dtype(self.problem.device))
        return part.system.added_by_all(own, cross_of_shared(part.layers, layers, precision))
