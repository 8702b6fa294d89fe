"""Bounds on the exact evidence from rows that are dropped batch by batch: linear in N, memory of one batch.

Some *landmark* rows S, the largest of the first few thousand in their examples' eigenbasis, span W. With
H = (K_SS + ν)⁻¹ᐟ² K_S: for all rows, HᵀH ≤ K, and

    ln det(I + HHᵀ) ≤ ln det(I + K) ≤ ln det(I + HHᵀ) + Σₙ ln det(I + (K − HᵀH)ₙₙ)

(left: K is larger; right: det(A + B) ≤ det A · det(I + B) for A ≥ I, and Fischer over examples n). HHᵀ = Σ over
batches is [landmarks, landmarks]. On the right Hadamard's Σ ln(1 + Gᵢᵢ/λᵢ) over parameters may be smaller: it grows
only with ln N. Everything is kept for Λ = s Λ₀ at once, since the pass ends before s is known.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_bayes.curvature.base import Curvature, CurvatureSummary, Problem, accumulation_dtype
from lightning_bayes.curvature.diagonal import DiagonalCurvature
from lightning_bayes.curvature.gram import KeptRows
from lightning_bayes.curvature.kept import RowKeeper, cross_all, dot_all
from lightning_bayes.curvature.principal import principal_rows
from lightning_bayes.curvature.rows import RowBlock

__all__ = ["BlockCurvature", "blocks_cost"]

MAX_LANDMARKS = 1024
"""Landmark rows where the data are few; halved until the pass fits `LANDMARK_FLOP`."""
MIN_LANDMARKS = 128
"""Landmark rows where the data are many."""
LANDMARK_FLOP = 1.4e12
"""Operations that the choice of the number of landmarks goes by."""
POOL_ROWS = 8192
"""Rows of the first batches that are held back to choose the landmarks from, where they are short."""
POOL_BYTES = 1e9
"""Memory of these where they are long."""
SHIFT = 16
"""ν in units of eps times the mean of K_SS's diagonal: keeps rounding in K from being divided by nothing."""
ROUNDING_FACTOR = 64
"""Allowance for rounding in the bounds, in units of eps · tr K/λ."""


def blocks_cost(problem: Problem) -> tuple[float, float]:
    """Bytes and floating-point operations of `BlockCurvature`."""
    landmarks = _num_landmarks(problem)
    held = min(problem.num_rows, _pool_rows(problem) + problem.batch_size * problem.rank)
    memory = held * _row_bytes(problem, landmarks)
    return memory + 16.0 * problem.num_parameters + 40.0 * landmarks**2, _flop(problem, landmarks)


def _pool_rows(problem: Problem) -> int:
    return int(min(POOL_ROWS, POOL_BYTES / _row_bytes(problem, MAX_LANDMARKS)))


def _row_bytes(problem: Problem, landmarks: int) -> float:
    """A row as it came, put together, and turned, and its products with the landmarks."""
    return 3.0 * (problem.kept_width + landmarks) * problem.dtype.itemsize


def _flop(problem: Problem, landmarks: int) -> float:
    to_landmarks = 2 * landmarks * problem.gram_width + 4 * landmarks**2
    return float(problem.num_rows) * (to_landmarks + 2 * problem.rank * problem.gram_width)


def _num_landmarks(problem: Problem) -> int:
    landmarks = MAX_LANDMARKS
    while landmarks > MIN_LANDMARKS and _flop(problem, landmarks) > LANDMARK_FLOP:
        landmarks //= 2
    return min(landmarks, problem.num_rows)


