"""How close a run is to the edge of stability: the result, and what it is computed from."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.functional.sharpness import keskar_sharpness
from lightning_bayes.functional.stability import stability_edge, variance_inflation
from lightning_bayes.loss_curvature.largest_loss_in_box import largest_loss_in_box
from lightning_bayes.loss_curvature.mean_loss import MeanLoss
from lightning_bayes.numerics.lanczos import Eigenpair, largest_eigenpair

CURVATURES = ("hessian", "ggn")
TOLERANCE = 1e-3
"""Accepted error of an eigenvalue, relative."""
MAX_PRODUCTS = 100
"""Products with the curvature matrix that one eigenvalue may take."""


@dataclass(frozen=True)
class SGDStep:
    """How SGD steps on one group of parameters, with the names of `torch.optim.SGD`."""

    learning_rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def edge(self) -> float:
        """The product of learning rate and curvature at which it diverges, see `stability_edge`."""
        return stability_edge(self.momentum, self.dampening, nesterov=self.nesterov)

    @property
    def recursion(self) -> tuple[float, float, bool]:
        """All but learning rate and weight decay."""
        return self.momentum, self.dampening, self.nesterov


@dataclass(frozen=True)
class StabilityReading:
    """How curved the training loss is at some weights, and what SGD makes of it.

    For the equations see `lightning_bayes.functional.stability`. Fields that belong to SGD are None for other
    optimizers, whose edge is another.

    Attributes:
        largest_eigenvalue: h, of the Hessian or the GGN of the mean training loss, in its unit; without weight
            decay.
        largest_eigenvalue_error: ‖Hv − hv‖: an eigenvalue lies within so much of h, and the largest is at least h.
        stability_ratio: Learning rate times curvature over what SGD with this momentum stands, for one parameter
            group ε (h + weight_decay)/(2(1 + m)): above 1 steps along v grow. Of groups that differ it is the
            largest eigenvalue of S(H + W)S, S² holding each parameter's ε over its 2(1 + m): the same statement,
            exact.
        learning_rate: ε, where groups differ the largest.
        largest_stable_learning_rate: ε over the ratio, where it would be 1; where groups differ all are taken times
            as much. Infinite where no direction has positive curvature.
        variance_inflation: How much wider SGD spreads along v than its noise scale alone says; infinite above
            the edge. None also where groups differ in momentum.
        sharpness: Keskar's, in percent, a lower bound; None where it was not asked for.
        curvature: "hessian" or "ggn".
        num_examples: On which the loss is the mean. The largest eigenvalue of a subset is on average above that
            of the whole.
        num_parameters: p, the parameters that the optimizer moves.
        num_products: With the matrix, that were taken.
        converged: Whether the errors met the tolerance.
        seconds: What it took.
    """

    largest_eigenvalue: float
    largest_eigenvalue_error: float
    stability_ratio: float | None
    learning_rate: float | None
    largest_stable_learning_rate: float | None
    variance_inflation: float | None
    sharpness: float | None
    curvature: str
    num_examples: int
    num_parameters: int
    num_products: int
    converged: bool
    seconds: float

    def __str__(self) -> str:
        """Return a table for people."""
        matrix = "Hessian" if self.curvature == "hessian" else "GGN"
        doubt = "" if self.converged else f", NOT CONVERGED in {self.num_products} products"
        rows: list[tuple[str, float, str]] = [
            ("largest eigenvalue", self.largest_eigenvalue, f"± {self.largest_eigenvalue_error:.2g}{doubt}")
        ]
        if self.stability_ratio is not None and self.largest_stable_learning_rate is not None:
            verdict = (
                "below the edge of stability" if self.stability_ratio < 1 else "BEYOND THE EDGE OF STABILITY"
            )
            rows.append(("stability ratio", self.stability_ratio, verdict))
            present = f"the present one is {self.learning_rate:.4g}"
            rows.append(("largest stable lr", self.largest_stable_learning_rate, present))
        if self.variance_inflation is not None:
            rows.append(("variance inflation", self.variance_inflation, ""))
        if self.sharpness is not None:
            rows.append(("sharpness (Keskar)", self.sharpness, "percent of 1 + loss, at least"))
        lines = [
            f"Stability on {self.num_examples:,} examples, {matrix} of the mean loss in {self.num_parameters:,} "
            "parameters"
        ]
        lines += [f"{name:<22}{value:>16,.4f}  {remark}".rstrip() for name, value, remark in rows]
        if self.stability_ratio is None:
            lines.append("The edge of stability is known for SGD alone.")
        lines.append(f"{'seconds':<22}{self.seconds:>16.2f}")
        return "\n".join(lines)


def require_curvature(curvature: object) -> None:
    """Check the argument `curvature`.

    Raises:
        ValueError: If it is neither "hessian" nor "ggn".
    """
    if not isinstance(curvature, str) or curvature not in CURVATURES:
        listed = " or ".join(repr(choice) for choice in CURVATURES)
        raise ValueError(f"Expected argument `curvature` to be {listed}, got {curvature!r}.")


def measure_stability(
    function: MeanLoss,
    steps: Mapping[str, SGDStep] | None,
    num_examples: int,
    *,
    curvature: str,
    sharpness: bool,
) -> StabilityReading:
    """Measure the curvature of a loss at its weights, and set it beside the optimizer's steps.

    Args:
        function: The mean training loss.
        steps: How each of its parameters is stepped on, by name; None for optimizers other than SGD.
        num_examples: That it is the mean over.
        curvature: "hessian" or "ggn".
        sharpness: Whether to measure Keskar's sharpness too.

    Raises:
        EvidenceUnavailableError: If weights, loss or curvature are not finite.
        ValueError: If the curvature cannot be computed.
    """
    started = time.perf_counter()
    product = function.product(curvature)
    pair = _find(product, function)
    pairs = [pair]
    edge = None
    if steps is not None:
        edge = _Edge.of(function, product, pair, steps)
        pairs += edge.pairs
    keskar = None
    if sharpness:
        keskar = keskar_sharpness(*largest_loss_in_box(function, pair.vector))
    return StabilityReading(
        largest_eigenvalue=pair.value,
        largest_eigenvalue_error=pair.error,
        stability_ratio=None if edge is None else edge.ratio,
        learning_rate=None if edge is None else edge.learning_rate,
        largest_stable_learning_rate=None if edge is None else edge.largest_learning_rate,
        variance_inflation=None if edge is None else edge.variance_inflation,
        sharpness=keskar,
        curvature=curvature,
        num_examples=num_examples,
        num_parameters=len(pair.vector),
        num_products=sum(one.num_products for one in pairs),
        converged=all(one.converged for one in pairs),
        seconds=time.perf_counter() - started,
    )


def rehearse(function: MeanLoss, curvature: str) -> None:
    """Take three products with the curvature, which is enough to see that it is symmetric.

    Raises:
        EvidenceUnavailableError: If weights, loss or curvature are not finite.
        ValueError: If the curvature cannot be computed.
    """
    largest_eigenpair(function.product(curvature), function.flat(), tolerance=TOLERANCE, max_products=3)


@dataclass(frozen=True)
class _Edge:
    """Where SGD stands by the edge of stability."""

    learning_rate: float
    per_learning_rate: float
    """The stability ratio over the learning rate: how it grows when all groups' learning rates do."""
    recursions: frozenset[tuple[float, float, bool]]
    pairs: list[Eigenpair]
    """Beside that of the plain curvature."""

    @classmethod
    def of(
        cls,
        function: MeanLoss,
        product: Callable[[Tensor], Tensor],
        plain: Eigenpair,
        steps: Mapping[str, SGDStep],
    ) -> "_Edge":
        rate = max(step.learning_rate for step in steps.values())
        recursions = frozenset(step.recursion for step in steps.values())
        if len(set(steps.values())) == 1:
            step = next(iter(steps.values()))
            return cls(rate, (plain.value + step.weight_decay) / step.edge, recursions, [])
        # The iterates along u turn over undamped, z = -1, exactly where D(H + W)u = E u, D and E holding each
        # parameter's learning rate and edge; S² = D/E makes that the symmetric S(H + W)S y = y, y = S⁻¹ u.
        relative = {n: s.learning_rate / rate if rate else 1.0 for n, s in steps.items()}
        scale = _spread(function, {n: math.sqrt(relative[n] / s.edge) for n, s in steps.items()})
        decay = _spread(function, {n: s.weight_decay for n, s in steps.items()})

        def scaled(vector: Tensor) -> Tensor:
            inner = scale * vector
            return scale * (product(inner) + decay * inner)

        pair = _find(scaled, function)
        return cls(rate, pair.value, recursions, [pair])

    @property
    def ratio(self) -> float:
        return self.learning_rate * self.per_learning_rate

    @property
    def largest_learning_rate(self) -> float:
        return 1.0 / self.per_learning_rate if self.per_learning_rate > 0.0 else math.inf

    @property
    def variance_inflation(self) -> float | None:
        """In coordinates scaled by S the recursion is that of one learning rate, if all groups have one momentum."""
        if len(self.recursions) > 1 or self.ratio < 0.0:
            return None
        ((momentum, dampening, nesterov),) = self.recursions
        curvature = self.ratio * stability_edge(momentum, dampening, nesterov=nesterov)  # for a rate of 1
        return variance_inflation(1.0, curvature, momentum, dampening, nesterov=nesterov)


def _find(product: Callable[[Tensor], Tensor], function: MeanLoss) -> Eigenpair:
    # From a random vector each time: one that is nearly an eigenvector may hide the rest of the spectrum.
    return largest_eigenpair(product, function.flat(), tolerance=TOLERANCE, max_products=MAX_PRODUCTS)


def _spread(function: MeanLoss, values: Mapping[str, float]) -> Tensor:
    """One number for each parameter tensor as a vector [p]."""
    like = function.flat()
    return torch.cat(
        [like.new_full((weight.numel(),), values[name]) for name, weight in function.parameters.items()]
    )
