"""Gradients that are to be differentiated once more, and the refusal of those that cannot be."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_differentiable", "gradient_to_differentiate"]

NO_DERIVATIVE = ("Error", "NotImplemented")
"""Nodes that stand in a graph for a derivative that there is none of."""


def gradient_to_differentiate(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of a loss with its graph, in which every part without a derivative has a node that says so.

    A `once_differentiable` function marks its gradient only if what it is given requires one. The 1 that a backward
    pass starts from does not, and the gradient of such a function at the end of a loss would pass for a constant:
    hence a 1 that does.
    """
    one = torch.ones_like(loss, requires_grad=True)
    return torch.autograd.grad(loss, parameters, one, create_graph=True, materialize_grads=True)


def check_differentiable(gradient: Sequence[Tensor], otherwise: str = "") -> None:
    """Refuse a gradient that autograd cannot differentiate: some such parts it takes for constants, silently.

    Args:
        gradient: From `gradient_to_differentiate`, or a function of it.
        otherwise: Another way out, as a sentence.

    Raises:
        ValueError: If there is such a part.
    """
    ends = sorted({name for name in _nodes_of(gradient) if name in NO_DERIVATIVE})
    if ends:
        raise ValueError(
            f"The gradient of this loss has no derivative ({', '.join(ends)} in its graph): some operation "
            "is a fused kernel, or a torch.autograd.Function that is once_differentiable. Write it in ordinary "
            "operations, for attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
            f"{otherwise and ' '}{otherwise}"
        )


def _nodes_of(tensors: Sequence[Tensor]) -> Iterator[str]:
    """The kinds of all nodes that a backward pass goes through."""
    visited: set[object] = set()
    pending: list[Any] = [tensor.grad_fn for tensor in tensors]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield type(node).__name__
        pending.extend(parent for parent, _ in node.next_functions)
