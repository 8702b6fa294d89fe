"""The layers that gradient noise is split over, and the keys under which it is logged."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from lightning_bayes.functional import GradientNoise

KEYS = ("gradient_noise_trace", "gradient_squared_norm", "gradient_noise_scale")


def layers_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the modules that hold parameters."""
    return tuple(dict.fromkeys(layer_of(name) for name, _ in module.named_parameters()))


def layer_of(name: str) -> str:
    """The module that holds a parameter; a parameter of the outermost module stands for itself."""
    return name.rpartition(".")[0] or name


def logged_values(
    prefix: str, estimate: GradientNoise | None, layers: Mapping[str, GradientNoise]
) -> dict[str, float]:
    """Keys and values; NaN before the first measurement."""
    noise = estimate or GradientNoise(math.nan, math.nan, math.nan)
    values = dict(zip(KEYS, (noise.trace, noise.squared_norm, noise.noise_scale), strict=True))
    values |= {f"gradient_noise_scale/{name}": its.noise_scale for name, its in layers.items()}
    return {f"{prefix}{key}": value for key, value in values.items()}
