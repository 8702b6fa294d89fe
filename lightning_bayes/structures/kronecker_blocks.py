"""The diagonal blocks of the Kronecker approximation: B ⊗ A, an exact matrix, or its diagonal.

All answers are about the whitened block Λ⁻¹ᐟ² G Λ⁻¹ᐟ². Each block keeps its sums apart for each group of
columns, see `ColumnGroups`; without sampling there is one group.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.numerics.second_moment import SecondMoment, Spectrum
from lightning_bayes.rows.rows import DenseRows, OuterRows
from lightning_bayes.structures.base import Problem
from lightning_bayes.structures.column_groups import ColumnGroups, squares_by_group


@dataclass
class BlockSummary:
    """Numbers of one block at one prior; see `CurvatureSummary`."""

    log_det: float
    effective: dict[str, float]
    quadratic: float


class Block(ABC):
    """The part of the matrix that belongs to one parameter tensor, or to a layer's two.

    Args:
        problem: Sizes; its type is the one to decompose in.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.accurate = accumulation_dtype(problem.device)

    @property
    def leaves_out_exactly(self) -> bool:
        """Whether `eigenvalues` without a group are exact rather than of first order."""
        return True

    @abstractmethod
    def eigenvalues(
        self, precision: Mapping[str, float], without: int | None = None, scale: float = 1.0
    ) -> Tensor:
        """Whitened eigenvalues, zeros left out at will, from all groups or from all but one times `scale`."""

    @abstractmethod
    def summary(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor] | None) -> BlockSummary:
        """Numbers at one prior; without a gradient `quadratic` is 0."""


class ExactBlock(Block):
    """Σ v vᵀ [p, p], nothing approximated within the tensor."""

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__(problem)
        self.name = name
        self._moments = _Moments(problem)

    def add(self, layer: DenseRows, groups: Sequence[Sequence[int]]) -> None:
        """Add the rows of one batch."""
        self._moments.add(layer.dense()[self.name], groups)

    @override
    def eigenvalues(
        self, precision: Mapping[str, float], without: int | None = None, scale: float = 1.0
    ) -> Tensor:
        return self._moments.eigenvalues(without).to(self.accurate) * (scale / precision[self.name])

    @override
    def summary(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor] | None) -> BlockSummary:
        spectrum = self._moments.spectrum()
        return _tensor_summary(self.name, spectrum, precision[self.name], gradient, self.accurate)


class DiagonalBlock(Block):
    """Σ v² [p]."""

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__(problem)
        self.name = name
        self._sums = torch.zeros(
            ColumnGroups(problem).number, *problem.shapes[name], dtype=self.accurate, device=problem.device
        )

    def add(self, layer: DenseRows, groups: Sequence[Sequence[int]]) -> None:
        """Add the rows of one batch."""
        for group, squares in enumerate(squares_by_group(layer, groups)):
            if squares:
                self._sums[group] += squares[self.name]

    @override
    def eigenvalues(
        self, precision: Mapping[str, float], without: int | None = None, scale: float = 1.0
    ) -> Tensor:
        kept = [sums for group, sums in enumerate(self._sums) if group != without]
        return torch.stack(kept).sum(0).flatten() * (scale / precision[self.name])

    @override
    def summary(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor] | None) -> BlockSummary:
        values = self.eigenvalues(precision)
        slope = None if gradient is None else gradient[self.name].flatten().to(values)
        return _summary(self.name, values, slope, 0.0, precision[self.name])


