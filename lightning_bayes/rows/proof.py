"""The proof of rows: in every batch the rows of all examples, added up with weights, are autograd's gradient.

With random weights wₙ and ρ_c, Σₙ wₙ Σ_c ρ_c v₍ₙ,c₎ is the gradient of Σₙ wₙ Σ_c ρ_c ⟨f(xₙ), R[c, n]⟩ in the
parameters. The left side weighs *rows*, the right side *outputs*: an example whose rows are wrong, or are another's,
shows. Rows are linear in the gradients of outputs, so that one column Σ_c ρ_c R[c, n] stands for all; and what is
wrong in a matrix shows along a random direction u vᵀ of it, for which a linear map's rows need not be multiplied out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from operator import methodcaller

import torch
from torch import Tensor

from lightning_bayes.rows.backward import Proof, gradients, random_signed
from lightning_bayes.rows.layers import CONVOLUTIONS, convolved
from lightning_bayes.rows.rows import DenseRows, LayerUse, OuterRows, Rows

ROUNDING = 3e3
"""Allowed difference along a random direction, in units of the type's rounding, relative to a gradient's norm.

Sums over 4,000 columns in another order differ by some 450 units, where what is added nearly cancels."""
SMALLEST_SCALE = 0.1
"""That norm counts as at least this much of the largest of all: what cancels is rounded as its terms are."""

FLAT = 2**16
"""Parameters up to which truths are compared in one go, where calls take longer than what they do."""


@dataclass(frozen=True)
class Trial:
    """Parameters whose rows are tried, each along one random direction u vᵀ: u for its first dimension.

    Attributes:
        parameters: Those that are tried.
    """

    parameters: Mapping[str, Tensor]

    def wrong(self, proof: Proof, layers: Sequence[Rows], of_all_columns: bool) -> list[str]:
        """Names whose rows are not autograd's, in one backward pass and a weighted sum of rows.

        Args:
            proof: From `proof_of`.
            layers: Rows of `proof.batch`, or of all columns of the batch, if they are at hand.
            of_all_columns: Which they are. Those that are formed together for whoever asks next are then tried
                themselves, of others the one column that stands for all.
        """
        column = proof.column[0]
        seed = proof.weights.reshape(-1, *[1] * (column.dim() - 1)) * column
        truths = gradients(proof.source.outputs, list(self.parameters.values()), seed)
        # Parameters of one use share it as before.
        in_one_column = cache(methodcaller("one_column", proof.columns))
        projections: dict[str, Tensor] = {}
        for rows in layers:
            tried, weights = rows, proof.weights
            if of_all_columns and isinstance(rows, DenseRows) and rows.kept_when_formed:
                weights = torch.outer(weights, proof.columns)
            elif of_all_columns:
                tried = rows.with_uses(in_one_column)
            projections |= _projected(tried, weights, self._directions)
        return self._different(projections, truths)

    @cached_property
    def _directions(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The u and v of each."""
        generator = torch.Generator().manual_seed(0)
        like = next(iter(self.parameters.values())).detach()
        pairs = {}
        for name, parameter in self.parameters.items():
            first = parameter.shape[0] if parameter.dim() else 1
            others = parameter.numel() // first
            right = random_signed(others, like, generator) if others > 1 else like.new_ones(1)
            pairs[name] = random_signed(first, like, generator), right
        return pairs

    @cached_property
    def _flat(self) -> tuple[Tensor, Tensor] | None:
        """All u vᵀ one after the other, and of which parameter each entry is; None where that would be long."""
        sizes = torch.tensor([parameter.numel() for parameter in self.parameters.values()])
        if int(sizes.sum()) > FLAT:
            return None
        flat = torch.cat([torch.outer(left, right).flatten() for left, right in self._directions.values()])
        return flat, torch.arange(len(sizes)).repeat_interleave(sizes).to(flat.device)

    def _along(self, truths: Sequence[Tensor | None]) -> Tensor:
        """⟨u vᵀ, t⟩ of each, 0 for None."""
        pairs = zip(self._directions.values(), truths, strict=True)
        if self._flat is None:
            zero = next(iter(self._directions.values()))[0].new_zeros(())
            return torch.stack([zero if t is None else u @ t.reshape(len(u), -1) @ v for (u, v), t in pairs])
        flat, places = self._flat
        parts = [flat.new_zeros(len(u) * len(v)) if t is None else t.reshape(-1) for (u, v), t in pairs]
        whole: Tensor = torch.cat(parts).to(flat)
        sums: Tensor = flat.new_zeros(len(parts))
        return sums.index_add(0, places, whole * flat)

    def _different(self, projections: Mapping[str, Tensor], truths: Sequence[Tensor | None]) -> list[str]:
        """Names whose rows are not the truth; what is in neither is zero in both."""
        expected = self._along(truths)
        zero = expected.new_zeros(())
        difference = (torch.stack([projections.get(name, zero) for name in self.parameters]) - expected).abs()
        # What is expected is of the gradient's norm in size, now and then smaller: the norms, which take as long as
        # the whole comparison, are for where that is not enough.
        if _is_within(difference, expected.abs()).all():
            return []
        norms = torch.stack([zero if t is None else torch.linalg.vector_norm(t).to(zero) for t in truths])
        fine = _is_within(difference, norms).tolist()  # one wait for the device for all parameters
        return [name for name, is_fine in zip(self.parameters, fine, strict=True) if not is_fine]


