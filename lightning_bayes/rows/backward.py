"""One batch after its backward passes: where its examples stand in what each call returned, and what proves rows."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bayes.capture.example_layout import Layout, example_weights, find_layout, mixes_examples
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
    """Gradients in each output of each call: [C, *shape], None without influence."""

    @classmethod
    def of(cls, calls: list[Call], outputs: Tensor, roots: Tensor, grads: Iterable[Tensor | None]) -> "Batch":
        """The batch with gradients in all outputs of all calls, one after the other."""
        rest = iter(grads)
        return cls(calls, outputs, roots, [list(itertools.islice(rest, len(call.outputs))) for call in calls])

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.outputs)

    @cached_property
    def by_module(self) -> dict[nn.Module, list[tuple[Call, list[Tensor | None]]]]:
        """The calls that the outputs depend on, with their gradients; not those for a metric, or on no example."""
        calls = defaultdict(list)
        for call, grads in zip(self.calls, self.grads, strict=True):
            if any(grad is not None and grad.numel() > 0 for grad in grads):
                calls[call.module].append((call, grads))
        return dict(calls)


def outputs_of(calls: Iterable[Call]) -> list[Tensor]:
    """The outputs of some calls, one after the other."""
    return [tensor for call in calls for tensor in call.outputs]


@dataclass
class ColumnPasses:
    """Takes columns back to tensors: all in one batched pass while they are small, else one after the other.

    A pass over small tensors takes as long as its calls, and a batched one has as many as that of one column. Over
    large ones it takes no less than a loop, and more memory: that of all columns for each step between.
    """

    one_by_one: bool = False
    """Whether vmap cannot batch this network's backward pass, which is found out."""

    def back(self, calls: list[Call], outputs: Tensor, roots: Tensor) -> Batch:
        """Take each column of the root back to the outputs of the calls."""
        tensors = outputs_of(calls)
        width = max(tensor.numel() * tensor.element_size() for tensor in [outputs, *tensors])
        if len(roots) > 1 and width <= BATCHED_BYTES and not self.one_by_one:
            try:
                with quiet_loops():
                    return Batch.of(calls, outputs, roots, gradients(outputs, tensors, roots, batched=True))
            except RuntimeError as error:  # an operation that vmap does not know
                self.one_by_one = True
                logging.getLogger("lightning_bayes").info(
                    "Columns are taken back one by one, which is slower: torch.vmap cannot batch this network's "
                    "backward pass (%s).",
                    error,
                )
        columns = [gradients(outputs, tensors, column) for column in roots]
        stacked = (None if each[0] is None else torch.stack(each) for each in zip(*columns, strict=True))
        return Batch.of(calls, outputs, roots, stacked)


