"""Sums over per-example gradients of a loss: Σ ‖gₙ‖² and ‖Σ gₙ‖², most of them without forming a gradient.

The gradient of the loss in the network's outputs is one column in the sense of `rows`, so that its rows are
the per-example gradients, by the same layers, and proved in the same way. For a linear map at T positions
gₙ = Σₜ gₙₜ aₙₜᵀ, hence

    ‖gₙ‖² = Σₜₛ (gₙₜ·gₙₛ)(aₙₜ·aₙₛ),    ‖Σₙ gₙ‖² = Σ over all pairs of positions of the batch of the same,

which for T = 1 is ‖gₙ‖²‖aₙ‖²: less work than the backward pass of the layer's weight.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.capture.module_calls import Call, plain_kernels, recorded_calls
from lightning_bayes.errors import check_finite
from lightning_bayes.rows.backward import Batch
from lightning_bayes.rows.reader import RowReader
from lightning_bayes.rows.routes import Plan
from lightning_bayes.rows.rows import DenseRows, OuterRows, Rows
from lightning_bayes.rows.uses import CHUNK, LayerUse

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
    """Reads per-example gradients of a loss, one batch at a time; see `RowReader`."""

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
        outputs, loss, calls = self._forward(forward, self._plan)
        if self._plan is not None and not self._plan.fits(calls, len(outputs)):
            self._plan = None  # its modules are called in another way: plan again, with all calls
            outputs, loss, calls = self._forward(forward, None)
        batch = _batch(outputs, loss, calls)

        def again() -> Batch:
            return _batch(*self._forward(forward, None))

        sums: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        for rows in self._layers(batch, again, batch.roots):
            sums |= _sums(rows, keep_totals)
        return self._collected(sums, batch, keep_totals)

    def _forward(
        self, forward: Callable[[], tuple[Tensor, Tensor]], plan: Plan | None
    ) -> tuple[Tensor, Tensor, list[Call]]:
        modules = self._holders if plan is None else plan.modules
        kernels = nullcontext() if plan is not None and plan.is_of_layers else plain_kernels()
        with torch.enable_grad(), kernels, recorded_calls(modules) as calls:
            outputs, loss = forward()
        check_finite(loss.detach(), "the loss")
        return outputs, loss, calls

    def _is_proof_due(self, read: int) -> bool:
        """Less often than for a pass over the data, where one batch is read in every few steps of training."""
        return read in PROOFS

    def _collected(
        self,
        sums: dict[str, tuple[Tensor, Tensor, Tensor | None]],
        batch: Batch,
        keep_totals: bool,
    ) -> GradientSums:
        zero = batch.outputs.new_zeros(())
        totals = []
        for name, parameter in self.parameters.items():  # some may not have taken part in this batch
            _, _, total = sums.setdefault(name, (zero, zero, None))
            if keep_totals:
                totals.append(torch.zeros_like(parameter).flatten() if total is None else total)
        ordered = [sums[name] for name in self.parameters]
        both = torch.stack([squares for squares, _, _ in ordered] + [squared for _, squared, _ in ordered])
        numbers, size = both.tolist(), batch.num_examples
        return GradientSums(
            size,
            float(size),
            numbers[: len(ordered)],
            numbers[len(ordered) :],
            totals if keep_totals else None,
        )


def _batch(outputs: Tensor, loss: Tensor, calls: list[Call]) -> Batch:
    """The batch after the one backward pass, whose column is the loss's gradient in the outputs."""
    tensors = [tensor for call in calls for tensor in call.outputs]
    root, *grads = torch.autograd.grad(loss, [outputs, *tensors], retain_graph=True, allow_unused=True)
    sums = iter([None if grad is None else grad.unsqueeze(0) for grad in grads])
    return Batch(calls, outputs, root.unsqueeze(0), [[next(sums) for _ in call.outputs] for call in calls])


