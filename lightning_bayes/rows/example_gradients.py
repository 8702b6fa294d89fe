"""Sums over per-example gradients of a loss: Σ ‖gₙ‖² and ‖Σ gₙ‖², most of them without forming a gradient.

The gradient of the loss in the network's outputs is one column in the sense of `rows`, so that its rows are
the per-example gradients, by the same layers, and proved in the same way. For a linear map at T positions
gₙ = Σₜ gₙₜ aₙₜᵀ, hence

    ‖gₙ‖² = Σₜₛ (gₙₜ·gₙₛ)(aₙₜ·aₙₛ),    ‖Σₙ gₙ‖² = Σ over all pairs of positions of the batch of the same,

which for T = 1 is ‖gₙ‖²‖aₙ‖²: less work than the backward pass of the layer's weight.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import methodcaller

import torch
from torch import Tensor, nn

from lightning_bayes.capture.module_calls import Call, plain_kernels, recorded_calls
from lightning_bayes.errors import check_finite
from lightning_bayes.rows.backward import Batch, outputs_of
from lightning_bayes.rows.layers import MAX_TEMPORARY
from lightning_bayes.rows.reader import RowReader
from lightning_bayes.rows.rows import DenseRows, LayerUse, OuterRows, Rows

MAX_ROWS = 2**27
"""Numbers in the gradients of one parameter that are held at one time; beyond, one example after the other."""

PROOFS = frozenset(2 * 10**power for power in range(10))
"""Batches at which a plan is tried again: 2, 20, 200, ..."""

FEW = 2**23
"""Multiplications that take no longer than the calls that would spare them."""


@dataclass(frozen=True)
class GradientSums:
    """What some gradients leave behind, by parameter.

    Attributes:
        num_gradients: K, of which the sums are.
        inverse_sizes: Σ over gradients of 1/(examples that it is the mean of): K for single examples.
        squares: Σₖ ‖gₖ‖² for each parameter.
        squared_totals: ‖Σₖ gₖ‖² for each parameter.
        totals: Σₖ gₖ of each parameter, flat, where that was asked for.
    """

    num_gradients: int
    inverse_sizes: float
    squares: list[float]
    squared_totals: list[float]
    totals: list[Tensor] | None = None


class ExampleGradientReader(RowReader):
    """Reads per-example gradients of a loss, one batch at a time; see `RowReader`.

    Proved less often than in a pass over the data: one batch is read in every few steps of training.
    """

    _proofs = PROOFS

    def sums(
        self,
        forward: Callable[[], tuple[Tensor, Tensor]],
        keep_totals: bool = False,
    ) -> GradientSums:
        """Run one batch through the network and return the sums over its examples.

        Args:
            forward: Runs the network and returns its outputs [N, ...] and a loss that is a sum over examples of
                functions of their own outputs, such as `Likelihood.unit_loss`; both with their graph.
            keep_totals: Whether `totals` are wanted; their gradients are then formed.

        Raises:
            EvidenceUnavailableError: If the loss is not finite.
            ValueError: If the examples of the batch are not independent.
        """
        kernels = nullcontext() if self._plan is not None and self._plan.is_of_layers else plain_kernels()
        batch = _batch(*self._forward(forward, self._recorded, kernels))

        def again() -> Batch:
            return _batch(*self._forward(forward, self._holders, plain_kernels()))

        size, sums = batch.num_examples, dict[str, _Sums]()
        for rows in self._layers(lambda: batch, again, batch.roots):
            sums |= _sums(rows, keep_totals, size)
        zero = batch.outputs.new_zeros(())  # of parameters that have not taken part in this batch
        ordered = [sums.get(name, _Sums(zero, zero)) for name in self.parameters]
        both = torch.stack([its.squares for its in ordered] + [its.squared_total for its in ordered])
        totals = [
            torch.zeros_like(parameter).flatten() if its.total is None else its.total
            for parameter, its in zip(self.parameters.values(), ordered, strict=True)
            if keep_totals
        ]
        numbers = both.tolist()  # one wait for the device
        squares, squared_totals = numbers[: len(ordered)], numbers[len(ordered) :]
        return GradientSums(size, float(size), squares, squared_totals, totals if keep_totals else None)

    def _forward(
        self,
        forward: Callable[[], tuple[Tensor, Tensor]],
        modules: list[nn.Module],
        kernels: AbstractContextManager[None],
    ) -> tuple[Tensor, Tensor, list[Call]]:
        with torch.enable_grad(), kernels, recorded_calls(modules) as calls:
            outputs, loss = forward()
        check_finite(loss.detach(), "the loss")
        return outputs, loss, calls


@dataclass(frozen=True)
class _Sums:
    """What one parameter adds up to: Σ ‖gₙ‖², ‖Σ gₙ‖² and, where it was formed, Σ gₙ, flat."""

    squares: Tensor
    squared_total: Tensor
    total: Tensor | None = None


def _batch(outputs: Tensor, loss: Tensor, calls: list[Call]) -> Batch:
    """The batch after the one backward pass, whose column is the loss's gradient in the outputs."""
    root, *grads = torch.autograd.grad(
        loss, [outputs, *outputs_of(calls)], retain_graph=True, allow_unused=True
    )
    columns = (None if grad is None else grad.unsqueeze(0) for grad in grads)
    return Batch.of(calls, outputs, root.unsqueeze(0), columns)


