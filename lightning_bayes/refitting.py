"""The prior precision that is best once the weights have followed it."""

import copy
import math
from collections.abc import Callable
from typing import Any

from scipy.optimize import bracket, minimize_scalar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bayes.evidence import Evidence
from lightning_bayes.functional._validation import positive
from lightning_bayes.laplace import laplace_evidence

__all__ = ["refit_prior_precision"]

SHIFT = 20.0
"""Added to ln λ: scipy's tolerance is relative to its variable, and ln λ may be anything near 0."""
RESOLUTION = 0.2
"""In ln λ, at which the search ends. About its maximum the evidence is flat: this is far below a nat."""
MAX_DOUBLINGS = 30
"""Steps of the search for three λ with the largest evidence in the middle."""


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
        model: Left with the weights of the best round.
        data: See `laplace_evidence`.
        refit: Trains `model` in place to a minimum of H + ½λ‖ω‖², from the weights that it holds, for the λ
            that it is given. H is the *summed* negative log-likelihood: with a mean loss, weight_decay is λ/N.
        start: First λ to refit at.
        **arguments: Others of `laplace_evidence`, such as `likelihood=` and `structure=`.

    Returns:
        The evidence of the best round, and those of all rounds in order.

    Raises:
        ValueError: See `laplace_evidence`; and if no λ within thirty doublings has less evidence than the best.
    """
    if "prior_precision" in arguments:
        raise ValueError("refit_prior_precision() looks for `prior_precision`; give `start`, where to begin.")
    rounds: dict[float, tuple[Evidence, dict[str, Any]]] = {}

    def cost(shifted: float) -> float:
        if shifted not in rounds:
            precision = math.exp(shifted - SHIFT)
            refit(model, precision)
            evidence = laplace_evidence(model, data, prior_precision=precision, **arguments)
            rounds[shifted] = evidence, copy.deepcopy(model.state_dict())
        return -rounds[shifted][0].log_evidence

    first = math.log(positive("start", start)) + SHIFT
    cost(first)
    found = laplace_evidence(model, data, prior_precision="optimize", **arguments).prior_precision
    second = math.log(found) + SHIFT  # type: ignore[arg-type]
    if abs(second - first) < RESOLUTION:  # the turns stand still: still a step, to see what lies beside
        second = first + 1.0
    try:
        low, middle, high, *_ = bracket(cost, first, second, maxiter=MAX_DOUBLINGS)
    except RuntimeError as error:
        raise ValueError(
            "The evidence of the refits rises with the prior precision as far as was tried, "
            f"{min(rounds):.3g} .. {max(rounds):.3g} in ln λ + {SHIFT:g}: there is no best one."
        ) from error
    minimize_scalar(cost, bracket=(low, middle, high), method="brent", options={"xtol": RESOLUTION / SHIFT})
    best, weights = max(rounds.values(), key=lambda this: this[0].log_evidence)
    model.load_state_dict(weights)
    return best, [evidence for evidence, _ in rounds.values()]
