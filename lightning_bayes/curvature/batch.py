"""One batch after its backward passes, and where its examples stand in what each call returned."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_bayes.curvature.calls import Call
from lightning_bayes.curvature.layout import Layout, example_weights, find_layout

__all__ = ["Batch", "counts", "example_gradients", "find_layouts", "gradients"]


@dataclass(frozen=True)
class Batch:
    """One batch after its backward passes, for some columns of the root."""

    calls: list[Call]
    outputs: Tensor  # [N, ...]
    roots: Tensor  # [C, N, ...]
    grads: list[list[Tensor | None]]
    """Of each call, of each of its outputs: [C, *shape], None without influence."""

    @classmethod
    def backward(cls, calls: list[Call], outputs: Tensor, roots: Tensor) -> "Batch":
        """Take each column of the root back to the outputs of the calls."""
        tensors = [tensor for call in calls for tensor in call.outputs]
        columns = [gradients(outputs, tensors, column) for column in roots]
        stacked = [None if grads[0] is None else torch.stack(grads) for grads in zip(*columns, strict=True)]
        found = iter(stacked)
        return cls(calls, outputs, roots, [[next(found) for _ in call.outputs] for call in calls])

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


def find_layouts(batch: Batch) -> dict[nn.Module, tuple[Layout | None, ...]]:
    """Layouts of the outputs of each module that counts; None where its calls differ, or there is none."""
    pairs = iter(example_gradients(batch))
    layouts: dict[nn.Module, tuple[Layout | None, ...]] = {}
    for call, grads in zip(batch.calls, batch.grads, strict=True):
        its_pairs = itertools.islice(pairs, len(call.outputs))
        found = tuple(
            None if plain is None or weighted is None else find_layout(plain, weighted, batch.num_examples)
            for plain, weighted in its_pairs
        )
        if not counts(grads):  # called for a metric, not on the way to the outputs, or on no example
            continue
        before = layouts.get(call.module, found)
        layouts[call.module] = found if before == found else (None,) * len(found)
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