@dataclass
class VectorPasses:
    """Backward passes of several vectors through one graph: batched, or one after the other where vmap cannot."""

    one_by_one: bool = False
    """Whether vmap cannot batch this network's backward pass, which is found out."""

    def back(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of Σ ⟨seed, output⟩ in each input, [k, *shape], None without influence; the graph stays.

        Args:
            outputs: Each of its own shape.
            inputs: On the way to them.
            seeds: k for each output, [k, *shape].
        """
        num_vectors = len(seeds[0])
        if num_vectors > 1 and not self.one_by_one:
            try:
                with quiet_loops():
                    return _gradients(outputs, inputs, seeds, batched=True)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:  # an operation that vmap does not know
                self.one_by_one = True
                logging.getLogger("lightning_bayes").info(
                    "Vectors are taken through the network one by one, which is slower: torch.vmap cannot batch its "
                    "backward pass (%s).",
                    error,
                )
        each = [_gradients(outputs, inputs, [seed[j] for seed in seeds]) for j in range(num_vectors)]
        return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True))


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor], batched: bool = False
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        outputs, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=batched
    )


@contextmanager
def quiet_loops() -> Iterator[None]:
    """Let vmap run operations in a loop without its remark on them."""
    # There is no public way, and vmap cannot be asked. `warnings.catch_warnings` would make Python forget, in every
    # module, which warnings have been given once already.
    switch = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda enabled: None)
    switch(False)
    try:
        yield
    finally:
        switch(True)


@contextmanager
def vectorised() -> Iterator[None]:
    """Recurrent layers by operations that vmap knows, and loops inside vmap without its remark on them."""
    onednn: Any = torch.backends.mkldnn
    enabled = onednn.enabled
    onednn.enabled = False  # `onednn.flags` sets TF32 along with it, on which torch remarks
    try:
        with quiet_loops():
            yield
    finally:
        onednn.enabled = enabled


def find_layouts(batch: Batch) -> dict[nn.Module, tuple[Layout | None, ...]]:
    """Layouts of the outputs of each module that counts; None where its calls differ, or there is none."""
    num_examples, pairs = batch.num_examples, iter(example_gradients(batch))
    layouts: dict[nn.Module, tuple[Layout | None, ...]] = {}
    for module, calls in batch.by_module.items():
        of_calls = [
            tuple(
                None if plain is None or weighted is None else find_layout(plain, weighted, num_examples)
                for plain, weighted in itertools.islice(pairs, len(call.outputs))
            )
            for call, _ in calls
        ]
        alike = all(of_call == of_calls[0] for of_call in of_calls)
        layouts[module] = of_calls[0] if alike else (None,) * max(map(len, of_calls))
    return layouts


def example_gradients(batch: Batch) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each output of the calls `by_module` the plain and the weighted gradient of `find_layout`."""
    tensors = outputs_of(call for calls in batch.by_module.values() for call, _ in calls)
    like = batch.outputs.detach()
    generator = torch.Generator(device=like.device).manual_seed(0)
    seed = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    weights = example_weights(len(seed), seed).reshape(-1, *[1] * (seed.dim() - 1))
    plain = gradients(batch.outputs, tensors, seed)
    return list(zip(plain, gradients(batch.outputs, tensors, weights * seed), strict=True))


@dataclass(frozen=True)
class Proof:
    """One column that stands for all of a batch, and a weight for each example, to try rows on.

    Attributes:
        source: The batch after the backward passes of some or all columns.
        column: Σ_c ρ_c R[c, n], [1, N, ...].
        weights: wₙ, [N].
        columns: ρ_c, [C].
    """

    source: Batch
    column: Tensor
    weights: Tensor
    columns: Tensor

    @cached_property
    def batch(self) -> Batch:
        """The batch with the one column."""
        source = self.source
        if len(source.roots) == len(self.columns):
            grads = [
                None if grad is None else one_column(self.columns, grad)
                for of_call in source.grads
                for grad in of_call
            ]
        else:  # of the columns that follow nothing is known yet
            parts = gradients(source.outputs, outputs_of(source.calls), self.column[0])
            grads = [None if part is None else part.unsqueeze(0) for part in parts]
        return Batch.of(source.calls, source.outputs, self.column, grads)


def proof_of(batch: Batch, roots: Tensor) -> Proof | None:
    """What rows are tried on, None where no example has one.

    Args:
        batch: After the backward passes of some or all columns.
        roots: All columns, [C, N, ...].
    """
    roots = roots.detach()
    if not len(roots):
        return None
    generator = torch.Generator().manual_seed(len(roots) + batch.num_examples)
    columns = random_signed(len(roots), roots, generator)
    column = one_column(columns, roots)
    if not bool(column.any()):  # as are all roots then
        return None
    return Proof(batch, column, random_signed(batch.num_examples, roots, generator), columns)


def random_signed(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of either sign between a half and three halves in size."""
    sizes = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    return (sizes * signs).to(like)


def refuse_mixing(batch: Batch, name: str) -> None:
    """Raise a ValueError, of a parameter's rows, if the network mixes the examples of a batch."""
    if any(
        plain is not None and weighted is not None and mixes_examples(plain, weighted, batch.num_examples)
        for plain, weighted in example_gradients(batch)
    ):
        raise ValueError(
            f"The rows of {[name]} cannot be formed: the network mixes the examples of a batch (batch norm without "
            "running statistics, a mean over the batch), or its first output dimension is not the batch. The "
            "evidence needs the likelihood to factorise over examples. Hold the parameters before the mixing fixed "
            "(requires_grad=False), or use group or layer norm, or batch norm with running statistics."
        )


def gradients(
    outputs: Tensor, tensors: list[Tensor], seed: Tensor, batched: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients of ⟨seed, outputs⟩ in some tensors, None where there is no way to them.

    Args:
        outputs: [N, ...], whose graph stays.
        tensors: On the way to them.
        seed: [N, ...]; or columns [C, N, ...], each of which has gradients of its own, [C, *shape].
        batched: Whether the seed is columns.
    """
    if not tensors:
        return ()
    return torch.autograd.grad(
        outputs, tensors, seed, retain_graph=True, allow_unused=True, is_grads_batched=batched
    )


def one_column(columns: Tensor, grads: Tensor) -> Tensor:
    """Σ_c ρ_c g_c of gradients [C, *shape], as [1, *shape]."""
    return columns.to(grads).unsqueeze(0).mm(grads.flatten(1)).view(1, *grads.shape[1:])
