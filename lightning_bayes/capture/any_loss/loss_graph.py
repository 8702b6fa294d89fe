"""Where the network ends and the loss begins: tensors that every parameter reaches the loss through.

A node of the graph that all ways from the loss to all parameters go through *dominates* them. In a topological order
these are the nodes that no edge jumps over.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Edge = tuple[Any, int]
"""A node of the graph and which of its results."""


class Results(TorchFunctionMode):
    """Keeps every tensor with a graph that passes through a function of PyTorch, by the edge that it hangs on."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[Edge, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._note(args)  # made by functions that are none of PyTorch's
        result = func(*args, **(kwargs or {}))
        self._note(result)
        return result

    def _note(self, thing: Any) -> None:
        if isinstance(thing, Tensor):
            if thing.grad_fn is not None:
                self._tensors[thing.grad_fn, thing.output_nr] = thing
        elif isinstance(thing, tuple | list):
            for part in thing:
                self._note(part)

    def tensor(self, edge: Edge) -> Tensor | None:
        """The tensor of an edge; None where none was seen, or it has been overwritten since."""
        node, number = edge
        if hasattr(node, "variable"):
            return None if isinstance(node.variable, nn.Parameter) else node.variable
        tensor = self._tensors.get(edge)
        return (
            tensor if tensor is not None and tensor.grad_fn is node and tensor.output_nr == number else None
        )


class LossGraph:
    """The part of a loss's graph that leads to parameters.

    Args:
        loss: A scalar.
    """

    def __init__(self, loss: Tensor) -> None:
        self.root: Any = loss.grad_fn
        order = _topological(self.root)
        leaves = {node for node in order if hasattr(node, "variable")}
        parameters = {node for node in leaves if isinstance(node.variable, nn.Parameter)}
        self._leaves = parameters or leaves  # of a function of tensors alone, these
        live: set[Any] = set(self._leaves)
        for node in reversed(order):
            if any(parent in live for parent, _ in node.next_functions):
                live.add(node)
        self._of_leaf = {id(node.variable): node for node in leaves}
        self._order = [node for node in order if node in live]
        self._live = live

    def edge(self, tensor: Tensor) -> Edge:
        """The edge that a tensor hangs on."""
        return (tensor.grad_fn or self._of_leaf.get(id(tensor)), tensor.output_nr)

    def parents(self, node: Any) -> list[Edge]:
        """The edges behind a node that lead to parameters."""
        return [(parent, number) for parent, number in node.next_functions if parent in self._live]

    def is_leaf(self, node: Any) -> bool:
        """Whether a node is a parameter."""
        return node in self._leaves

    def dominators(self, start: Any) -> list[tuple[Edge, ...]]:
        """Results of single nodes that every way from a node to its parameters goes through, nearest to it first."""
        reached = set(self._walk([start]))
        order = [node for node in self._order if node in reached]
        position = {node: index for index, node in enumerate(order)}
        used: dict[Any, set[int]] = {start: set()}
        cuts: list[tuple[Edge, ...]] = []
        farthest = 0
        for index, node in enumerate(order):
            if farthest <= index:
                cuts.append(tuple((node, number) for number in sorted(used[node] or {0})))
            if node in self._leaves:
                break
            for parent, number in self.parents(node):
                used.setdefault(parent, set()).add(number)
                farthest = max(farthest, position[parent])
        return cuts

    def separates(self, cut: Collection[Edge]) -> bool:
        """Whether no parameter reaches the loss but through these edges, of which none lies behind another."""
        if any(node in self._leaves for node in self._walk([self.root], cut)):
            return False
        behind: set[Edge] = set()
        pending = [edge for node in {node for node, _ in cut} for edge in self.parents(node)]
        while pending:
            edge = pending.pop()
            if edge not in behind:
                behind.add(edge)
                pending += self.parents(edge[0])
        return not set(cut) & behind  # two results of one node lie side by side

    def expanded(self, cut: Iterable[Edge], has_examples: Callable[[Edge], bool]) -> tuple[Edge, ...] | None:
        """The cut one level nearer to the parameters, None where it is as near as can be.

        Raises:
            PenaltyError: If parameters reach the loss by a way on which there are no examples.
        """
        edges: list[Edge] = []
        for edge in cut:
            parents = self.parents(edge[0])
            layer = has_examples(edge) and not all(map(has_examples, parents))
            for parent in [] if layer else parents:
                edges += self._nearest(parent, has_examples)
            if layer or not parents:
                edges.append(edge)
        unique = tuple(dict.fromkeys(edges))
        return None if set(unique) == set(cut) else unique

    def _nearest(self, edge: Edge, has_examples: Callable[[Edge], bool]) -> tuple[Edge, ...]:
        dominators = self.dominators(edge[0])
        for candidate in reversed(dominators):
            if all(map(has_examples, candidate)):
                return candidate
        if self.is_leaf(dominators[-1][0][0]):
            raise PenaltyError
        return (edge,)

    def _walk(self, starts: Iterable[Any], cut: Collection[Edge] = ()) -> Iterator[Any]:
        visited: set[Any] = set()
        pending = list(starts)
        while pending:
            node = pending.pop()
            if node not in visited:
                visited.add(node)
                yield node
                pending.extend(parent for parent, number in self.parents(node) if (parent, number) not in cut)


class PenaltyError(Exception):
    """A parameter reaches the loss by a way on which there are no examples."""


def _topological(root: Any) -> Sequence[Any]:
    """All nodes of a graph, each before those behind it."""
    after: list[Any] = []
    visited: set[Any] = set()
    pending: list[tuple[Any, bool]] = [(root, False)]
    while pending:
        node, is_done = pending.pop()
        if is_done:
            after.append(node)
        elif node is not None and node not in visited:
            visited.add(node)
            pending.append((node, True))
            pending.extend((parent, False) for parent, _ in node.next_functions if parent not in visited)
    return after[::-1]
