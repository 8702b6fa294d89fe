"""gᵀ(G + Λ)⁻¹g from rows that are kept, by conjugate gradients."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_bayes.numerics.cholesky import solve
from lightning_bayes.row_storage.stored import KeptDense, KeptRows

Vector = Mapping[str, Tensor]
"""One number for each entry of each parameter."""

MAX_REFINEMENTS = 30
"""Steps of conjugate gradients for the Newton decrement; an exact factor needs one, float32 a few."""
REFINEMENT_TOLERANCE = 1e-7
"""Relative rise of the Newton decrement at which the steps end."""
QUICK_TOLERANCE = 1e-5
"""About what may be missing of the Newton decrement, relatively, where the factor is of the model's own type."""


def quadratic_form(
    layers: Sequence[KeptRows],
    precondition: Callable[[Vector], dict[str, Tensor]],
    precision: Mapping[str, float],
    gradient: Vector,
    tolerance: float = REFINEMENT_TOLERANCE,
) -> float:
    """gᵀ(G + Λ)⁻¹g as the maximum over x of 2gᵀx − xᵀ(G + Λ)x, by preconditioned conjugate gradients.

    With an exact factor the first step is the answer, and what a factor in float32 leaves is taken away by
    products in the layers' type. Each step raises the value, and the error that remains counts only by its square.

    Args:
        layers: V.
        precondition: (G + Λ)⁻¹, or something near it, times a vector.
        precision: λ of each parameter tensor.
        gradient: g of each parameter tensor.
        tolerance: Relative rise at which the steps end.
    """
    # Of entries up to 1, so that squares do not overflow in float32.
    sizes = [g.abs().max().item() for g in gradient.values() if g.numel()]
    unit = max(sizes, default=0.0)
    if unit == 0.0 or not math.isfinite(sum(sizes)):
        return sum(sizes)
    scaled = {name: (g / unit).to(layers[0].rows) for name, g in gradient.items()}
    return unit**2 * _climb(layers, precondition, precision, scaled, tolerance)


def _climb(
    layers: Sequence[KeptRows],
    precondition: Callable[[Vector], dict[str, Tensor]],
    precision: Mapping[str, float],
    gradient: Vector,
    tolerance: float,
) -> float:
    names, residual = list(gradient), dict(gradient)

    def inner(left: Vector, right: Vector) -> float:
        return sum((left[name] * right[name]).sum().item() for name in names)

    direction = precondition(residual)
    decrease = inner(residual, direction)
    value = 0.0
    for _ in range(MAX_REFINEMENTS):
        if decrease <= 0.0:  # nothing left, or nothing that the preconditioner can still see
            return value
        along = _dot(layers, direction)
        prior = sum(precision[name] * direction[name].square().sum().item() for name in names)
        step = decrease / (along.square().sum().item() + prior)
        # Along the direction the value rises by decrease² over the curvature. Where the preconditioner is the
        # inverse of G + Λ, or of a matrix below it, no more than `decrease` was left before: (1 − step) of it is now.
        value += step * decrease
        if abs(1.0 - step) * decrease <= tolerance * value:
            return value
        seen = dict(_combine(layers, along))
        curved = {name: precision[name] * direction[name] + seen.get(name, 0.0) for name in names}
        residual = {name: residual[name] - step * curved[name] for name in names}
        # What is left, rᵀ(G + Λ)⁻¹r, is at most rᵀΛ⁻¹r.
        if sum(residual[name].square().sum().item() / precision[name] for name in names) <= tolerance * value:
            return value
        whitened = precondition(residual)
        ahead = inner(residual, whitened)
        direction = {name: whitened[name] + ahead / decrease * direction[name] for name in names}
        decrease = ahead
    warnings.warn(
        f"The Newton decrement has not converged in {MAX_REFINEMENTS} steps and is a lower bound: the prior "
        "precision is too small for the floating-point type, or the tolerance too wide. A larger prior precision, a "
        "float64 model or a smaller tolerance avoids this.",
        stacklevel=2,
    )
    return value


def by_factor(
    factor: Tensor, scale: Tensor, shapes: Mapping[str, torch.Size]
) -> Callable[[Vector], dict[str, Tensor]]:
    """(G + Λ)⁻¹ = Λ⁻¹ᐟ²(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²)⁻¹Λ⁻¹ᐟ² as a function of vectors.

    Args:
        factor: Lower, of the matrix in brackets [p, p].
        scale: Λ⁻¹ᐟ² [p].
        shapes: Of the parameter tensors.
    """

    def precondition(vector: Vector) -> dict[str, Tensor]:
        whole = torch.cat([vector[name].flatten() for name in shapes]).to(scale) * scale
        solved = solve(factor, whole.unsqueeze(1)).squeeze(1) * scale
        parts = solved.split([shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    return precondition


def quadratic_form_by_factor(
    factor: Tensor,
    scale: Tensor,
    shapes: Mapping[str, torch.Size],
    precision: Mapping[str, float],
    gradient: Vector,
    rows: Tensor | None,
) -> float:
    """gᵀ(G + Λ)⁻¹g by a factor as `by_factor` takes it.

    Args:
        factor: Lower, of I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ² [p, p].
        scale: Λ⁻¹ᐟ² [p].
        shapes: Of the parameter tensors.
        precision: λ of each parameter tensor.
        gradient: g of each parameter tensor.
        rows: V [m, p] where the factor is in their type: one that is believed in it leaves little to refine. None
            where the factor is accurate.
    """
    precondition = by_factor(factor, scale, shapes)
    if rows is None:
        step = precondition(gradient)
        return sum((gradient[name].to(scale) * part).sum().item() for name, part in step.items())
    parts = rows.split([shape.numel() for shape in shapes.values()], dim=1)
    layers = [
        KeptDense(part.unsqueeze(0), name, shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    ]
    return quadratic_form(layers, precondition, precision, gradient, QUICK_TOLERANCE)


def woodbury(
    layers: Sequence[KeptRows], solve: Callable[[Tensor], Tensor], precision: Mapping[str, float]
) -> Callable[[Vector], dict[str, Tensor]]:
    """(G + Λ)⁻¹ = Λ⁻¹(I − Vᵀ(I + K)⁻¹VΛ⁻¹) as a function of vectors.

    Args:
        layers: V.
        solve: (I + K)⁻¹, or something near it, times coefficients [C, N].
        precision: λ of each parameter tensor.
    """

    def precondition(vector: Vector) -> dict[str, Tensor]:
        scaled = {name: part / precision[name] for name, part in vector.items()}
        seen = dict(_combine(layers, solve(_dot(layers, scaled))))
        return {name: part - seen.get(name, 0.0) / precision[name] for name, part in scaled.items()}

    return precondition


def _dot(layers: Sequence[KeptRows], vectors: Mapping[str, Tensor]) -> Tensor:
    """V times a vector, as [C, N]."""
    return torch.stack([layer.dot(vectors) for layer in layers]).sum(0)


def _combine(layers: Sequence[KeptRows], coefficients: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Vᵀ times coefficients [C, N], parameter by parameter."""
    for layer in layers:
        yield from layer.combine(coefficients).items()