class LinearBlock(Block):
    """B ⊗ A of a weight, and its bias: a block B of its own, or one with the weight.

    A = (1/N) Σₙ Σₜ aₙₜ aₙₜᵀ over all positions and uses, B = Σₙ,c (Σₜ g)(Σₜ g)ᵀ. Expanded, each position counts as an
    example: A = (1/Σₙ Tₙ) Σₙ Σₜ aₙₜ aₙₜᵀ, B = Σₙ,c Σₜ g gᵀ. Joint, each a is followed by
    a 1 and the bias is the weight's last column; whitening is then a scale of A's entries, so that B ⊗ A stays
    a Kronecker product when weight and bias have different λ.
    """

    def __init__(self, layer: OuterRows, joint: bool, problem: Problem, expand: bool = False) -> None:
        super().__init__(problem)
        self.weight, self.bias = layer.weight, layer.bias
        modules = {id(use.module) for use in layer.uses}
        self.joint = joint and self.weight is not None and self.bias is not None and len(modules) == 1
        self._inputs = SecondMoment()
        self._expand = expand
        self._grads = _Moments(problem)
        # Of a bias alone, whose exact block sums the positions of an example.
        self._sums = _Moments(problem) if expand else self._grads
        self._num_inputs = 0
        self._input_spectra: dict[float, Spectrum] = {}

    def add(self, layer: OuterRows, groups: Sequence[Sequence[int]], first: bool) -> None:
        """Add the rows of one batch; its inputs belong to all columns and count with the first."""
        grads = layer.grads()
        if self._expand:
            self._grads.add(grads.flatten(1, 2), groups)
        if not self._expand or (self.bias is not None and not self.joint):
            self._sums.add(grads.squeeze(2) if grads.shape[2] == 1 else grads.sum(2), groups)
        if first and self.weight is not None:
            inputs = layer.inputs()
            self._num_inputs += inputs.shape[:2].numel() if self._expand else len(inputs)
            inputs = inputs.flatten(0, 1)
            self._inputs.add(F.pad(inputs, (0, 1), value=1.0) if self.joint else inputs)
            self._input_spectra = {}

    @override
    def eigenvalues(
        self, precision: Mapping[str, float], without: int | None = None, scale: float = 1.0
    ) -> Tensor:
        outputs = self._grads.eigenvalues(without).to(self.accurate) * scale
        parts = []
        if self.weight is not None:
            parts.append(torch.outer(outputs, self._input_values(precision)).flatten())
        if self.bias is not None and not self.joint:
            sums = self._sums.eigenvalues(without).to(self.accurate) * scale if self._expand else outputs
            parts.append(sums / precision[self.bias])
        return torch.cat(parts)

    @property
    @override
    def leaves_out_exactly(self) -> bool:
        return self._grads.leaves_out_exactly and (not self._expand or self._sums.leaves_out_exactly)

    @override
    def summary(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor] | None) -> BlockSummary:
        outputs = self._grads.spectrum()
        total = BlockSummary(0.0, {}, 0.0)
        if self.bias is not None and not self.joint:
            sums = self._sums.spectrum()
            total = _tensor_summary(self.bias, sums, precision[self.bias], gradient, self.accurate)
        if self.weight is None:
            return total
        inputs = self._input_spectrum(precision)
        values = torch.outer(outputs.values.to(self.accurate), self._input_values(precision))
        inverse = (1 + values).reciprocal_()
        per_input = (values * inverse).sum(0)
        gamma = per_input.sum().item()
        total.log_det += values.log1p_().sum().item()
        if self.joint and self.bias is not None:
            width = self._width
            share = inputs.shares(width, slice(width - 1, width)).to(per_input)
            total.effective[self.bias] = (per_input * share).sum().item()
            gamma -= total.effective[self.bias]
        total.effective[self.weight] = gamma
        if gradient is not None:
            rotated, rest_in = inputs.coordinates(self._whitened(gradient, precision))
            rotated, rest_out = outputs.coordinates(rotated.mT)
            total.quadratic += (rotated.mT.square() * inverse).sum().item() + rest_in + rest_out
        return total

    @property
    def _width(self) -> int:
        return self.problem.shapes[self.weight][1:].numel() + self.joint  # type: ignore[index]

    def _input_spectrum(self, precision: Mapping[str, float]) -> Spectrum:
        """Return the spectrum of N·A with the bias's entry scaled to the weight's precision."""
        ratio, scale = 1.0, None
        if self.joint:
            ratio = precision[self.weight] / precision[self.bias]  # type: ignore[index]
            scale = torch.ones(self._width, dtype=self.accurate, device=self.problem.device)
            scale[-1] = ratio**0.5
        if ratio not in self._input_spectra:
            self._input_spectra = {ratio: self._inputs.spectrum(self.problem.dtype, scale)}
        return self._input_spectra[ratio]

    def _input_values(self, precision: Mapping[str, float]) -> Tensor:
        values = self._input_spectrum(precision).values.to(self.accurate)
        scaled: Tensor = values / (self._num_inputs * precision[self.weight])  # type: ignore[index]
        return scaled

    def _whitened(self, gradient: Mapping[str, Tensor], precision: Mapping[str, float]) -> Tensor:
        """The gradient as [out, in], or [out, in + 1] with the bias, over √λ."""
        if self.weight is None:
            raise TypeError("A bias alone is not a matrix.")
        whitened: Tensor = gradient[self.weight].flatten(1) / precision[self.weight] ** 0.5
        if not self.joint or self.bias is None:
            return whitened
        column = gradient[self.bias].unsqueeze(1) / precision[self.bias] ** 0.5
        return torch.cat([whitened, column], 1)


