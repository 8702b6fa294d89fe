"""The true Hessian of the summed negative log-likelihood, dense, for small models.

Unlike the generalized Gauss-Newton matrix it may have negative eigenvalues. Where H + Λ has one, the point is
no minimum of the cost, the Gaussian integral diverges, and the Laplace evidence does not exist.
"""

import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_bayes.capture.double_backward import check_differentiable, gradient_to_differentiate
from lightning_bayes.errors import EvidenceUnavailableError, check_finite
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.rows.reader import forward_of
from lightning_bayes.rows.regrouping import check_apart
from lightning_bayes.structures.base import CurvatureSummary
from lightning_bayes.structures.float64 import InFloat64

__all__ = ["BatchHessian", "HessianCurvature", "HessianReader"]

MAX_MEMORY = 2e9
"""Bytes that the matrix, scaled, and its eigenvectors may take: 7,905 parameters."""
EXACT = 0.01
"""Nats that rounding may put into a log-determinant that is still called exact."""
ROWS_AT_ONCE = 64
"""Rows of the Hessian that one batched backward pass gives."""

WAYS_OUT = (
    'curvature="ggn" is positive semi-definite everywhere; curvature="hessian_positive" leaves the negative '
    "eigenvalues out, which is a heuristic; more training or a larger prior precision may make a minimum of it."
)


@dataclass(frozen=True)
class BatchHessian:
    """Everything that one batch says about the evidence; sums over its examples."""

    num_examples: int
    num_terms: float
    unit_loss: float
    null_loss: float | None
    gradient: dict[str, Tensor]
    matrix: Tensor  # [p, p], of `unit_loss`
    rounding: float
    """Relative, of the type that it was computed in."""