class BlockCurvature(Curvature):
    """Landmarks, a Gram matrix between them, and what each example keeps beyond them.

    The bracket is as wide as the landmarks are few. `log_det` is its middle. γ and gᵀ(G + Λ)⁻¹g are those of
    the curvature within the landmarks' span: γ is a lower bound, and directions beyond the span count as flat.
    Beside a batch, or the first few, it keeps 8 bytes a row.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._keeper = RowKeeper()
        self._landmarks: list[KeptRows] = []
        self._diagonal = DiagonalCurvature(problem)
        self._unit = dict(problem.strengths or dict.fromkeys(problem.shapes, 1.0))
        self._root = torch.empty(0)  # (K_SS + ν)⁻¹ᐟ² [landmarks, landmarks]
        self._gram = torch.empty(0)  # HHᵀ [landmarks, landmarks]
        self._residuals: list[Tensor] = []  # eigenvalues of the examples' blocks of K − HᵀH
        self._trace = 0.0

    def update(self, block: RowBlock) -> None:
        """See `Curvature.update`."""
        self._diagonal.update(block)
        self._keeper.add(block)
        whole = block.columns.stop == block.num_columns
        if whole and (self._landmarks or self._keeper.num_rows >= _pool_rows(self.problem)):
            self._empty_keeper()

    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """See `Curvature.at`.

        Raises:
            ValueError: If the precisions are not in proportion to those that the pass was made for.
        """
        scale = self._scale(precision)
        spectrum = self._spectrum() / scale
        inside = spectrum.log1p().sum().item()
        beyond = (torch.cat(self._residuals) / scale).log1p().sum(dtype=spectrum.dtype).item()
        slack = ROUNDING_FACTOR * torch.finfo(self.problem.dtype).eps * self._trace / scale
        hadamard = self._diagonal.at(precision, gradient).log_det
        lower, upper = max(inside - slack, 0.0), min(inside + beyond, hadamard) + slack
        return CurvatureSummary(
            log_det=0.5 * (lower + upper),
            bounds=(lower, upper),
            effective_parameters=(spectrum / (1.0 + spectrum)).sum().item(),
            quadratic=self._quadratic(scale, gradient),
        )

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """See `Curvature.spectrum`: of HHᵀ, none above its counterpart in K."""
        scale = self._scale(precision)
        return self._spectrum() / scale

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """See `Curvature.log_det_and_traces`: of HHᵀ, from γᵢ = tr (HHᵀ(I + HHᵀ)⁻¹ WᵢᵀWᵢ)."""
        scale, spectrum = self._scale(precision), self.spectrum(precision)
        eye = torch.eye(len(self._gram)).to(self._gram)
        shrinkage = torch.linalg.solve(scale * eye + self._gram, self._gram)
        traces = dict.fromkeys(self.problem.shapes, 0.0)
        for layer in self._landmarks:
            for name in layer.names:
                alone = dict.fromkeys(layer.names, torch.inf) | {name: self._unit[name]}
                share = self._root.mT @ layer.cross(layer, alone).to(self._root) @ self._root
                traces[name] = (share * shrinkage).sum().item()
        return spectrum.log1p().sum().item(), traces

    def _empty_keeper(self) -> None:
        layers = self._keeper.layers()
        self._keeper = RowKeeper(self._keeper)
        own = torch.stack([layer.example_grams(self._unit) for layer in layers]).sum(0)
        own = own.to(accumulation_dtype(self.problem.device))
        if not self._landmarks:
            self._choose_landmarks(layers, own)
        cross = self._cross(layers, own)
        within = self._root.to(cross).mT @ cross
        self._gram += within @ within.mT
        self._trace += own.diagonal(dim1=1, dim2=2).sum().item()
        examples = within.unflatten(1, (own.shape[1], -1)).permute(2, 1, 0)  # [N, C, landmarks]
        self._residuals.append(torch.linalg.eigvalsh(own - examples @ examples.mT).clamp_(min=0.0).flatten())

    def _cross(self, layers: Sequence[KeptRows], own: Tensor) -> Tensor:
        """K between the landmarks and a batch. A layer that one of them lacks has no rows there."""
        theirs = {layer.names: layer for layer in layers}
        shared = [(layer, theirs[layer.names]) for layer in self._landmarks if layer.names in theirs]
        if not shared:
            return own.new_zeros(len(self._root), own.shape[0] * own.shape[1])
        left, right = zip(*shared, strict=True)
        return cross_all(left, right, self._unit)

    def _choose_landmarks(self, layers: list[KeptRows], own: Tensor) -> None:
        rows = principal_rows(layers, own)
        number = min(_num_landmarks(self.problem), len(rows.eigenvalues))
        self._landmarks = rows.pick(rows.eigenvalues.topk(number).indices)
        gram = cross_all(self._landmarks, self._landmarks, self._unit).to(own)
        shift = SHIFT * torch.finfo(self.problem.dtype).eps * gram.diagonal().mean()
        shift = shift.clamp(min=torch.finfo(self.problem.dtype).tiny)  # no row counts
        values, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
        self._root = vectors * (values.clamp(min=0.0) + shift).rsqrt()
        self._gram = torch.zeros_like(gram)

    def _spectrum(self) -> Tensor:
        if self._keeper.num_rows or not self._residuals:  # fewer than the pool
            self._empty_keeper()
        eigenvalues: Tensor = torch.linalg.eigvalsh(self._gram)
        return eigenvalues.clamp_(min=0.0)

    def _scale(self, precision: Mapping[str, float]) -> float:
        ratios = [precision[name] / unit for name, unit in self._unit.items()]
        if max(ratios) > min(ratios) * (1.0 + 1e-9):
            raise ValueError(
                'structure="blocks" has summed its rows for prior precisions in fixed proportions, and cannot '
                'answer for others. Use one prior precision for all parameters, or structure="kron".'
            )
        return ratios[0]

    def _quadratic(self, scale: float, gradient: Mapping[str, Tensor]) -> float:
        """g̃ᵀ(W HHᵀ Wᵀ + s)⁻¹g̃ for g̃ = Λ₀⁻¹ᐟ²g."""
        like = self._landmarks[0].rows
        vectors = {name: gradient[name].to(like) / unit for name, unit in self._unit.items()}
        inside = self._root.mT @ dot_all(self._landmarks, vectors).flatten().to(self._root)
        whole: float = sum(gradient[name].square().sum().item() / unit for name, unit in self._unit.items())
        eye = torch.eye(len(self._gram)).to(self._gram)
        solved = torch.linalg.solve(scale * eye + self._gram, inside)
        curved: float = (inside @ solved).item()
        return curved + max(whole - inside.square().sum().item(), 0.0) / scale
