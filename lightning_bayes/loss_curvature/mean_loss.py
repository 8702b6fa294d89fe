"""The mean training loss as a function of the weights: its value, gradient and products with its curvature.

Each batch is run again for each product, on the same random draws, so that memory is that of one batch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_bayes.capture.autograd_graph import check_differentiable, gradient_to_differentiate
from lightning_bayes.capture.isolation import seed_streams
from lightning_bayes.capture.loss import CapturedLoss
from lightning_bayes.capture.module_calls import plain_kernels
from lightning_bayes.errors import check_finite

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
"""Those that normalise otherwise in training, if they keep running statistics."""


@dataclass(frozen=True)
class BatchLoss:
    """One batch of the training set."""

    loss: Callable[[], Tensor]
    """Runs the network and returns the loss that training steps on, with its graph."""
    captured: Callable[[], CapturedLoss]
    """Runs the network and returns the outputs that the loss is computed from, where it lets them be read."""
    weight: float
    """Weight of this batch's loss in the mean."""


class MeanLoss:
    """f(x) = Σ_b w_b loss_b(x), the weighted mean of the losses of some batches.

    Args:
        network: A throw-away copy.
        parameters: Names, as in `network.named_parameters()`, of what x is made of: those that training moves.
        batches: With weights that add up to 1 where the loss is a mean over examples.
    """

    def __init__(self, network: nn.Module, parameters: Collection[str], batches: Sequence[BatchLoss]) -> None:
        named = dict(network.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in parameters}
        self._weights = list(self.parameters.values())
        self._batches = batches
        self._checked = False
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())

    def flat(self) -> Tensor:
        """The weights x as one vector [p], a copy."""
        return torch.cat([weight.detach().flatten() for weight in self._weights])

    def first(self) -> Tensor:
        """The loss of the first batch, with its graph."""
        with self._differentiable():
            return self._batches[0].loss()

    def first_captured(self) -> CapturedLoss:
        """What the loss of the first batch is computed from.

        Raises:
            ValueError: If that cannot be read.
        """
        with self._differentiable():
            return self._batches[0].captured()

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """f(x) and its gradient [p].

        Raises:
            EvidenceUnavailableError: If one of them is not finite.
        """
        total, gradient = 0.0, torch.zeros_like(self.flat())
        for batch in self._passed():
            with self._differentiable():
                loss = batch.loss()
                parts = torch.autograd.grad(loss, self._weights, materialize_grads=True)
            total += batch.weight * loss.item()
            gradient += batch.weight * _joined(parts)
        check_finite(torch.tensor(total), "the loss")
        check_finite(gradient, "the gradient of the loss")
        return total, gradient

    def product(self, curvature: str) -> Callable[[Tensor], Tensor]:
        """Products with the "hessian", or with the "ggn"."""
        return self.hessian_product if curvature == "hessian" else self.gauss_newton_product

    def hessian_product(self, vector: Tensor) -> Tensor:
        """∇²f(x) v, by differentiating ⟨∇f(x), v⟩ (Pearlmutter 1994).

        Raises:
            EvidenceUnavailableError: If it is not finite.
        """
        total = torch.zeros_like(vector)
        direction = self._apart(vector)
        for batch in self._passed():
            with self._differentiable():
                loss = batch.loss()
                gradient = gradient_to_differentiate(loss, self._weights)
                slope = torch.stack([(g * v).sum() for g, v in zip(gradient, direction, strict=True)]).sum()
                if not slope.requires_grad:  # no weight is in the graph of this batch
                    continue
                self._check_differentiable([slope])
                parts = torch.autograd.grad(slope, self._weights, materialize_grads=True)
            total += batch.weight * _joined(parts)
        check_finite(total, "a product with the Hessian")
        return total

    def gauss_newton_product(self, vector: Tensor) -> Tensor:
        """G v for the generalized Gauss-Newton matrix G = Σ_b w_b JᵀΛJ of f.

        Λ is the Hessian of a batch's loss in its outputs and J their Jacobian, all examples of the batch at once. J v
        is the derivative of Jᵀu in u, so both need backward passes alone.

        Raises:
            EvidenceUnavailableError: If it is not finite.
            ValueError: If the outputs of a batch cannot be read.
        """
        total = torch.zeros_like(vector)
        direction = self._apart(vector)
        for batch in self._passed():
            with self._differentiable():
                captured = batch.captured()
                dummy = torch.zeros_like(captured.outputs, requires_grad=True)
                pulled = torch.autograd.grad(
                    captured.outputs, self._weights, dummy, create_graph=True, materialize_grads=True
                )
                dependent = [(g, v) for g, v in zip(pulled, direction, strict=True) if g.requires_grad]
                self._check_differentiable([g for g, _ in dependent])
                (pushed,) = torch.autograd.grad(
                    [g for g, _ in dependent], [dummy], [v for _, v in dependent], retain_graph=True
                )
                # Λ = RRᵀ, example by example: u -> R (Rᵀu)
                root = captured.likelihood.sqrt_hessian(captured.outputs.detach(), captured.targets).flatten(
                    2
                )
                along = torch.einsum("rno,no->rn", root, pushed.flatten(1))
                curved = torch.einsum("rno,rn->no", root, along).view_as(pushed)
                parts = torch.autograd.grad(captured.outputs, self._weights, curved, materialize_grads=True)
            total += batch.weight * captured.scale * _joined(parts)
        check_finite(total, "a product with the Gauss-Newton matrix")
        return total

    @contextmanager
    def moved_to(self, point: Tensor) -> Iterator[None]:
        """Within, x is another point [p]."""
        before = [weight.detach().clone() for weight in self._weights]
        try:
            self._set(self._apart(point))
            yield
        finally:
            self._set(before)

    def _check_differentiable(self, gradient: Sequence[Tensor]) -> None:
        if not self._checked:  # once: the batches go through the same operations
            check_differentiable(gradient)
            self._checked = True

    def _passed(self) -> Iterator[BatchLoss]:
        seed_streams()  # each pass sees the same random numbers; the caller restores the streams
        yield from self._batches

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """With a graph, by kernels whose backward pass has a backward pass: cuDNN's of recurrent layers have none."""
        with (
            torch.enable_grad(),
            plain_kernels(),
            torch.backends.cudnn.flags(enabled=False) if self._recurrent else nullcontext(),
        ):
            yield

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self._weights, values, strict=True):
                weight.copy_(value)

    def _apart(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([weight.numel() for weight in self._weights])
        return [
            part.view_as(weight).to(weight.dtype) for part, weight in zip(parts, self._weights, strict=True)
        ]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


def normalises_by_batch(network: nn.Module) -> bool:
    """Whether some batch norm of a network takes the statistics of its batch."""
    return any(isinstance(module, NORMS) and module.training for module in network.modules())


def norms_as_in(original: nn.Module, duplicate: nn.Module) -> None:
    """Let batch norm of a copy normalise as it does in training, which it does not in eval mode.

    Batch norm in training divides by the batch's own statistics: that is the function whose gradient is stepped on,
    and its curvature is another. Layers that the user has put into eval mode stay there. So does SyncBatchNorm,
    whose kernel has no second derivative.
    """
    for theirs, ours in zip(original.modules(), duplicate.modules(), strict=True):
        if isinstance(theirs, NORMS) and theirs.training:
            ours.train()
