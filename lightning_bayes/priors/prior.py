"""Gaussian priors p(ω) = N(0, λ⁻¹), one precision λ for each parameter tensor, given or to be found."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Real

from torch import nn

PriorPrecision = float | Mapping[str, float | str] | str
"""λ, one for each pattern of names, or a word that says how λ is to be found."""

OPTIMIZE_WORDS = ("optimize", "optimize_per_layer", "optimize_per_parameter")
"""One λ for all parameters, for each module that holds parameters, or for each parameter tensor."""

WAYS_OUT = (
    "Give the optimizer a positive weight_decay, or name the prior: prior_precision=1.0 (the λ of ½λ‖ω‖² in "
    "nats, for all parameters), a mapping such as {'*.weight': 1.0, '*.bias': 0.1}, or 'optimize' for the λ "
    "that the data prefer."
)


@dataclass(frozen=True)
class Prior:
    """Prior precision of every parameter that has one: fixed, in proportion to the data, or to be found.

    Attributes:
        strengths: λ of each parameter, or its weight decay when `per_example`; only positive ones. That of
            an optimized parameter is 1 and stands for nothing.
        fixed_parameters: Parameters with λ = 0. Their prior is improper: they get no Occam factor and are
            held at their values.
        per_example: Whether `strengths` are weight decays of a loss that averages over examples.
        optimized: Groups of parameters that share one λ, which is to maximise the log-evidence.
    """

    strengths: Mapping[str, float]
    fixed_parameters: tuple[str, ...] = ()
    per_example: bool = False
    optimized: tuple[tuple[str, ...], ...] = ()

    def precision(self, num_examples: int, loss_scale: float = 1.0) -> dict[str, float]:
        """λ of each parameter: as given, or N · weight_decay / s.

        Minimising loss + wd/2 ‖ω‖² with a loss of s times the mean per-example nll is minimising C/N.

        Args:
            num_examples: N.
            loss_scale: s, see `Likelihood.loss_scale`.
        """
        factor = num_examples / loss_scale if self.per_example else 1.0
        return {name: strength * factor for name, strength in self.strengths.items()}

    def start_from(self, precision: "float | Mapping[str, float]") -> dict[str, float] | None:
        """λ of each parameter where a search may begin, from what an earlier one has found; None for no search."""
        if not self.optimized:
            return None
        if not isinstance(precision, Mapping):
            return dict.fromkeys(self.strengths, precision)
        return dict(precision) if precision.keys() == set(self.strengths) else None

    @property
    def rises_together(self) -> bool:
        """Whether the λ of all parameters are `strengths` times one number, whatever is found."""
        groups = [set(group) for group in self.optimized]
        return not groups or groups == [set(self.strengths)]

    def restricted(self, names: Collection[str]) -> "Prior":
        """The prior of some of the parameters; the others are conditioned on.

        Raises:
            ValueError: If none of them has a proper prior.
        """
        kept = {name: strength for name, strength in self.strengths.items() if name in names}
        if not kept:
            raise ValueError(
                f"No parameter of the subset {sorted(names)} has a prior above 0, so there is no evidence. "
                f"{WAYS_OUT}"
            )
        groups = (tuple(name for name in group if name in kept) for group in self.optimized)
        fixed = tuple(name for name in self.fixed_parameters if name in names)
        return replace(
            self, strengths=kept, fixed_parameters=fixed, optimized=tuple(group for group in groups if group)
        )


def require_prior_precision(prior_precision: object, *, also: tuple[str, ...] = ()) -> None:
    """Check the argument `prior_precision` as far as it can be checked without a model.

    Raises:
        ValueError: If it is neither a positive finite number, nor a mapping from patterns to non-negative
            finite numbers or "optimize", nor one of `OPTIMIZE_WORDS` or of the words in `also`.
    """
    words = (*also, *OPTIMIZE_WORDS)
    if isinstance(prior_precision, str) and prior_precision in words:
        return
    if _is_number(prior_precision, positive=True):
        return
    if isinstance(prior_precision, Mapping) and prior_precision:
        bad = {
            key: value
            for key, value in prior_precision.items()
            if not isinstance(key, str) or not (_is_number(value) or value == "optimize")
        }
        if not bad:
            return
        raise ValueError(
            "Expected argument `prior_precision` to map parameter-name patterns to non-negative, finite "
            f"numbers or 'optimize', got {bad}."
        )
    listed = "".join(f", {word!r}" for word in words)
    raise ValueError(
        f"Expected argument `prior_precision` to be a positive, finite number{listed} or a non-empty mapping "
        f"from parameter-name patterns to numbers, got {prior_precision!r}. {WAYS_OUT}"
    )


def prior_from(
    network: nn.Module,
    prior_precision: PriorPrecision,
    trained: Collection[nn.Parameter] | None = None,
    subset: Collection[str] | None = None,
) -> Prior:
    """Prior of the trainable parameters of `network` from any value of the argument `prior_precision`.

    `trained` leaves only parameters that some optimizer holds, `subset` only those of these names; the
    others are fixed, like frozen ones.

    Raises:
        ValueError: If a parameter matches no pattern, a pattern no parameter, or no parameter is left.
    """
    if isinstance(prior_precision, str):
        names = trainable_names(network, trained)
        groups = dict.fromkeys(names, "all")
        if prior_precision == "optimize_per_layer":
            groups = {name: name.rpartition(".")[0] for name in names}
        elif prior_precision == "optimize_per_parameter":
            groups = {name: name for name in names}
        prior = optimized_prior(groups)
    else:
        prior = fixed_prior(network, prior_precision, trained, subset)
    return prior if subset is None else prior.restricted(subset)


def optimized_prior(groups: Mapping[str, object]) -> Prior:
    """Prior whose λ are to be found, one for all parameters of equal value in `groups`."""
    return Prior(dict.fromkeys(groups, 1.0), optimized=_grouped(groups))


def fixed_prior(
    network: nn.Module,
    prior_precision: float | Mapping[str, float | str],
    trained: Collection[nn.Parameter] | None = None,
    subset: Collection[str] | None = None,
) -> Prior:
    """Prior of the trainable parameters of `network` from one number, or from patterns on their names.

    Patterns are those of a shell (`*.bias`), the first that matches counts. Parameters of a pattern with
    "optimize" share one λ that is to be found. Parameters outside `subset` need no pattern.

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
    needed = names if subset is None else subset
    missing = [name for name, pattern in matches.items() if pattern is None and name in needed]
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
    values = {name: prior_precision[pattern] for name, pattern in matches.items() if pattern}
    sought = {name: pattern for name, pattern in matches.items() if values.get(name) == "optimize"}
    strengths = {name: 1.0 if name in sought else float(value) for name, value in values.items()}
    return replace(_prior(strengths), optimized=_grouped(sought))


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
            "holds them, or there are none. The evidence integrates over trainable "
            "parameters. Unfreeze some, or leave the evidence out."
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


def _grouped(groups: Mapping[str, object]) -> tuple[tuple[str, ...], ...]:
    labels = dict.fromkeys(groups.values())
    return tuple(tuple(name for name, its in groups.items() if its == label) for label in labels)


def _is_number(value: object, positive: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number = float(value)
    return math.isfinite(number) and (number > 0 if positive else number >= 0)
