"""Gaussian priors p(ω) = N(0, λ⁻¹), one precision λ for each parameter tensor."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real

from torch import nn

__all__ = ["Prior", "fixed_prior", "require_prior_precision", "weight_decay_prior"]

WAYS_OUT = (
    "Give the optimizer a positive weight_decay, or name the prior: prior_precision=1.0 (the λ of ½λ‖ω‖² in "
    "nats, for all parameters) or a mapping such as {'*.weight': 1.0, '*.bias': 0.1}."
)


@dataclass(frozen=True)
class Prior:
    """Prior precision of every parameter that has one, fixed or in proportion to the data.

    Attributes:
        strengths: λ of each parameter, or its weight decay when `per_example`; only positive ones.
        fixed_parameters: Parameters with λ = 0. Their prior is improper: they get no Occam factor and are
            held at their values.
        per_example: Whether `strengths` are weight decays of a loss that averages over examples.
    """

    strengths: Mapping[str, float]
    fixed_parameters: tuple[str, ...] = ()
    per_example: bool = False

    def precision(self, num_examples: int, loss_scale: float = 1.0) -> dict[str, float]:
        """λ of each parameter: as given, or N · weight_decay / s.

        Minimising loss + wd/2 ‖ω‖² with a loss of s times the mean per-example nll is minimising C/N.

        Args:
            num_examples: N.
            loss_scale: s, see `Likelihood.loss_scale`.
        """
        factor = num_examples / loss_scale if self.per_example else 1.0
        return {name: strength * factor for name, strength in self.strengths.items()}


def require_prior_precision(prior_precision: object, *, also: tuple[str, ...] = ()) -> None:
    """Check the argument `prior_precision` as far as it can be checked without a model.

    Raises:
        ValueError: If it is neither a positive finite number, nor a mapping from patterns to non-negative
            finite numbers, nor one of the words in `also`.
    """
    if isinstance(prior_precision, str):
        if prior_precision in also:
            return
        if prior_precision == "optimize":
            raise ValueError(f'prior_precision="optimize" is not supported yet. {WAYS_OUT}')
    if _is_number(prior_precision, positive=True):
        return
    if isinstance(prior_precision, Mapping) and prior_precision:
        bad = {k: v for k, v in prior_precision.items() if not isinstance(k, str) or not _is_number(v)}
        if not bad:
            return
        raise ValueError(
            "Expected argument `prior_precision` to map parameter-name patterns to non-negative, finite "
            f"numbers, got {bad}."
        )
    words = "".join(f", {word!r}" for word in also)
    raise ValueError(
        f"Expected argument `prior_precision` to be a positive, finite number{words} or a non-empty mapping "
        f"from parameter-name patterns to numbers, got {prior_precision!r}. {WAYS_OUT}"
    )


def fixed_prior(
    network: nn.Module,
    prior_precision: float | Mapping[str, float],
    trained: Collection[nn.Parameter] | None = None,
) -> Prior:
    """Prior of the trainable parameters of `network` from one number, or from patterns on their names.

    `trained` leaves only parameters that some optimizer holds; the others are fixed, like frozen ones.
    Patterns are those of a shell (`*.bias`), the first that matches counts.

    Raises:
        ValueError: If a parameter matches no pattern, a pattern no parameter, or no parameter is left.
    """
    names = trainable_names(network, trained)
    if not isinstance(prior_precision, Mapping):
        return _prior({name: float(prior_precision) for name in names})
    matches = {
        name: next((pattern for pattern in prior_precision if fnmatchcase(name, pattern)), None)
        for name in names
    }
    missing = [name for name, pattern in matches.items() if pattern is None]
    if missing:
        raise ValueError(
            f"prior_precision has no pattern for {missing}; got {list(prior_precision)}. Add '*' as the last "
            "pattern, or 0.0 for parameters to hold fixed."
        )
    idle = [pattern for pattern in prior_precision if pattern not in matches.values()]
    if idle:
        raise ValueError(
            f"The patterns {idle} of prior_precision decide no trainable parameter; there are {names}."
        )
    return _prior({name: float(prior_precision[pattern]) for name, pattern in matches.items() if pattern})


def weight_decay_prior(weight_decays: Mapping[str, float]) -> Prior:
    """Prior that minimising the training loss with these weight decays stands for.

    Args:
        weight_decays: Of each trainable parameter.

    Raises:
        ValueError: If all are zero.
    """
    return _prior(weight_decays, per_example=True)


def trainable_names(network: nn.Module, trained: Collection[nn.Parameter] | None = None) -> list[str]:
    """Names of the parameters that are not frozen and, where `trained` is given, among these."""
    among = None if trained is None else {id(parameter) for parameter in trained}
    names = [
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (among is None or id(parameter) in among)
    ]
    if not names:
        raise ValueError(
            f"{type(network).__name__} has no trainable parameter: all have requires_grad=False, no optimizer "
            "holds them, or there are none. The evidence integrates over trainable parameters."
        )
    return names


def _prior(strengths: Mapping[str, float], per_example: bool = False) -> Prior:
    positive = {name: strength for name, strength in strengths.items() if strength > 0}
    if not positive:
        what = "weight decay" if per_example else "prior precision"
        raise ValueError(
            f"Every parameter has {what} 0, so no prior is proper and there is no evidence. {WAYS_OUT}"
        )
    return Prior(positive, tuple(name for name in strengths if name not in positive), per_example)


def _is_number(value: object, positive: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number = float(value)
    return math.isfinite(number) and (number > 0 if positive else number >= 0)
