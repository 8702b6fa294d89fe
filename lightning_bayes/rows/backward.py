"""One batch after its backward passes, and where its examples stand in what each call returned."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_bayes.capture.example_layout import Layout, example_weights, find_layout
from lightning_bayes.capture.module_calls import Call

BATCHED_BYTES = 2**18
"""Largest tensor, of one column, up to which columns go back in one batched pass."""


@dataclass(frozen=True)
class Batch:
    """One batch after its backward passes, for some columns of the root."""

    calls: list[Call]
    outputs: Tensor  # [N, ...]
    roots: Tensor  # [C, N, ...]
    grads: list[list[Tensor | None]]
    """Of each call, of each of its outputs: [C, *shape], None without influence."""

    @classmethod
    def backward(
        cls, calls: list[Call], outputs: Tensor, roots: Tensor, passes: "ColumnPasses | None" = None
    ) -> "Batch":
        """Take each column of the root back to the outputs of the calls."""
        tensors = [tensor for call in calls for tensor in call.outputs]
        stacked = iter((passes or ColumnPasses()).gradients(outputs, tensors, roots))
        return cls(calls, outputs, roots, [[next(stacked) for _ in call.outputs] for call in calls])

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.outputs)

    def of(self, module: nn.Module) -> list[tuple[Call, list[Tensor | None]]]:
        """The calls of one module that the outputs depend on."""
        return [
            (call, grads)
            for call, grads in zip(self.calls, self.grads, strict=True)
            if call.module is module and counts(grads)
        ]


class ColumnPasses:
    """Takes columns back to tensors: all in one batched pass while they are small, else one after the other.

    A pass over small tensors takes as long as its calls, and a batched one has as many as that of one column. Over
    large ones it takes no less than a loop, and more memory: that of all columns for each step between.
    """

    def __init__(self) -> None:
        self._one_by_one = False

    def gradients(self, outputs: Tensor, tensors: list[Tensor], roots: Tensor) -> list[Tensor | None]:
        """Gradients [C, *shape] of ⟨roots[c], outputs⟩ in each tensor, None where there is no way to it."""
        if not tensors:
            return []
        width = max(tensor.numel() * tensor.element_size() for tensor in [outputs, *tensors])
        if len(roots) > 1 and width <= BATCHED_BYTES and not self._one_by_one:
            try:
                with quiet_loops():
                    return list(_batched(outputs, tensors, roots))
            except RuntimeError as error:  # an operation that vmap does not know
                self._one_by_one = True
                logging.getLogger("lightning_bayes").info(
                    "Columns are taken back one by one, which is slower: torch.vmap cannot batch this network's "
                    "backward pass (%s).",
                    error,
                )
        columns = [gradients(outputs, tensors, column) for column in roots]
        return [None if grads[0] is None else torch.stack(grads) for grads in zip(*columns, strict=True)]


def _batched(outputs: Tensor, tensors: list[Tensor], roots: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        outputs, tensors, roots, retain_graph=True, allow_unused=True, is_grads_batched=True
    )


@contextmanager
def quiet_loops() -> Iterator[None]:
    """Let vmap run operations in a loop without its remark on them."""
    # There is no public way, and vmap cannot be asked. `warnings.catch_warnings` would make Python forget, in every
    # module, which warnings have been given once already.
    switch = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", None)
    try:
        if switch is not None:
            switch(False)
        yield
    finally:
        if switch is not None:
            switch(True)


def find_layouts(batch: Batch) -> dict[nn.Module, tuple[Layout | None, ...]]:
    """Layouts of the outputs of each module that counts; None where its calls differ, or there is none."""
    pairs = iter(example_gradients(batch))
    layouts: dict[nn.Module, tuple[Layout | None, ...]] = {}
    for call, grads in zip(batch.calls, batch.grads, strict=True):
        its_pairs = itertools.islice(pairs, len(call.outputs))
        its_layouts = tuple(
            None if plain is None or weighted is None else find_layout(plain, weighted, batch.num_examples)
            for plain, weighted in its_pairs
        )
        if not counts(grads):  # called for a metric, not on the way to the outputs, or on no example
            continue
        before = layouts.get(call.module, its_layouts)
        layouts[call.module] = its_layouts if before == its_layouts else (None,) * len(its_layouts)
    return layouts


def example_gradients(batch: Batch) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each output of each call the plain and the weighted gradient of `find_layout`."""
    tensors = [tensor for call in batch.calls for tensor in call.outputs]
    like = batch.outputs.detach()
    generator = torch.Generator(device=like.device).manual_seed(0)
    seed = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    weights = example_weights(len(seed), seed).reshape(-1, *[1] * (seed.dim() - 1))
    plain = gradients(batch.outputs, tensors, seed)
    return list(zip(plain, gradients(batch.outputs, tensors, weights * seed), strict=True))


def counts(grads: Sequence[Tensor | None]) -> bool:
    """Whether the outputs depend on what a call returned."""
    return any(grad is not None and grad.numel() > 0 for grad in grads)


def gradients(outputs: Tensor, tensors: list[Tensor], seed: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ⟨seed, outputs⟩ in some tensors, None where there is no way to them."""
    if not tensors:
        return ()
    return torch.autograd.grad(outputs, tensors, seed, retain_graph=True, allow_unused=True)


def one_column(columns: Tensor, grads: Tensor) -> Tensor:
    """Σ_c ρ_c g_c of gradients [C, *shape], as [1, *shape]."""
    return columns.to(grads).unsqueeze(0).mm(grads.flatten(1)).view(1, *grads.shape[1:])
