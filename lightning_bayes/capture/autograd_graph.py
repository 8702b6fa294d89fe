"""What a backward pass goes through: the nodes of a graph, and those that cannot be differentiated once more."""

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NO_DERIVATIVE = ("Error", "NotImplemented")
"""Nodes that stand in a graph for a derivative that there is none of."""
SAME_FUNCTION = {
    "hardsigmoid": "F.relu6(x + 3) / 6 is the same function and has one: use it in place of Hardsigmoid.",
}
"""By a part of its name, what to write in place of an operation."""
IN_ORDINARY_OPERATIONS = (
    "Write it in ordinary operations, for attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)


def graph_nodes(tensors: Iterable[Tensor], ends: Collection[Any] = ()) -> Iterator[Any]:
    """Walk through all nodes that a backward pass goes through, those nearest to the tensors first.

    Args:
        tensors: Where the backward pass begins.
        ends: Nodes behind which nothing is of interest.
    """
    visited: set[Any] = {None}
    pending = deque(tensor.grad_fn for tensor in tensors)
    while pending:
        node: Any = pending.popleft()
        if node not in visited:
            visited.add(node)
            yield node
            pending.extend(() if node in ends else (parent for parent, _ in node.next_functions))


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
    ends = {
        node: type(node).__name__ for node in graph_nodes(gradient) if type(node).__name__ in NO_DERIVATIVE
    }
    if ends:
        operations = sorted({_operation(node) for node in ends})
        same = [remedy for name, remedy in SAME_FUNCTION.items() if name in " ".join(operations)]
        raise ValueError(
            f"The gradient of this loss has no derivative ({', '.join(sorted(set(ends.values())))} in its graph): "
            f"that of {' and '.join(operations)}. "
            + (" ".join(same) if same else IN_ORDINARY_OPERATIONS)
            + f"{otherwise and ' '}{otherwise}"
        )


def _operation(node: Any) -> str:
    """What a node that stands for a missing derivative says when it is asked for it."""
    try:
        node(torch.ones(()))
    except RuntimeError as error:
        named = re.search(r"derivative for '?(?:aten::)?(\w+)'? is not implemented", str(error))
        if named is not None:
            return named.group(1)
        if "once_differentiable" in str(error):
            return "a torch.autograd.Function that is once_differentiable"
    return "some operation that is a fused kernel"
