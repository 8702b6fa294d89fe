"""Equations with their numbers put in, so that advice can be checked by hand. ASCII, for any terminal."""

from __future__ import annotations

from lightning_bayes.functional.configuration import Configuration, Unknown


def noise_scale_equation(present: Configuration) -> str:
    """The equation of g with the present numbers, such as `g = lr (N/B - 1)/(1 - m) = 0.1 * ... = 30.25`."""
    left, right = ("", "") if present.dampening == 0 else (" (1 - d)", f" * (1 - {present.dampening:.6g})")
    b, times = _summed(present)
    return (
        f"g = lr{b} (N/B - 1){left}/(1 - m) = {present.learning_rate:.6g}{times} *"
        f" ({present.dataset_size}/{present.batch_size:.6g} - 1){right}/(1 - {present.momentum:.6g})"
        f" = {present.noise_scale:.6g}"
    )


def exact_equation(scale: float, exact: Configuration, unknown: Unknown) -> str:
    """The exact inverse that gave `exact`, with the noise scale and the new numbers put in."""
    left, right = ("", "") if exact.dampening == 0 else ("/(1 - d')", f"/(1 - {exact.dampening:.6g})")
    momentum = f"(1 - {exact.momentum:.6g})"
    if exact.reduction == "sum":
        return _summed_equation(scale, exact, unknown, left, right)
    learning_rate, batch_size = f"{exact.learning_rate:.6g}", f"{exact.batch_size:.6g}"
    if unknown == "learning_rate":
        numbers = f"{scale:.6g} * {momentum}/({exact.dataset_size}/{batch_size} - 1){right}"
        return f"exact: lr' = g (1 - m')/(N'/B' - 1){left} = {numbers} = {learning_rate}"
    numbers = f"{exact.dataset_size}/(1 + {scale:.6g} * {momentum}/{learning_rate}{right})"
    return f"exact: B' = N'/(1 + g (1 - m')/lr'{left}) = {numbers} = {batch_size}"


def linear_equation(present: Configuration, linear: Configuration, unknown: Unknown) -> str:
    """The linear rule that gave `linear`, as ratios of which those that are 1 are left out."""
    # ε' = ε (B'/B) (N/N') (1 - m')/(1 - m) (1 - τ)/(1 - τ'), and with the same ratios upside down
    # B' = B (ε'/ε) (N'/N) (1 - m)/(1 - m') (1 - τ')/(1 - τ).
    # A sum over the batch takes the ratio of the batches into itself, but for the rounding of both.
    summed = present.reduction == "sum"
    old = ("N", present.dataset_size), ("(1 - m')", 1 - linear.momentum), ("(1 - d)", 1 - present.dampening)
    new = ("N'", linear.dataset_size), ("(1 - m)", 1 - present.momentum), ("(1 - d')", 1 - linear.dampening)
    if unknown == "learning_rate":
        symbol, start, result = "lr", present.learning_rate, linear.learning_rate
        batches = () if summed else (("B'", linear.batch_size),)
        above: tuple[tuple[str, float], ...] = (*batches, *old)
        below: tuple[tuple[str, float], ...] = (*(() if summed else (("B", present.batch_size),)), *new)
    else:
        symbol, start, result = "B", present.batch_size, linear.batch_size
        above, below = (("lr'", linear.learning_rate), *new), (("lr", present.learning_rate), *old)
    changed = [(top, bottom) for top, bottom in zip(above, below, strict=True) if top[1] != bottom[1]]
    letters = "".join(f" * {top[0]}/{bottom[0]}" for top, bottom in changed)
    numbers = "".join(f" * {top[1]:.6g}/{bottom[1]:.6g}" for top, bottom in changed)
    shown = f"{start:.6g}{numbers} = " if numbers else ""
    return f"linear: {symbol}' = {symbol}{letters} = {shown}{result:.6g}"


def _summed(configuration: Configuration) -> tuple[str, str]:
    """The factor b, the examples that a summed loss sums, as a letter and as a number; nothing for a mean."""
    if configuration.reduction == "mean":
        return "", ""
    return " b", f" * {configuration.summed_examples:.6g}"


def _summed_equation(scale: float, exact: Configuration, unknown: Unknown, left: str, right: str) -> str:
    momentum = f"(1 - {exact.momentum:.6g})"
    learning_rate, batch_size = f"{exact.learning_rate:.6g}", f"{exact.batch_size:.6g}"
    if unknown == "learning_rate":
        numbers = f"{scale:.6g} * {momentum}/({exact.dataset_size}/{batch_size} - 1){right}"
        divided = f"{numbers}/{exact.summed_examples:.6g}"
        return f"exact: lr' = g (1 - m')/(N'/B' - 1){left}/b' = {divided} = {learning_rate}"
    numbers = (
        f"{exact.dataset_size} - {scale:.6g} * {exact.averaged_batches} * {momentum}/{learning_rate}{right}"
    )
    return f"exact: B' = N' - g k (1 - m')/lr'{left} = {numbers} = {batch_size}"
