"""Which rows of a loss's outputs are the tokens of one example, where these were flattened into rows."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_bayes.capture.example_layout import Layout, example_weights, find_layout

DEEPEST = 64
"""Steps of the graph, those farthest from the outputs, in which the order of the rows is looked for."""


def rows_of_examples(layout: Layout, num_examples: int) -> Callable[[Tensor], Tensor]:
    """From rows [N·k, ...] in this layout to examples [N, k, ...]."""
    return partial(layout.apart, num_examples=num_examples)


def layout_of_rows(outputs: Tensor, num_examples: int) -> Layout:
    """Whether the k rows of an example follow each other, [N, k] flattened, or each other's examples, [k, N].

    With rows grouped rightly, the gradient of Σₙ wₙ ⟨sₙ, f(xₙ)⟩ in every step of the graph that knows examples
    is wₙ times that of Σₙ ⟨sₙ, f(xₙ)⟩ wherever it belongs to example n; grouped wrongly, in fewer steps.

    Args:
        outputs: [N·k, ...], with their graph.
        num_examples: N.

    Returns:
        [N, k] unless [k, N] fits more steps. A network in which neither is right mixes its examples, which the
        pass over the rows reports.
    """
    generator = torch.Generator(device=outputs.device).manual_seed(0)
    seed = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    steps = _deepest(outputs)
    plain = _gradients(outputs, steps, seed)
    weights, entries = example_weights(num_examples, outputs), len(outputs) // num_examples

    def num_fitting(layout: Layout) -> int:
        each = weights.repeat_interleave(entries) if layout.major else weights.repeat(entries)
        weighted = _gradients(outputs, steps, seed * each.reshape(-1, *[1] * (outputs.dim() - 1)))
        return sum(
            find_layout(a, b, num_examples) is not None
            for a, b in zip(plain, weighted, strict=True)
            if a is not None and b is not None and bool(a.any())
        )

    return max(Layout(0, major=True), Layout(0, major=False), key=num_fitting)


def _gradients(outputs: Tensor, edges: list[GradientEdge], seed: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, edges, seed, retain_graph=True, allow_unused=True)


def _deepest(outputs: Tensor) -> list[GradientEdge]:
    """The steps of the graph that are farthest from the outputs, without the parameters at its end."""
    order: dict[Any, None] = {}
    pending = deque([outputs.grad_fn])
    while pending:
        node = pending.popleft()
        if node is None or node in order or hasattr(node, "variable"):
            continue
        order[node] = None
        pending.extend(parent for parent, _ in node.next_functions)
    return [GradientEdge(node, 0) for node in list(order)[-DEEPEST:]]