class _Moments:
    """One second moment a group, and their sum's decomposition.

    Up to `Budget.kronecker_left_out` entries the eigenvalues without a group are those of what is left; beyond, those
    of first order, uᵀMu of the eigenvectors u of the whole, because another decomposition for each group would take
    longer than the number whose error it is for.
    """

    def __init__(self, problem: Problem) -> None:
        self._groups = [SecondMoment() for _ in range(ColumnGroups(problem).number)]
        self._dtype = problem.dtype
        self._largest_left_out = problem.budget.kronecker_left_out
        self._width = 0
        self._spectrum: Spectrum | None = None

    def add(self, rows: Tensor, groups: Sequence[Sequence[int]]) -> None:
        """Add rows [C, N, p]."""
        self._spectrum, self._width = None, rows.shape[-1]
        for moment, columns in zip(self._groups, groups, strict=True):
            if columns:
                own = rows if len(columns) == len(rows) else rows[list(columns)]
                moment.add(own.flatten(0, 1))

    @property
    def leaves_out_exactly(self) -> bool:
        """Whether the eigenvalues without a group are exact."""
        return self._width <= self._largest_left_out

    def spectrum(self) -> Spectrum:
        """Return the spectrum of all groups together."""
        if self._spectrum is None:
            whole = self._groups[0] if len(self._groups) == 1 else SecondMoment.merged(self._groups)
            self._spectrum = whole.spectrum(self._dtype)
        return self._spectrum

    def eigenvalues(self, without: int | None) -> Tensor:
        """Return the eigenvalues of all groups, or of all but one."""
        if without is None:
            return self.spectrum().values
        if not self.leaves_out_exactly:
            whole = self.spectrum()
            return (whole.values - self._groups[without].along(whole)).clamp(min=0)
        kept = [moment for group, moment in enumerate(self._groups) if group != without]
        return SecondMoment.merged(kept).eigenvalues(self._dtype)


def _tensor_summary(
    name: str,
    spectrum: Spectrum,
    precision: float,
    gradient: Mapping[str, Tensor] | None,
    accurate: torch.dtype,
) -> BlockSummary:
    """Summarise one tensor that has a matrix of its own."""
    rotated, rest = None, 0.0
    if gradient is not None:
        rotated, rest = spectrum.coordinates(gradient[name].reshape(1, -1))
    return _summary(name, spectrum.values.to(accurate) / precision, rotated, rest, precision)


def _summary(
    name: str, values: Tensor, rotated: Tensor | None, rest: float, precision: float
) -> BlockSummary:
    """Summarise whitened eigenvalues, and a gradient in their eigenvectors' coordinates with what these leave out."""
    inverse = 1 / (1 + values)
    quadratic = 0.0 if rotated is None else (rotated.square() * inverse).sum().item() + rest
    gamma = (values * inverse).sum().item()
    return BlockSummary(torch.log1p(values).sum().item(), {name: gamma}, quadratic / precision)
