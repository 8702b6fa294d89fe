"""K = V Λ⁻¹ Vᵀ [rows, rows]: the exact structure where rows are fewer than parameters, or cheaper.

ln det(I + Λ⁻¹ᐟ² VᵀV Λ⁻¹ᐟ²) = ln det(I + V Λ⁻¹ Vᵀ) (Sylvester).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.functional.evidence import effective_parameters, log_det_from_eigenvalues
from lightning_bayes.numerics.cholesky import (
    bounds_of,
    cholesky_in_place,
    eigenvalues_of,
    log_det_of,
    rounding_of_log_det,
)
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.row_storage.collector import RowKeeper, selected
from lightning_bayes.row_storage.newton_decrement import quadratic_form, woodbury
from lightning_bayes.row_storage.stored import KeptRows
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem
from lightning_bayes.structures.dual_system import (
    System,
    factorise,
    gram_of,
    inverse_on,
    tiles_of_system,
    trace_of_product,
    without_negligible,
)


class DualCurvature(Curvature):
    """K from rows that are kept in their factored form where that is cheaper.

    Memory: one rows × rows matrix, factorised in place, beside the rows' factors.

    Args:
        problem: Sizes.
        layers: Rows that are there already.
    """

    def __init__(self, problem: Problem, layers: list[KeptRows] | None = None) -> None:
        super().__init__(problem)
        self._small = problem.budget.small
        self._keeper = RowKeeper()
        self._given = layers
        # At one prior: for a multiple s of it K and its eigenvalues are these over s.
        self._known: tuple[dict[str, float], Tensor, Tensor] | None = None
        self._last: tuple[tuple[float, ...], _Factorised] | None = None

    @property
    @override
    def searches_by_spectrum(self) -> bool:
        return self.problem.is_small

    @override
    def update(self, chunk: RowChunk) -> None:
        self._keeper.add(chunk)
        self._known = self._last = None

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        factorised = self._rescaled(precision) or self._factorised(precision)
        layers = [layer.to(self._accurate) for layer in factorised.layers]
        quadratic = quadratic_form(layers, woodbury(layers, factorised.solve, precision), precision, gradient)
        return CurvatureSummary(
            factorised.log_det,
            bounds_of(factorised.log_det, factorised.rounding),
            factorised.gamma,
            quadratic,
            effective_parameters_stderr=factorised.gamma_stderr,
        )

    @override
    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        factorised = self._factorised(precision)
        return factorised.log_det, factorised.gamma

    def _rescaled(self, precision: Mapping[str, float]) -> "_Factorised | None":
        """Divide the K and the eigenvalues that are known by s, for a prior s times theirs; None for no such prior.

        A search for one λ asks for the spectrum before it asks for anything else.
        """
        if self._known is None:
            return None
        before, gram, eigenvalues = self._known
        scales = [value / before[name] for name, value in precision.items()]
        if max(scales) > min(scales) * (1.0 + 1e-12):
            return None
        factor, values = cholesky_in_place(gram / scales[0]), eigenvalues / scales[0]
        if factor is None:
            return None
        layers = self._layers(precision)
        log_det = log_det_from_eigenvalues(values, 1.0).item()
        gamma = effective_parameters(values, 1.0).item()
        rounding = rounding_of_log_det(len(values) + values.sum().item(), values.dtype)
        return _Factorised(
            layers, System(factor, tiles_of_system(layers)).solve, log_det, gamma, 0.0, rounding
        )

    def _factorised(self, precision: Mapping[str, float]) -> "_Factorised":
        """From a factor; that of the last prior is remembered, since a search for λ ends where `at` begins."""
        key = tuple(precision.values())
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._last = None  # its memory is needed
        layers: Sequence[KeptRows] = self._layers(precision)
        types, chosen = (self.problem.dtype, self._accurate), None
        if layers[0].num_rows > self._small:
            layers, chosen = without_negligible(layers, precision, self.problem.budget.left_out_share)
        system = factorise(
            layers if chosen is None else selected(layers, chosen), precision, types, self._small
        )
        gamma, stderr = system.trace_of_shrinkage(self.problem.budget.probes, self._small)
        solve = system.solve if chosen is None else inverse_on(chosen, system.solve)
        log_det = log_det_of(system.factor)
        self._last = key, _Factorised(layers, solve, log_det, gamma, stderr, system.rounding)
        return self._last[1]

    @override
    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        layers = self._layers(precision)
        # In float64 at every size: for which multiples of the prior it is asked for is not known here.
        gram = gram_of([layer.to(self._accurate) for layer in layers], precision)
        eigenvalues = eigenvalues_of(gram)
        if len(gram) <= self._small:
            self._known = dict(precision), gram, eigenvalues
        return eigenvalues

    @override
    def cheap_spectra(self, precision: Mapping[str, float]) -> Iterator[Tensor]:
        if self.problem.num_rows <= self.problem.budget.searched_spectrum:
            yield self.spectrum(precision)

    @override
    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        layers = self._layers(precision)
        system = factorise(layers, precision, (self.problem.dtype, self._accurate), self._small)
        log_det = log_det_of(system.factor)
        inverse = torch.cholesky_inverse(system.factor)
        traces = dict.fromkeys(self.problem.shapes, 0.0)
        # γᵢ = tr (I + K)⁻¹Kᵢ with the share Kᵢ of one tensor, tile by tile.
        for layer in (layer.to(inverse.dtype) for layer in layers):
            for name in layer.names:
                alone = dict.fromkeys(layer.names, math.inf) | {name: precision[name]}
                traces[name] = trace_of_product(inverse, layer, system.tiles, alone)
        return log_det, traces

    def _layers(self, precision: Mapping[str, float]) -> list[KeptRows]:
        return self._keeper.layers() if self._given is None else self._given

    @property
    def _accurate(self) -> torch.dtype:
        return accumulation_dtype(self.problem.device)


@dataclass(frozen=True)
class _Factorised:
    """What a factor of I + K answers.

    Attributes:
        layers: V, in the order and the basis of the factor.
        solve: (I + K)⁻¹ times coefficients [C, N].
        rounding: Allowance for rounding in `log_det`, nats.
    """

    layers: Sequence[KeptRows]
    solve: Callable[[Tensor], Tensor]
    log_det: float
    gamma: float
    gamma_stderr: float
    rounding: float
