"""Where the examples of a batch stand in a tensor: [N, ...], [T, N, ...], [N·T, ...], windows of images.

Two backward passes tell. With independent examples the gradient of Σₙ wₙ ⟨sₙ, f(xₙ)⟩ in any tensor on the way
is wₙ times that of Σₙ ⟨sₙ, f(xₙ)⟩ wherever the tensor belongs to example n.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_bayes.capture.autograd_graph import graph_nodes

DEEPEST = 64
"""Steps of the graph, those farthest from the outputs, in which the order of flattened rows is looked for."""


@dataclass(frozen=True)
class Layout:
    """The dimension that the examples run along, and how where each has k > 1 entries of it.

    Attributes:
        axis: The dimension.
        major: Whether the entries of one example follow each other, as [N, k] flattened does.
    """

    axis: int = 0
    major: bool = True

    def fits(self, tensor: Tensor, num_examples: int) -> bool:
        """Whether a tensor of a batch of so many examples can have this layout."""
        size = tensor.shape[self.axis] if self.axis < tensor.dim() else 0
        return size > 0 and size % num_examples == 0

    def entries(self, tensor: Tensor, num_examples: int) -> int:
        """Entries of each example, k."""
        return tensor.shape[self.axis] // num_examples

    def examples_first(self, tensor: Tensor, num_examples: int, behind: int = 0) -> Tensor:
        """The tensor as [N·k, ...], the entries of an example together; `behind` one dimension as [C, N·k, ...]."""
        moved = tensor.movedim(self.axis + behind, behind) if self.axis else tensor
        if self.major or moved.shape[behind] == num_examples:
            return moved
        grouped: Tensor = moved.unflatten(behind, (-1, num_examples))
        return grouped.transpose(behind, behind + 1).flatten(behind, behind + 1)

    def apart(self, tensor: Tensor, num_examples: int) -> Tensor:
        """The tensor as [N, ...] in which each [...] has the original's dimensions, of one example."""
        first: Tensor = self.examples_first(tensor, num_examples).unflatten(0, (num_examples, -1))
        return first.movedim(1, self.axis + 1)


def example_weights(num_examples: int, like: Tensor) -> Tensor:
    """The wₙ: distinct, between 1 and 2."""
    return 1.0 + torch.arange(num_examples, dtype=like.real.dtype, device=like.device) / num_examples


def find_layout(plain: Tensor, weighted: Tensor, num_examples: int) -> Layout | None:
    """The layout under which the weighted gradient is the plain one times each example's weight.

    Args:
        plain: Gradient of Σₙ ⟨sₙ, f(xₙ)⟩ in the tensor.
        weighted: Gradient of Σₙ wₙ ⟨sₙ, f(xₙ)⟩, wₙ from `example_weights`.
        num_examples: N.

    Returns:
        None if there is none: the entries are ragged, shared by all examples, or mix them.
    """
    weights = example_weights(num_examples, plain)
    scale = weighted.abs().sum()
    for axis in range(plain.dim()):
        for major in (True, False):
            layout = Layout(axis, major)
            if not layout.fits(plain, num_examples):
                continue
            each = weights.repeat_interleave(layout.entries(plain, num_examples))
            each = each.reshape(-1, *[1] * (plain.dim() - 1))
            first, second = (layout.examples_first(tensor, num_examples) for tensor in (plain, weighted))
            if (second - each * first).abs().sum() <= _rounding(plain) * scale:
                return layout
    return None


def mixes_examples(plain: Tensor, weighted: Tensor, num_examples: int) -> bool:
    """Whether some entry belongs to more than one example: its ratio is none of the weights."""
    if not bool(plain.any()):  # no example came here, or none counts
        return False
    large = plain.abs() > 1e-3 * plain.abs().max()
    place = (weighted[large] / plain[large] - 1.0) * num_examples
    return bool(((place - place.real.round()).abs() > num_examples * _rounding(plain)).any())


def _rounding(tensor: Tensor) -> float:
    return 1e3 * torch.finfo(tensor.dtype).eps


