"""gᵀ(G + Λ)⁻¹g from rows that are kept, by conjugate gradients."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

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
    value, left, steps = climbed(
        partial(dot_all, layers),
        lambda coefficients: dict(combine_all(layers, coefficients)),
        precondition,
        precision,
        {name: g.to(layers[0].rows) for name, g in gradient.items()},
        tolerance,
        MAX_REFINEMENTS,
    )
    if steps == MAX_REFINEMENTS and left > tolerance * value:
        warnings.warn(
            f"The Newton decrement has not converged in {MAX_REFINEMENTS} steps and is a lower bound: the prior "
            "precision is too small for the floating-point type, or the tolerance too wide. A larger prior "
            "precision, a float64 model or a smaller tolerance avoids this.",
            stacklevel=2,
        )
    return value


def climbed(
    dot: Callable[[Vector], Tensor],
    combine: Callable[[Tensor], Vector],
    precondition: Callable[[Vector], dict[str, Tensor]],
    precision: Mapping[str, float],
    gradient: Vector,
    tolerance: float,
    max_steps: int,
) -> tuple[float, float, int]:
    """`quadratic_form` for a V that is known by its products alone, without the warning.

    Args:
        dot: V times a vector.
        combine: Vᵀ times what `dot` returns.
        precondition: (G + Λ)⁻¹, or the inverse of a matrix below G + Λ, times a vector.
        precision: λ of each parameter tensor.
        gradient: g of each parameter tensor, in the rows' type.
        tolerance: Relative rise at which the steps end.
        max_steps: After which they end anyhow.

    Returns:
        A value, what it may be below gᵀ(G + Λ)⁻¹g at most (Meurant & Tichý, *On computing quadrature-based bounds
        for the A-norm of the error in conjugate gradients*, Numerical Algorithms 62, 2013), and the steps.
    """

    def curve(direction: Vector) -> tuple[float, Callable[[], Vector]]:
        along = dot(direction)
        prior = sum(value * direction[name].square().sum().item() for name, value in precision.items())

        def image() -> Vector:
            seen = combine(along)
            return {n: value * direction[n] + seen.get(n, 0.0) for n, value in precision.items()}

        return along.square().sum().item() + prior, image

    return _climb(curve, precondition, precision, gradient, tolerance, max_steps)


def climbed_by_products(
    times: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    start: Tensor,
    tolerance: float,
    max_steps: int,
) -> tuple[float, float, int]:
    """gᵀA⁻¹g as `climbed` returns it, for an A ≥ I that is known by its products.

    Args:
        times: A times a vector.
        precondition: The inverse of a matrix between I and A, or near it, times a vector.
        start: g.
        tolerance: Relative rise at which the steps end.
        max_steps: After which they end anyhow.
    """
    whole = "g"

    def curve(direction: Vector) -> tuple[float, Callable[[], Vector]]:
        image = times(direction[whole])
        return (direction[whole] * image).sum().item(), lambda: {whole: image}

    return _climb(
        curve,
        lambda vector: {whole: precondition(vector[whole])},
        {whole: 1.0},
        {whole: start},
        tolerance,
        max_steps,
    )


def _climb(
    curve: Callable[[Vector], tuple[float, Callable[[], Vector]]],
    precondition: Callable[[Vector], dict[str, Tensor]],
    precision: Mapping[str, float],
    gradient: Vector,
    tolerance: float,
    max_steps: int,
) -> tuple[float, float, int]:
    """`climbed` for a matrix by what it makes of a direction d: dᵀAd, and Ad where that is wanted."""
    # Of entries up to 1, so that squares do not overflow in float32.
    sizes = [g.abs().max().item() for g in gradient.values() if g.numel()]
    unit = max(sizes, default=0.0)
    if unit == 0.0 or not math.isfinite(sum(sizes)):
        return sum(sizes), 0.0, 0
    residual: dict[str, Tensor] = {name: g / unit for name, g in gradient.items()}

    def inner(left: Vector, right: Vector) -> float:
        return sum((part * right[name]).sum().item() for name, part in left.items())

    direction = precondition(residual)
    decrease = inner(residual, direction)
    value, radau, left = 0.0, 1.0, _largest_rest(residual, precision)
    steps = 0
    while steps < max_steps:
        steps += 1
        if decrease <= 0.0:  # nothing left, or nothing that the preconditioner can still see
            break
        curvature, image = curve(direction)
        step = decrease / curvature
        # Along the direction the value rises by decrease² over the curvature. Where the preconditioner is the
        # inverse of A, or of a matrix below it, no more than `decrease` was left before: (1 − step) of it is now.
        value += step * decrease
        left = abs(1.0 - step) * decrease
        if left <= tolerance * value:
            break
        curved = image()
        residual = {name: part - step * curved[name] for name, part in residual.items()}
        # What is left, rᵀ(G + Λ)⁻¹r, is at most rᵀΛ⁻¹r.
        left = _largest_rest(residual, precision)
        if left <= tolerance * value:
            break
        whitened = precondition(residual)
        ahead = inner(residual, whitened)
        if ahead <= 0.0:  # rounding has broken the preconditioner, or there is nothing left
            break
        # Gauss-Radau's bound with a node at 1, the smallest eigenvalue of the preconditioned matrix.
        radau = max(radau - step, 0.0) / (max(radau - step, 0.0) + ahead / decrease)
        left = min(left, radau * ahead)
        if left <= tolerance * value:
            break
        direction = {name: part + ahead / decrease * direction[name] for name, part in whitened.items()}
        decrease = ahead
    return unit**2 * value, unit**2 * left, steps


def _largest_rest(residual: Vector, precision: Mapping[str, float]) -> float:
    """rᵀΛ⁻¹r, which rᵀ(G + Λ)⁻¹r is at most."""
    return sum(part.square().sum().item() / precision[name] for name, part in residual.items())


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
        seen = dict(combine_all(layers, solve(dot_all(layers, scaled))))
        return {name: part - seen.get(name, 0.0) / precision[name] for name, part in scaled.items()}

    return precondition


def dot_all(layers: Sequence[KeptRows], vectors: Mapping[str, Tensor]) -> Tensor:
    """V times a vector, as [C, N]."""
    return dot_each(layers, {name: vector.unsqueeze(0) for name, vector in vectors.items()})[0]


def combine_all(layers: Sequence[KeptRows], coefficients: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Vᵀ times coefficients [C, N], parameter by parameter."""
    for layer in layers:
        for name, share in layer.combine(coefficients.unsqueeze(0)).items():
            yield name, share[0]


def dot_each(layers: Sequence[KeptRows], vectors: Mapping[str, Tensor]) -> Tensor:
    """V times k vectors, [k, *shape] of each parameter, as [k, C, N]."""
    return torch.stack([layer.dot(vectors) for layer in layers]).sum(0)
