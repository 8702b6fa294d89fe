"""The largest eigenvalue of the training loss's curvature for any module, without a Trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.capture.inputs_and_targets import examples_of_data, forward_of_pair, require_device
from lightning_bayes.capture.isolation import isolated
from lightning_bayes.capture.loss import capture_loss, loss_of
from lightning_bayes.functional._validation import check_options, count, function, module, positive
from lightning_bayes.loss_curvature.mean_loss import BatchLoss, MeanLoss, norms_as_in
from lightning_bayes.loss_curvature.stability_reading import require_curvature
from lightning_bayes.numerics.lanczos import largest_eigenpair
from lightning_bayes.priors.prior import trainable_names

SMALLEST_NUMBER_OF_PRODUCTS = 2


@dataclass(frozen=True)
class Eigenvalue:
    """The largest eigenvalue of a curvature matrix.

    Attributes:
        value: h = vᵀAv; the largest eigenvalue is at least h.
        error: ‖Av − hv‖: an eigenvalue lies within so much of h.
        converged: Whether the error met the tolerance.
        curvature: "hessian" or "ggn".
        num_examples: On which the loss is the mean.
        num_parameters: p.
        num_products: With the matrix, each a pass over the examples.
    """

    value: float
    error: float
    converged: bool
    curvature: str
    num_examples: int
    num_parameters: int
    num_products: int

    def __str__(self) -> str:
        """Return one line for people."""
        doubt = "" if self.converged else f" (NOT CONVERGED in {self.num_products} products)"
        matrix = "Hessian" if self.curvature == "hessian" else "GGN"
        return (
            f"{self.value:.6g} ± {self.error:.2g}{doubt}, largest eigenvalue of the {matrix} of the mean loss in "
            f"{self.num_parameters:,} parameters on {self.num_examples:,} examples"
        )


def largest_eigenvalue(
    model: nn.Module,
    data: "DataLoader[Any] | tuple[Tensor, Tensor]",
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    curvature: str = "hessian",
    max_examples: int | None = None,
    batch_size: int | None = None,
    tolerance: float = 1e-3,
    max_products: int = 100,
    device: torch.device | str | None = None,
) -> Eigenvalue:
    """Largest eigenvalue h of the Hessian, or of the Gauss-Newton matrix, of the mean training loss.

    f(ω) = Σ_b (n_b/N) loss(model(x_b), y_b),    h = max eigenvalue of ∇²f

    With it `lightning_bayes.functional.largest_stable_learning_rate(h, momentum)` is the learning rate at which SGD
    starts to diverge. By Lanczos' method on products with vectors: no matrix is formed.

    Args:
        model: Maps a batch of inputs to what `loss` takes. It is copied and left as it was. Dropout is off; batch
            norm that is in training mode normalises by the batch, as when training.
        data: A DataLoader of (inputs, targets), read unshuffled, or the two tensors.
        loss: (outputs, targets) -> the mean loss of a batch, a scalar; cross-entropy by default. A known loss that is
            a sum is refused.
        curvature: "hessian"; or "ggn", for losses that `LaplaceEvidence` can read.
        max_examples: A random subset of this size, the same at every call.
        batch_size: Examples at a time; None for the loader's own (at least 32), or 256 for tensors.
        tolerance: Accepted error, relative.
        max_products: Passes over the examples that may be taken.
        device: Where to compute; None for the model's own device.

    Returns:
        An `Eigenvalue`, in the unit of the loss; without weight decay, which adds to it.

    Raises:
        ValueError: If an argument, the data or the loss cannot be used; the message names the remedy.
        EvidenceUnavailableError: (a ValueError) If loss or curvature are not finite.

    Reference:
        Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, ICLR 2021,
        arXiv:2103.00065, who call h sharpness; Pearlmutter 1994 for the products.
    """
    _check(model, loss, curvature, max_examples, batch_size, max_products)
    positive("tolerance", tolerance)
    where = require_device(device)
    with isolated(data, loss):
        examples = examples_of_data(data, batch_size, max_examples)
        network = throw_away_copy(model)
        norms_as_in(model, network)
        if where is not None:
            network.to(where)
        batches = [_batch(network, batch, loss, examples.num_examples) for batch in examples.read()]
        function = MeanLoss(network, trainable_names(network), batches)
        _refuse_sum(function)
        product, start = function.product(curvature), function.flat()
        pair = largest_eigenpair(product, start, tolerance=tolerance, max_products=max_products)
    return Eigenvalue(
        value=pair.value,
        error=pair.error,
        converged=pair.converged,
        curvature=curvature,
        num_examples=examples.num_examples,
        num_parameters=len(pair.vector),
        num_products=pair.num_products,
    )


def _refuse_sum(function: MeanLoss) -> None:
    """The eigenvalue of a sum grows with the batches that it is computed in."""
    try:
        reduction = function.first_captured().reduction
    except ValueError:  # a loss that is none that is known, or weights that are not finite
        return
    if reduction == "sum":
        raise ValueError(
            "Expected argument `loss` to be a mean over the examples of a batch, but got a sum. Use "
            "reduction='mean'; the eigenvalue of the sum over a batch of B is B times as large."
        )


def _batch(
    network: nn.Module, batch: Any, loss: Callable[[Tensor, Tensor], Tensor], num_examples: int
) -> BatchLoss:
    forward = forward_of_pair(network, batch, next(network.parameters()).device)

    def run() -> Tensor:
        return loss_of(loss(*forward())).reshape(())

    return BatchLoss(run, lambda: capture_loss(run), len(batch[1]) / num_examples)


def _check(
    model: object,
    loss: object,
    curvature: object,
    max_examples: object,
    batch_size: object,
    max_products: object,
) -> None:
    module("model", model)
    function("loss", loss, "(outputs, targets) -> mean loss, such as torch.nn.functional.mse_loss")
    require_curvature(curvature)
    check_options(batch_size, max_examples)
    if count("max_products", max_products) < SMALLEST_NUMBER_OF_PRODUCTS:
        raise ValueError(
            f"Expected argument `max_products` to be at least {SMALLEST_NUMBER_OF_PRODUCTS}, got {max_products!r}: "
            "the last one measures the error."
        )
