"""What some rows leave of I + K: the Schur complement on the others, by its products and its diagonal.

With S the selected rows, I + Q = (I + K)/(I + K_SS) on the others, and every multiple of one prior at once.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.row_storage.collector import cross_all
from lightning_bayes.row_storage.eigenbasis_rows import EigenbasisRows
from lightning_bayes.row_storage.newton_decrement import climbed, dot_each, woodbury
from lightning_bayes.row_storage.row_products import RowProducts

DECREMENT_STEPS = 100
"""Steps of conjugate gradients that the Newton decrement may take."""


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
        self._seen: dict[float, tuple[Tensor, Tensor]] = {}

    def prepare(self, scales: Sequence[float]) -> None:
        """Compute what S takes from the diagonal at some priors, together: one pass over the rows."""
        weights, wanted = [], [scale for scale in scales if scale not in self._seen]
        for scale in wanted:
            shrunk = 1.0 / (1.0 + self.values / scale) / scale**2
            weights += [shrunk, shrunk**2 * scale**2]
        if not weights:
            return
        pieces = []
        for cross in self.all.cross(self.products, self.layers):
            along = (self.vectors.mT.to(cross) @ cross).to(self.values).square_()
            pieces.append(torch.stack(weights) @ along)
        whole = torch.cat(pieces, 1) * self.remains
        self._seen |= {scale: (whole[2 * i], whole[2 * i + 1]) for i, scale in enumerate(wanted)}

    def taken(self, scale: float) -> tuple[Tensor, Tensor]:
        """K_iS A⁻¹ K_Si and K_iS A⁻² K_Si of every row outside S, with A = I + K_SS, at `scale` times the prior."""
        self.prepare([scale])
        return self._seen[scale]


class SchurComplement:
    """I + Q at one prior. Vectors are [k, rows] over all rows and 0 on S.

    Args:
        selected: S.
        scale: s; the prior is s times that of the rows, and K is theirs over s.

    Attributes:
        log_det_selected: ln det(I + K_SS).
        diagonal: Q_ii, [rows], 0 on S.
    """

    def __init__(self, selected: SelectedRows, scale: float) -> None:
        self._selected, self._scale = selected, scale
        self._shrinkage = 1.0 / (1.0 + selected.values / scale)
        self.log_det_selected = (selected.values / scale).log1p().sum().item()
        whole = selected.all.diagonal() / scale * selected.remains
        once, twice = selected.taken(scale)
        self.diagonal = (whole - once).clamp(min=0.0)
        growth = (self.diagonal - twice).clamp(min=0.0)
        like = selected.layers[0].rows
        self._root = (1.0 + self.diagonal).rsqrt().to(like)
        self._mask = selected.remains.to(like)
        own = len(selected.values) - self._shrinkage.sum().item()
        self.gamma_by_diagonal = own + (growth / (1.0 + self.diagonal)).sum().item()
        """γ where M is the identity."""
        self.gamma_selected = own
        """tr K_SS(I + K_SS)⁻¹."""

    @property
    def log_det_bound(self) -> float:
        """Σ_{i∉S} ln(1 + Q_ii), which ln det(I + Q) is at most."""
        return self.diagonal.log1p().sum().item()

    @property
    def least(self) -> float:
        """A number that no eigenvalue of M is below."""
        return 1.0 / (1.0 + self.diagonal.max().item())

    def product(self, vectors: Tensor) -> Tensor:
        """M = D^-½ (I + Q) D^-½ times vectors, with D its diagonal."""
        inner = self._root * vectors
        return self._root * (inner + self._times_q(inner, growing=False))

    def growth(self, vectors: Tensor) -> Tensor:
        """D^-½ (dQ/d ln t) D^-½ times vectors, at t = 1 for t K in the place of K."""
        return self._root * self._times_q(self._root * vectors, growing=True)

    def masked(self, vectors: Tensor) -> Tensor:
        """Return vectors with 0 on S."""
        return vectors * self._mask

    def quadratic_form(self, gradient: Mapping[str, Tensor], tolerance: float) -> tuple[float, float]:
        """gᵀ(G + Λ)⁻¹g of all rows with S as the preconditioner, from below, and what may be missing of it."""
        selected, precision = self._selected, self._precision
        like = selected.layers[0].rows
        scaled = {name: part.to(like) for name, part in gradient.items()}

        def dot(vector: Mapping[str, Tensor]) -> Tensor:
            return selected.all.dot(selected.products, {name: v.unsqueeze(0) for name, v in vector.items()})

        def combine(coefficients: Tensor) -> dict[str, Tensor]:
            return {
                name: v[0] for name, v in selected.all.combine(selected.products, coefficients).items()
            }

        inverse = woodbury(selected.layers, self._solve, precision)
        return climbed(dot, combine, inverse, precision, scaled, tolerance, DECREMENT_STEPS)

    @property
    def _precision(self) -> dict[str, float]:
        return {name: value * self._scale for name, value in self._selected.all.precision.items()}

    def _times_q(self, vectors: Tensor, growing: bool) -> Tensor:
        selected, precision = self._selected, self._precision
        pulled = selected.all.combine(selected.products, vectors)
        for name, part in pulled.items():
            part /= precision[name]
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
        return ((along * self._shrinkage) @ self._selected.vectors.mT).to(coefficients)
