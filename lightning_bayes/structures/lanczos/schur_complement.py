"""What some rows leave of I + K: the Schur complement on the others, by its products and its diagonal.

With S the selected rows, I + Q = (I + K)/(I + K_SS) on the others, and every multiple of one prior at once.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.row_storage.collector import cross_all
from lightning_bayes.row_storage.eigenbasis_rows import EigenbasisRows
from lightning_bayes.row_storage.newton_decrement import climbed, dot_each, woodbury
from lightning_bayes.row_storage.row_products import RowProducts
from lightning_bayes.structures.lanczos.known_part import DECREMENT_STEPS, KnownPart


class SelectedRows:
    """S, with the eigenvalues of K_SS, which serve every multiple of the prior.

    Args:
        rows: All, of which the largest are selected.
        products: Theirs.
    """

    def __init__(self, rows: EigenbasisRows, products: RowProducts) -> None:
        self.all, self.products = rows, products
        self.layers, self.numbers = rows.largest()
        accurate = accumulation_dtype(self.numbers.device)
        precise = [layer.to(accurate) for layer in self.layers]
        matrix = cross_all(precise, precise, rows.precision)
        values, self.vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        self.values = values.clamp_(min=0.0)
        self.remains = torch.ones(len(rows), dtype=accurate, device=self.numbers.device)
        """1 outside S, 0 in it: [rows]."""
        self.remains[self.numbers] = 0.0
        self._taken: dict[float, Tensor] = {}

    def prepare(self, scales: Sequence[float]) -> None:
        """Compute what S takes from the diagonal at some priors, together: one pass over the rows."""
        wanted = [scale for scale in scales if scale not in self._taken]
        if not wanted:
            return
        weights = torch.stack([1.0 / (scale * (scale + self.values)) for scale in wanted])
        # Into one tensor: small ones between those of a batch would keep the memory of these from being used again.
        whole = self.remains.new_empty(len(wanted), len(self.all))
        for columns, cross in self.all.cross(self.products, self.layers):
            along = (self.vectors.mT.to(cross) @ cross).to(self.values).square_()
            torch.matmul(weights, along, out=whole[:, columns])
        self._taken |= zip(wanted, whole.mul_(self.remains), strict=True)

    def taken(self, scale: float) -> Tensor:
        """K_iS (I + K_SS)⁻¹ K_Si of every row outside S, at `scale` times the prior: [rows]."""
        self.prepare([scale])
        return self._taken[scale]


class SchurComplement(KnownPart):
    """I + Q at one prior, scaled by its diagonal D: M = D^-½ (I + Q) D^-½. Vectors are 0 on S.

    ln det(I + K) = ln det(I + K_SS) + Σ ln D_ii + tr ln M, and tr ln M ≤ 0 (Hadamard).

    Args:
        selected: S.
        scale: s; the prior is s times that of the rows, and K is theirs over s.
    """

    def __init__(self, selected: SelectedRows, scale: float) -> None:
        self._selected, self._scale = selected, scale
        self._precision = {name: value * scale for name, value in selected.all.precision.items()}
        self._shrinkage = 1.0 / (1.0 + selected.values / scale)
        whole = selected.all.diagonal() / scale * selected.remains
        left = (whole - selected.taken(scale)).clamp(min=0.0)  # Q_ii
        of_selected = (selected.values / scale).log1p().sum().item()
        self.log_det = of_selected + left.log1p().sum().item()
        self.gamma = len(selected.values) - self._shrinkage.sum().item()
        self.bounds = of_selected, self.log_det
        self.magnitude = len(left) + left.sum().item() + len(selected.values)
        self.least = 1.0 / (1.0 + left.max().item())
        like = selected.layers[0].rows
        self._root = (1.0 + left).rsqrt().to(like)
        self._mask = selected.remains.to(like)

    @override
    def masked(self, vectors: Tensor) -> Tensor:
        return vectors * self._mask

    @override
    def product(self, vectors: Tensor) -> Tensor:
        inner = self._root * vectors
        return self._root * (inner + self._times_q(inner, growing=False))

    @override
    def gamma_image(self, vectors: Tensor, solved: Tensor) -> Tensor:
        # γ = tr K_SS(I + K_SS)⁻¹ + tr (I + Q)⁻¹Q', with Q' the derivative in ln t of the Q that t K has.
        return self._root * self._times_q(self._root * solved, growing=True)

    @override
    def quadratic_form(self, gradient: Mapping[str, Tensor], tolerance: float) -> tuple[float, float]:
        """gᵀ(G + Λ)⁻¹g of all rows with S as the preconditioner, from below, and what may be missing of it."""
        selected = self._selected
        like = selected.layers[0].rows
        scaled = {name: part.to(like) for name, part in gradient.items()}

        def dot(vector: Mapping[str, Tensor]) -> Tensor:
            return selected.all.dot(selected.products, {name: v.unsqueeze(0) for name, v in vector.items()})

        def combine(coefficients: Tensor) -> dict[str, Tensor]:
            return {name: v[0] for name, v in selected.all.combine(selected.products, coefficients).items()}

        inverse = woodbury(selected.layers, self._solve, self._precision)
        value, missing, _ = climbed(
            dot, combine, inverse, self._precision, scaled, tolerance, DECREMENT_STEPS
        )
        return value, missing

    def _times_q(self, vectors: Tensor, growing: bool) -> Tensor:
        selected, precision = self._selected, self._precision
        pulled = selected.all.combine(selected.products, vectors)
        for name in pulled:
            pulled[name] /= precision[name]
        solved = self._solve(dot_each(selected.layers, pulled))
        if growing:  # dQ = V(1 − Π)²Vᵀ/λ for Q = V(1 − Π)Vᵀ/λ, Π = V_Sᵀ(I + K_SS)⁻¹V_S/λ
            solved = solved + self._solve(solved)
        for layer in selected.layers:
            for name, part in layer.combine(solved).items():
                pulled[name] -= part / precision[name]
        return self.masked(selected.all.dot(selected.products, pulled))

    def _solve(self, coefficients: Tensor) -> Tensor:
        """(I + K_SS)⁻¹ times coefficients [..., S]."""
        along = coefficients.to(self._shrinkage) @ self._selected.vectors
        solved: Tensor = (along * self._shrinkage) @ self._selected.vectors.mT
        return solved.to(coefficients)