def _projected(
    rows: Rows, weights: Tensor, directions: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """⟨u vᵀ, Σₙ wₙ v₍ₙ,₀₎⟩ over the rows of the first column, or nothing where they cannot be made.

    Of a linear map that is Σₙₜ wₙ (g₍ₙₜ₎·u)(a₍ₙₜ₎·v), and no matrix is formed.

    Args:
        rows: Of a layer.
        weights: wₙ, [N]; or w₍ₙ,c₎ [N, C] of all columns, for rows that are kept when formed.
        directions: u and v of the parameters that are tried.
    """
    sums: dict[str, Tensor] = {}
    if isinstance(rows, OuterRows):
        for use in rows.uses:
            for name in (rows.weight, rows.bias):
                if name is not None and name in directions:
                    left, right = directions[name]
                    along = _along(use, left, None if name == rows.bias else right)
                    along = along.reshape(len(weights), -1).sum(1)
                    part = weights.to(along).dot(along)
                    sums[name] = sums[name] + part if name in sums else part
    elif rows.name in directions:
        left, right = directions[rows.name]
        try:
            if weights.dim() == 1:
                totals = [use.weighted_total(local_name, weights) for local_name, use in rows.uses]
                total = torch.stack(totals).sum(0)
            else:
                formed = rows.dense()[rows.name].transpose(0, 1).flatten(0, 1)  # as they lie in memory
                total = weights.to(formed).flatten() @ formed
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # a backward pass that vmap does not know: unproved, the plan takes another way
            return {}
        sums[rows.name] = left @ total.reshape(len(left), -1) @ right
    return sums


def _along(use: LayerUse, left: Tensor, right: Tensor | None) -> Tensor:
    """(g·u)(a·v) at each position of the first column, or g·u alone where there is no v: [N·k, positions]."""
    is_convolution = isinstance(use.module, CONVOLUTIONS)
    grads = use.grads[0]
    of_grads = left @ grads.flatten(2) if is_convolution else grads @ left
    if right is None:
        return of_grads
    of_inputs = convolved(use.module, use.inputs, right) if is_convolution else use.inputs @ right
    return of_grads * of_inputs.view_as(of_grads)


def _is_within(difference: Tensor, size: Tensor) -> Tensor:
    return difference <= ROUNDING * torch.finfo(size.dtype).eps * size.clamp(min=SMALLEST_SCALE * size.max())