def _sums(rows: Rows, keep_total: bool) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """For each parameter Σ ‖gₙ‖², ‖Σ gₙ‖² and, if asked for, Σ gₙ."""
    if isinstance(rows, DenseRows):
        squares, total = _dense_sums(rows)
        return {rows.name: (squares, _squared(total), total if keep_total else None)}
    sums: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    inputs, grads = rows.inputs(), rows.grads()[0]
    sizes, entries = inputs.shape[2] + grads.shape[2], inputs.shape[2] * grads.shape[2]
    positions = inputs.shape[:2].numel()
    by_pairs = not keep_total and (positions * sizes <= 2 * entries or positions**2 * sizes <= FEW)
    if by_pairs and inputs.shape[1] == 1:
        return _sums_by_pairs(rows, inputs.squeeze(1), grads.squeeze(1))
    if rows.weight is not None:
        squares, found_total = _outer_squares(inputs, grads), None
        a, g = inputs.flatten(0, 1), grads.flatten(0, 1)
        if by_pairs:
            squared = _inner(a @ a.mT, g @ g.mT)
        else:
            found_total = (g.mT @ a).flatten()
            squared = _squared(found_total)
        sums[rows.weight] = squares, squared, found_total
    if rows.bias is not None:
        summed = grads.sum(1)
        total = summed.sum(0)
        sums[rows.bias] = _squared(summed), _squared(total), total if keep_total else None
    return sums


def _sums_by_pairs(
    rows: OuterRows, inputs: Tensor, grads: Tensor
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """The same for one position of few examples: all of it is in the two [N, N] matrices of inner products."""
    of_inputs, of_grads = inputs @ inputs.mT, grads @ grads.mT
    squared_grads = of_grads.diagonal()
    sums: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    if rows.weight is not None:
        squares = of_inputs.diagonal().dot(squared_grads)
        sums[rows.weight] = squares, _inner(of_inputs, of_grads), None
    if rows.bias is not None:
        sums[rows.bias] = squared_grads.sum(), of_grads.sum(), None
    return sums


def _outer_squares(inputs: Tensor, grads: Tensor) -> Tensor:
    """Σₙ ‖Σₜ gₙₜ aₙₜᵀ‖² from a [N, T, in] and g [N, T, out]."""
    num_examples, positions, width = inputs.shape
    height = grads.shape[2]
    if positions == 1:
        return grads.square().sum(2).flatten().dot(inputs.square().sum(2).flatten())
    by_pairs = positions * (width + height) < 2 * width * height
    size = positions * positions if by_pairs else width * height
    step = max(1, CHUNK // size)
    total = inputs.new_zeros(())
    for start in range(0, num_examples, step):
        a, g = inputs[start : start + step], grads[start : start + step]
        total = total + (_inner(a @ a.mT, g @ g.mT) if by_pairs else _squared(g.mT @ a))
    return total


def _dense_sums(rows: DenseRows) -> tuple[Tensor, Tensor]:
    """Σ ‖gₙ‖² and Σ gₙ of a parameter of any other kind."""
    local_name, use = rows.uses[0]
    alone = len(rows.uses) == 1 and isinstance(use, LayerUse) and use.entries == 1
    if alone and isinstance(use, LayerUse) and hasattr(use.derivatives, "sum_squares"):
        # An embedding: no gradient as long as its vocabulary for each example.
        ones = use.grads.new_ones(use.grads.shape[1])
        return use.sum_squares(local_name).sum(), use.weighted_total(local_name, ones).flatten()
    squares, total = None, None
    for part in _pieces(rows):
        squares = _squared(part) if squares is None else squares + _squared(part)
        total = part.sum(0) if total is None else total + part.sum(0)
    if squares is None or total is None:
        raise ValueError(f"The parameter {rows.name!r} has no gradients: the batch is empty.")
    return squares, total


def _pieces(rows: DenseRows) -> Iterator[Tensor]:
    """The gradients [N, p], all at once or one example at a time."""
    num_examples = _num_examples(rows)
    if num_examples is None or num_examples * rows.shape.numel() <= MAX_ROWS:
        yield from rows.columns()
        return
    for example in range(num_examples):
        yield from rows.combined({example: 1.0}).columns()  # of the one column that a loss has


def _num_examples(rows: DenseRows) -> int | None:
    use = rows.uses[0][1]
    if isinstance(use, LayerUse):
        return use.grads.shape[1] // use.entries
    return getattr(use, "num_examples", None)


def _squared(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat.dot(flat)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return left.reshape(-1).dot(right.reshape(-1))