def rows_of_examples(layout: Layout, num_examples: int) -> Callable[[Tensor], Tensor]:
    """What brings rows [N·k, ...] in a layout to examples [N, k, ...]."""
    return partial(layout.apart, num_examples=num_examples)


ROWS = (Layout(0, major=True), Layout(0, major=False))


def layout_of_rows(outputs: Tensor, num_examples: int, layouts: Sequence[Layout] = ROWS) -> Layout:
    """Whether the k rows of an example follow each other, [N, k] flattened, or each other's examples, [k, N].

    With rows grouped rightly, the gradient of Σₙ wₙ ⟨sₙ, f(xₙ)⟩ in every step of the graph that knows examples
    is wₙ times that of Σₙ ⟨sₙ, f(xₙ)⟩ wherever it belongs to example n; grouped wrongly, in fewer steps.

    Args:
        outputs: [N·k, ...], with their graph.
        num_examples: N.
        layouts: Those that may be.

    Returns:
        The first, [N, k], unless another fits more steps. A network in which neither is right mixes its examples,
        which the pass over the rows reports.
    """
    generator = torch.Generator(device=outputs.device).manual_seed(0)
    seed = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    nodes = [
        node for node in graph_nodes([outputs]) if not hasattr(node, "variable")
    ]  # without the parameters
    steps = [GradientEdge(node, 0) for node in nodes[-DEEPEST:]]
    gradients = partial(torch.autograd.grad, outputs, steps, retain_graph=True, allow_unused=True)
    plain = gradients(seed)
    weights = example_weights(num_examples, outputs)

    def num_fitting(layout: Layout) -> int:
        entries = layout.entries(outputs, num_examples)
        each = weights.repeat_interleave(entries) if layout.major else weights.repeat(entries)
        weighted = gradients(seed * each.reshape(-1, *[1] * (outputs.dim() - 1 - layout.axis)))
        return sum(
            find_layout(a, b, num_examples) is not None
            for a, b in zip(plain, weighted, strict=True)
            if a is not None and b is not None and bool(a.any())
        )

    return max(layouts, key=num_fitting)


def follows_graph(outputs: Tensor, num_examples: int, layout: Layout) -> bool:
    """Whether rows of a layout belong to the examples of the nearest tensor, by its shape, that they were made of.

    They do not where rows were selected by a mask, and happen to be a multiple of N. True where there is no such
    tensor.
    """
    for node in graph_nodes([outputs]):
        shapes = [tuple(its.shape) for its in getattr(node, "_input_metadata", ())]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        is_weight = all(hasattr(parent, "variable") for parent in parents)
        if node is outputs.grad_fn or is_weight or not shapes or num_examples not in shapes[0]:
            continue
        weights, entries = example_weights(num_examples, outputs), layout.entries(outputs, num_examples)
        each = weights.repeat_interleave(entries) if layout.major else weights.repeat(entries)
        each = each.reshape(-1, *[1] * (outputs.dim() - 1 - layout.axis)).expand_as(outputs)
        seeds = torch.ones_like(each), each
        plain, weighted = (
            torch.autograd.grad(outputs, [GradientEdge(node, 0)], seed, retain_graph=True, allow_unused=True)[
                0
            ]
            for seed in seeds
        )
        if plain is None or weighted is None or not bool(plain.any()):
            continue
        return find_layout(plain, weighted, num_examples) is not None
    return True


def layout_in(tensor: Tensor, num_examples: int) -> Layout | None:
    """The layout of a tensor that a network made of a batch: by its shape, and by its graph where there is a choice.

    Args:
        tensor: With its graph.
        num_examples: N.

    Returns:
        None if no dimension can be that of the examples.
    """
    axes = [axis for axis, size in enumerate(tensor.shape) if size == num_examples]
    layouts = [Layout(axis) for axis in axes]
    if not layouts and tensor.dim() and ROWS[0].fits(tensor, num_examples):
        layouts = list(ROWS)
    if len(layouts) < 2 or num_examples == 1:
        return layouts[0] if layouts else None
    return layout_of_rows(tensor, num_examples, layouts)