class HessianReader:
    """Forms the Hessian of the unit loss in some parameters of a network, one batch at a time.

    In float64, whatever the network's type: eigenvalues may be negative, so what float32 makes of small ones is not
    told from what they are. A network that does not run in float64 is read as it is, with a warning.

    Args:
        network: A throw-away copy in eval mode; it becomes float64.
        parameters: Names, as in `network.named_parameters()`, of the parameters that carry a prior.

    Raises:
        ValueError: If the matrix would not fit into `MAX_MEMORY`.
    """

    def __init__(self, network: nn.Module, parameters: Collection[str]) -> None:
        self._network = network
        named = dict(network.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in parameters}
        self._one_by_one = False
        dtypes = {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}
        on = next(network.parameters()).device
        self._widened = dtypes != {torch.float64} and accumulation_dtype(on) == torch.float64
        size = sum(parameter.numel() for parameter in self.parameters.values())
        if 4.0 * 8 * size**2 > MAX_MEMORY:
            raise ValueError(
                f"The Hessian of {size:,} parameters takes {4.0 * 8 * size**2 / 1e9:.3g} GB beside as many backward "
                f"passes as parameters; up to {int(math.sqrt(MAX_MEMORY / 32)):,} are accepted. Use "
                'curvature="ggn", or subset_of_weights= for a part of the network.'
            )
        if self._widened:
            network.double()

    def read(self, forward: Callable[[], tuple[Tensor, Tensor]], likelihood: Likelihood) -> BatchHessian:
        """Run one batch through the network and differentiate its unit loss twice.

        Raises:
            EvidenceUnavailableError: If the outputs, targets or gradients are not finite.
            ValueError: If outputs and targets do not fit the likelihood, or the second derivative is wrong
                or missing.
        """
        if self._widened:
            try:
                return self._read(forward, likelihood)
            except (RuntimeError, TypeError, ValueError) as error:
                # What float64 is not to blame for fails again.
                self._widened, self._one_by_one = False, False
                self._network.float()
                batch = self._read(forward, likelihood)
                warnings.warn(
                    "The Hessian is formed in float32, whose rounding the bounds hold: the network "
                    f"does not run in float64 ({type(error).__name__}: {error}). Give a model that runs after "
                    'model.double(), or use curvature="ggn".',
                    stacklevel=2,
                )
                return batch
        return self._read(forward, likelihood)

    def _read(self, forward: Callable[[], tuple[Tensor, Tensor]], likelihood: Likelihood) -> BatchHessian:
        parameters = list(self.parameters.values())
        with torch.enable_grad(), _twice_differentiable():
            with InFloat64() if self._widened else nullcontext():
                outputs, targets, unit_loss = forward_of(forward, likelihood)
            gradient = gradient_to_differentiate(unit_loss, parameters)
            check_differentiable(gradient, 'curvature="ggn" does without.')
            for name, part in zip(self.parameters, gradient, strict=True):
                check_finite(part.detach(), f"the gradient of the parameter {name!r}")
            flat = torch.cat([part.flatten() for part in gradient])
            matrix = torch.cat(list(self._rows(flat, parameters)))
            _check_symmetric(matrix, flat.dtype)
            with InFloat64() if self._widened else nullcontext():
                check_apart(forward, outputs, likelihood, self._network, self.parameters)
        return BatchHessian(
            num_examples=len(outputs),
            num_terms=likelihood.num_terms(outputs, targets),
            unit_loss=unit_loss.item(),
            null_loss=likelihood.null_loss(outputs, targets),
            gradient={n: part.detach() for n, part in zip(self.parameters, gradient, strict=True)},
            matrix=matrix,
            rounding=torch.finfo(flat.dtype).eps,
        )

    def _rows(self, flat: Tensor, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
        accurate = accumulation_dtype(flat.device)
        if not flat.requires_grad:  # no parameter is in its graph
            yield flat.new_zeros(len(flat), len(flat), dtype=accurate)
            return
        for start in range(0, len(flat), ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, len(flat) - start)
            seeds = flat.new_zeros(rows, len(flat))
            seeds[:, start:].fill_diagonal_(1.0)
            yield self._products(flat, parameters, seeds).to(accurate)

    def _products(self, flat: Tensor, parameters: list[nn.Parameter], seeds: Tensor) -> Tensor:
        """Rows `seeds` of the Hessian [rows, p], all in one backward pass where the graph allows it."""
        if not self._one_by_one:
            try:
                parts = torch.autograd.grad(
                    flat, parameters, seeds, retain_graph=True, is_grads_batched=True, allow_unused=True
                )
                return torch.cat(
                    [
                        seeds.new_zeros(len(seeds), parameter.numel())
                        if part is None
                        else part.reshape(len(seeds), -1)
                        for parameter, part in zip(parameters, parts, strict=True)
                    ],
                    dim=1,
                )
            except RuntimeError as error:  # an operation that vmap does not know
                self._one_by_one = True
                logging.getLogger("lightning_bayes").info(
                    "The Hessian is formed row by row, which is slower: torch.vmap cannot batch this network's "
                    "backward pass (%s).",
                    error,
                )
        rows = []
        for seed in seeds:
            parts = torch.autograd.grad(flat, parameters, seed, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)


class HessianCurvature:
    """Answers of a `Curvature` for a matrix H that need not be positive semi-definite.

    With e the eigenvalues of the whitened Λ⁻¹ᐟ² H Λ⁻¹ᐟ², those of the whitened cost's Hessian are 1 + e, and
    ln det(I + Λ⁻¹ᐟ² H Λ⁻¹ᐟ²) = Σ ln(1 + e). Rounding has put up to p · eps of the largest |e| into each, with the
    eps of the type that the Hessian was computed in: a smaller negative one counts as zero, and where that is worth
    more than `EXACT` nats the bounds hold it.

    Args:
        shapes: Of the parameters that carry a prior.
        only_positive: Leave e < 0 out of every sum, as Smith & Le do who sum over the λᵢ ≥ λ. A heuristic:
            it is the evidence of another, convex cost, and no bound of anything.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, only_positive: bool) -> None:
        self.sizes = {name: shape.numel() for name, shape in shapes.items()}
        size = sum(self.sizes.values())
        self._matrix = torch.zeros(size, size, dtype=accumulation_dtype(device), device=device)
        self._rounding = torch.finfo(self._matrix.dtype).eps
        self._only_positive = only_positive

    def add(self, batch: BatchHessian) -> None:
        """Add the Hessian of one batch."""
        self._matrix += batch.matrix
        self._rounding = max(self._rounding, batch.rounding)

    def counts(self, precision: Mapping[str, float]) -> tuple[int, int]:
        """Eigenvalues of the cost's whitened Hessian below 1, which is λᵢ < λ, and those at most 0."""
        values = self._rounded(torch.linalg.eigvalsh(self._whitened(precision)))
        return int((values < 0.0).sum()), int((values <= -1.0).sum())

    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """See `Curvature.at`; in directions that are left out the quadratic form has the prior alone.

        Raises:
            EvidenceUnavailableError: If H + Λ is not positive definite and nothing is left out.
        """
        values, vectors = torch.linalg.eigh(self._whitened(precision))
        bounds, values = self._bounds(values), self._rounded(values)
        below, negative = int((values < 0.0).sum()), int((values <= -1.0).sum())
        if negative and not self._only_positive:
            raise EvidenceUnavailableError(
                f"The Hessian of the cost has {negative} eigenvalues at or below 0 ({below} of the likelihood's "
                f"are negative, of {len(values)}): this is no minimum, and its Laplace evidence does not exist. "
                f"{WAYS_OUT}"
            )
        values = values.clamp(min=0.0) if self._only_positive else values
        log_det = torch.log1p(values).sum().item()
        slope = torch.cat([gradient[name].flatten() for name in self.sizes]).to(vectors)
        whitened = vectors.mT @ (slope * self._scale(precision))
        return CurvatureSummary(
            log_det=log_det,
            bounds=(-math.inf, math.inf) if negative else bounds,
            effective_parameters=(values / (1.0 + values)).sum().item(),
            quadratic=(whitened.square() / (1.0 + values)).sum().item(),
        )

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """See `Curvature.spectrum`.

        Raises:
            EvidenceUnavailableError: If an eigenvalue is negative and not left out: as the prior precision
                falls towards its size, the log-evidence rises to infinity, and has no maximum.
        """
        values = self.eigenvalues(precision)
        return values if self._only_positive else self._without_negative(values)

    def eigenvalues(self, precision: Mapping[str, float]) -> Tensor:
        """All eigenvalues of the whitened matrix, negative ones too unless they are left out."""
        values = self._rounded(torch.linalg.eigvalsh(self._whitened(precision)))
        return values.clamp(min=0.0) if self._only_positive else values

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """See `Curvature.log_det_and_traces`, and `spectrum` for what it raises.

        With the eigenvectors v of the whitened matrix, ∂e/∂ ln λᵢ = −e Σ_{j∈i} vⱼ², hence
        γᵢ = Σ e/(1 + e) Σ_{j∈i} vⱼ².
        """
        values, vectors = torch.linalg.eigh(self._whitened(precision))
        values = self._rounded(values)
        values = values.clamp(min=0.0) if self._only_positive else self._without_negative(values)
        shares = vectors.square() @ (values / (1.0 + values))
        traces = [part.sum().item() for part in shares.split(list(self.sizes.values()))]
        return torch.log1p(values).sum().item(), dict(zip(self.sizes, traces, strict=True))

    def _without_negative(self, values: Tensor) -> Tensor:
        below = int((values < 0.0).sum())
        if below:
            raise EvidenceUnavailableError(
                f"{below} of {len(values)} eigenvalues of the Hessian are negative. As the prior precision falls "
                "towards the size of one, the log-evidence rises without bound, so no prior precision is best. "
                f"{WAYS_OUT}"
            )
        return values

    def _scale(self, precision: Mapping[str, float]) -> Tensor:
        return torch.cat(
            [self._matrix.new_full((size,), precision[name] ** -0.5) for name, size in self.sizes.items()]
        )

    def _whitened(self, precision: Mapping[str, float]) -> Tensor:
        scale = self._scale(precision)
        whitened = scale.unsqueeze(1) * self._matrix * scale
        return 0.5 * (whitened + whitened.mT)

    def _rounded(self, values: Tensor) -> Tensor:
        """Eigenvalues, with negative ones that may be rounding set to zero."""
        return torch.where((values < 0.0) & (values >= -self._tiny(values)), 0.0, values)

    def _bounds(self, values: Tensor) -> tuple[float, float]:
        """Bounds on the log-determinant for eigenvalues that are right up to rounding; equal where that is little."""
        tiny = self._tiny(values)
        # Below −1 + tiny an eigenvalue may be −1: no lower bound.
        lower, upper = ((values + shift).clamp(min=-1.0).log1p().sum().item() for shift in (-tiny, tiny))
        if upper - lower <= 2.0 * EXACT:
            whole = torch.log1p(self._rounded(values)).sum().item()
            return whole, whole
        return lower, upper

    def _tiny(self, values: Tensor) -> Tensor:
        return len(values) * self._rounding * values.abs().max()


def _check_symmetric(matrix: Tensor, dtype: torch.dtype) -> None:
    """Refuse what is no second derivative: autograd's formulas for some fused kernels are wrong."""
    difference, largest = (matrix - matrix.mT).abs().max(), matrix.abs().max()
    if bool(difference > torch.finfo(dtype).eps ** 0.5 * largest):
        raise ValueError(
            f"The Hessian that autograd gives is not symmetric, by {difference:g} of {largest:g}: some operation of "
            "this network has a wrong second derivative in PyTorch (torch.nn.utils.parametrizations.weight_norm is "
            'known for it). Use curvature="ggn".'
        )


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Choose kernels whose backward pass has a backward pass."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