def _sums(rows: Rows, keep_total: bool, num_examples: int) -> dict[str, _Sums]:
    """The sums of each parameter of a layer."""
    if isinstance(rows, DenseRows):
        squares, total = _dense_sums(rows, num_examples)
        return {rows.name: _Sums(squares, _squared(total), total if keep_total else None)}
    sums: dict[str, _Sums] = {}
    inputs, grads = rows.inputs(), rows.grads()[0]
    sizes, entries = inputs.shape[2] + grads.shape[2], inputs.shape[2] * grads.shape[2]
    positions = inputs.shape[:2].numel()
    by_pairs = not keep_total and (positions * sizes <= 2 * entries or positions**2 * sizes <= FEW)
    if by_pairs and inputs.shape[1] == 1:
        return _sums_by_pairs(rows, inputs.squeeze(1), grads.squeeze(1))
    if rows.weight is not None:
        squares = _outer_squares(inputs, grads)
        a, g = inputs.flatten(0, 1), grads.flatten(0, 1)
        if by_pairs:
            sums[rows.weight] = _Sums(squares, _inner(a @ a.mT, g @ g.mT))
        else:
            total = (g.mT @ a).flatten()
            sums[rows.weight] = _Sums(squares, _squared(total), total if keep_total else None)
    if rows.bias is not None:
        summed = grads.sum(1)
        total = summed.sum(0)
        sums[rows.bias] = _Sums(_squared(summed), _squared(total), total)
    return sums


def _sums_by_pairs(rows: OuterRows, inputs: Tensor, grads: Tensor) -> dict[str, _Sums]:
    """The sums for one position of few examples: all of it is in the two [N, N] matrices of inner products."""
    of_inputs, of_grads = inputs @ inputs.mT, grads @ grads.mT
    squared_grads = of_grads.diagonal()
    sums: dict[str, _Sums] = {}
    if rows.weight is not None:
        squares = of_inputs.diagonal().dot(squared_grads)
        sums[rows.weight] = _Sums(squares, _inner(of_inputs, of_grads))
    if rows.bias is not None:
        sums[rows.bias] = _Sums(squared_grads.sum(), of_grads.sum())
    return sums


def _outer_squares(inputs: Tensor, grads: Tensor) -> Tensor:
    """Σₙ ‖Σₜ gₙₜ aₙₜᵀ‖² from a [N, T, in] and g [N, T, out]."""
    num_examples, positions, width = inputs.shape
    height = grads.shape[2]
    if positions == 1:
        return grads.square().sum(2).flatten().dot(inputs.square().sum(2).flatten())
    by_pairs = positions * (width + height) < 2 * width * height
    size = positions * positions if by_pairs else width * height
    step = max(1, MAX_TEMPORARY // size)
    total = inputs.new_zeros(())
    for start in range(0, num_examples, step):
        a, g = inputs[start : start + step], grads[start : start + step]
        total = total + (_inner(a @ a.mT, g @ g.mT) if by_pairs else _squared(g.mT @ a))
    return total


def _dense_sums(rows: DenseRows, num_examples: int) -> tuple[Tensor, Tensor]:
    """Σ ‖gₙ‖² and Σ gₙ of a parameter of any other kind."""
    local_name, use = rows.uses[0]
    alone = len(rows.uses) == 1 and isinstance(use, LayerUse) and use.entries == 1
    if alone and isinstance(use, LayerUse) and hasattr(use.derivatives, "sum_squares"):
        # An embedding: no gradient as long as its vocabulary for each example.
        ones = use.grads.new_ones(num_examples)
        return use.sum_squares(local_name).sum(), use.weighted_total(local_name, ones).flatten()
    if num_examples * rows.shape.numel() <= MAX_ROWS:
        (gradients,) = rows.columns()  # the one that a loss has
        return _squared(gradients), gradients.sum(0)
    squares, total = [], torch.zeros(())
    for example in range(num_examples):
        (gradient,) = rows.with_uses(methodcaller("example", example)).columns()
        squares.append(_squared(gradient))
        total = total.to(gradient) + gradient[0]
    return torch.stack(squares).sum(), total


def _squared(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat.dot(flat)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return left.reshape(-1).dot(right.reshape(-1))
