"""The edge of stability of SGD: how large a learning rate a curvature allows, and what happens below it."""

import math

from lightning_bayes.functional._validation import finite, fraction, non_negative


def stability_edge(momentum: float = 0.0, dampening: float = 0.0, *, nesterov: bool = False) -> float:
    """The product of learning rate and curvature at which SGD with momentum starts to diverge.

    heavy ball:  ε h < 2 (1 + m) / (1 - τ),        Nesterov:  ε h < 2 (1 + m) / (1 + 2m)

    On a quadratic of curvature h a step is x ← x - ε v with v ← m v + (1 - τ) h x, in the direction of h the
    recursion z² - (1 + m - (1 - τ) ε h) z + m. Both of its roots lie inside the unit circle exactly between
    ε h = 0 and this bound, where one of them leaves at -1: the iterates oscillate and grow. Nesterov's step, as
    `torch.optim.SGD` takes it, is x ← x - ε (h x + m v), with z² - (1 + m)(1 - ε h) z + m (1 - ε h).

    Args:
        momentum: m, in [0, 1).
        dampening: τ as in `torch.optim.SGD`, in [0, 1); 0 beside `nesterov`, as there. Note that
            `torch.optim.SGD` ignores it at m = 0.
        nesterov: whether the momentum is Nesterov's, which needs m > 0, as in `torch.optim.SGD`.

    Returns:
        The bound on ε h: 2 for plain SGD; no unit.

    Raises:
        ValueError: naming the argument that is outside its domain.

    Reference:
        Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, ICLR 2021,
        arXiv:2103.00065, appendix B.
    """
    m, tau = fraction("momentum", momentum), fraction("dampening", dampening)
    if not isinstance(nesterov, bool):
        raise ValueError(f"Expected argument `nesterov` to be a boolean, but got {nesterov!r}.")
    if nesterov and (m == 0 or tau != 0):
        raise ValueError(
            "Expected argument `nesterov` to be False without momentum or with dampening, as in torch.optim.SGD, but"
            f" got True with momentum {momentum!r} and dampening {dampening!r}."
        )
    return 2 * (1 + m) / (1 + 2 * m if nesterov else 1 - tau)


def stability_ratio(
    learning_rate: float,
    curvature: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    *,
    nesterov: bool = False,
) -> float:
    """How close SGD is to the edge of stability: 1 at the edge, above it the steps grow.

    ε h / `stability_edge`, for plain heavy-ball momentum ε h / (2 (1 + m))

    Args:
        learning_rate: ε, at least 0 (schedules pass through 0).
        curvature: h, largest eigenvalue of the Hessian of the loss that is stepped on (weight decay adds to it).
        momentum: m, in [0, 1).
        dampening: τ, in [0, 1).
        nesterov: whether the momentum is Nesterov's.

    Returns:
        The ratio; negative where the curvature is.

    Raises:
        ValueError: naming the argument that is outside its domain.

    Reference:
        As for `stability_edge`.
    """
    edge = stability_edge(momentum, dampening, nesterov=nesterov)
    return non_negative("learning_rate", learning_rate) * finite("curvature", curvature) / edge


def largest_stable_learning_rate(
    curvature: float, momentum: float = 0.0, dampening: float = 0.0, *, nesterov: bool = False
) -> float:
    """The learning rate at which SGD reaches the edge of stability; smaller ones are stable.

    ε_max = `stability_edge` / h, for plain heavy-ball momentum 2 (1 + m) / h

    Args:
        curvature: h, largest eigenvalue of the Hessian of the loss that is stepped on.
        momentum: m, in [0, 1).
        dampening: τ, in [0, 1).
        nesterov: whether the momentum is Nesterov's.

    Returns:
        ε_max; infinite where no direction has positive curvature, since none limits the step then.

    Raises:
        ValueError: naming the argument that is outside its domain.

    Reference:
        As for `stability_edge`.
    """
    edge = stability_edge(momentum, dampening, nesterov=nesterov)
    h = finite("curvature", curvature)
    return edge / h if h > 0 else math.inf


def variance_inflation(
    learning_rate: float,
    curvature: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    *,
    nesterov: bool = False,
) -> float:
    """How much wider SGD spreads in a direction of curvature h than the noise scale alone says.

    heavy ball:  1 / (1 - r),    Nesterov:  (1 - m)(1 + 2mr) / ((1 - m + m ε h)(1 - r)),    r = `stability_ratio`

    SGD as a diffusion has the stationary variance ε (1 - τ) s² / (2 h (1 - m)) for gradient noise of variance s²,
    which is proportional to the noise scale g. The recursion itself has this many times as much. Where the
    factor is above 1.1 or so, g is no longer the whole story.

    Args:
        learning_rate: ε, at least 0.
        curvature: h, at least 0.
        momentum: m, in [0, 1).
        dampening: τ, in [0, 1).
        nesterov: whether the momentum is Nesterov's. It damps: below 1 is possible.

    Returns:
        The factor; infinite at the edge of stability and beyond, where there is no stationary variance.

    Raises:
        ValueError: naming the argument that is outside its domain.

    Reference:
        Mandt et al., Stochastic Gradient Descent as Approximate Bayesian Inference, JMLR 2017,
        arXiv:1704.04289, for the diffusion; the recursions' variances by the Yule-Walker equations.
    """
    h = non_negative("curvature", curvature)
    ratio = stability_ratio(learning_rate, h, momentum, dampening, nesterov=nesterov)
    if ratio >= 1:
        return math.inf
    if not nesterov:
        return 1 / (1 - ratio)
    damped = 1 - momentum + momentum * learning_rate * h
    return (1 - momentum) * (1 + 2 * momentum * ratio) / (damped * (1 - ratio))
