"""The prior precision that is best once the weights have followed it."""

import copy
import math
from collections.abc import Callable
from typing import Any

from scipy.optimize import bracket, minimize_scalar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bayes.evidence.laplace import laplace_evidence
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.functional._validation import function, module, positive

SHIFT = 20.0
"""Added to ln λ: scipy's tolerance is relative to its variable, and ln λ may be anything near 0."""
RESOLUTION = 0.2
"""In ln λ, at which the search ends. About its maximum the evidence is flat: this is far below a nat."""
REACH = 30.0
"""Distance in ln λ from the first one at which the search for a maximum gives up: thirteen powers of ten."""
LONGEST_STEP = 3.0
"""Longest step of that search, relative to the step before: scipy's own, of 110, is out of reach at once."""


def refit_prior_precision(
    model: nn.Module,
    data: "DataLoader[Any] | tuple[Tensor, Tensor]",
    refit: Callable[[nn.Module, float], None],
    *,
    start: float = 1.0,
    **arguments: Any,
) -> tuple[Evidence, list[Evidence]]:
    """Find the prior precision with the largest log-evidence of *re-trained* weights.

    prior_precision="optimize" holds the weights still. Refitting at its λ and optimizing again, in turn, ends
    where λ‖ω‖² = γ, which for a linear model with Gaussian noise is the maximum but for others is not: the
    curvature moves with the weights, and the fixed point knows nothing of it. (Logistic regression of the
    digits 0 and 1: λ = 4.4 and 5.6 nats below the maximum, which is at λ = 0.5.) So the turns are but the
    first step here, and Brent's method goes on from there on the evidence of the refits themselves.

    Args:
        model: Left with the weights of the best round, also where a later one raises or is interrupted; with
            those that it came with where none was finished.
        data: See `laplace_evidence`.
        refit: Trains `model` in place to a minimum of H + ½λ‖ω‖², from the weights that it holds, for the λ
            that it is given. H is the *summed* negative log-likelihood: with a mean loss, weight_decay is λ/N.
        start: First λ to refit at.
        **arguments: Others of `laplace_evidence`, such as `likelihood=` and `structure=`.

    Returns:
        The evidence of the best round, and those of all rounds in order.

    Raises:
        ValueError: See `laplace_evidence`; and if the evidence is largest at an end of the λ that were tried.
    """
    if "prior_precision" in arguments:
        raise ValueError("refit_prior_precision() looks for `prior_precision`; give `start`, where to begin.")
    module("model", model)
    function("refit", refit, "(model, prior_precision) -> None")
    first = math.log(positive("start", start)) + SHIFT
    rounds = _Rounds(model, data, refit, arguments)
    before = copy.deepcopy(model.state_dict())
    try:
        rounds.cost(first)
        precision = laplace_evidence(model, data, prior_precision="optimize", **arguments).prior_precision
        second = math.log(precision) + SHIFT  # type: ignore[arg-type]
        if abs(second - first) < RESOLUTION:  # the turns stand still: still a step, to see what lies beside
            second = first + 1.0
        low, middle, high = rounds.bracket(first, second)
        minimize_scalar(
            rounds.cost, bracket=(low, middle, high), method="brent", options={"xtol": RESOLUTION / SHIFT}
        )
    finally:
        model.load_state_dict(rounds.done[rounds.best][1] if rounds.done else before)
    return rounds.done[rounds.best][0], [evidence for evidence, _ in rounds.done.values()]


class _Rounds:
    """Refits, each with its evidence and its weights, by ln λ + `SHIFT`."""

    def __init__(
        self,
        model: nn.Module,
        data: "DataLoader[Any] | tuple[Tensor, Tensor]",
        refit: Callable[[nn.Module, float], None],
        arguments: dict[str, Any],
    ) -> None:
        self._model, self._data, self._refit, self._arguments = model, data, refit, arguments
        self._unfinished = False
        self.done: dict[float, tuple[Evidence, dict[str, Any]]] = {}

    @property
    def best(self) -> float:
        """Where the evidence is largest so far."""
        return max(self.done, key=lambda shifted: self.done[shifted][0].log_evidence)

    def cost(self, shifted: float) -> float:
        """Minus the evidence of the weights refitted at a λ."""
        if shifted not in self.done:
            if len(self.done) > 1 and abs(shifted - next(iter(self.done))) > REACH:
                raise self._without_maximum()
            self._unfinished = True
            precision = math.exp(shifted - SHIFT)
            self._refit(self._model, precision)
            evidence = laplace_evidence(self._model, self._data, prior_precision=precision, **self._arguments)
            self.done[shifted] = evidence, copy.deepcopy(self._model.state_dict())
            self._unfinished = False
        return -self.done[shifted][0].log_evidence

    def bracket(self, first: float, second: float) -> tuple[float, float, float]:
        """Three ln λ + `SHIFT` with the largest evidence in the middle, from two."""
        try:
            low, middle, high, *_ = bracket(self.cost, first, second, grow_limit=LONGEST_STEP)
        except RuntimeError as error:
            if self._unfinished:  # it is that of the refit, not of the search
                raise
            raise self._without_maximum() from error
        return low, middle, high

    def _without_maximum(self) -> ValueError:
        tried = [math.exp(end - SHIFT) for end in (min(self.done), max(self.done))]
        way, end = ("grows", "largest") if self.best == max(self.done) else ("falls towards 0", "smallest")
        return ValueError(
            f"The evidence of the refits rises as the prior precision {way}: of those that were tried, "
            f"{tried[0]:.3g} .. {tried[1]:.3g}, the {end} has the most, and there is no best one. Expected "
            "argument `refit` to be a function that trains with the precision that it is given."
        )
