"""Where the examples of a batch stand in a tensor: [N, ...], [T, N, ...], [N·T, ...], windows of images.

Two backward passes tell. With independent examples the gradient of Σₙ wₙ ⟨sₙ, f(xₙ)⟩ in any tensor on the way
is wₙ times that of Σₙ ⟨sₙ, f(xₙ)⟩ wherever the tensor belongs to example n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """The tensor as [N·k, ...], the entries of an example together."""
        moved = tensor.movedim(self.axis, 0) if self.axis else tensor
        if self.major or moved.shape[0] == num_examples:
            return moved
        grouped: Tensor = moved.unflatten(0, (-1, num_examples))
        return grouped.transpose(0, 1).flatten(0, 1)

    def columns_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """`examples_first` of each column of a tensor [C, ...]: [C, N·k, ...]."""
        moved = tensor.movedim(self.axis + 1, 1) if self.axis else tensor
        if self.major or moved.shape[1] == num_examples:
            return moved
        grouped: Tensor = moved.unflatten(1, (-1, num_examples))
        return grouped.transpose(1, 2).flatten(1, 2)

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
            entries = layout.entries(plain, num_examples)
            along = weights.repeat_interleave(entries) if major else weights.repeat(entries)
            along = along.reshape(-1, *[1] * (plain.dim() - axis - 1))
            if (weighted - along * plain).abs().sum() <= _rounding(plain) * scale:
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


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same nest of tuples, lists and mappings with the function applied to its tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(function, item) for item in tree))
    if type(tree) in (tuple, list):
        return type(tree)(mapped(function, item) for item in tree)
    if isinstance(tree, dict):
        items = {key: mapped(function, item) for key, item in tree.items()}
        return items if type(tree) is dict else type(tree)(**items)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a nest, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for item in tree.values() for tensor in tensors_of(item)]
    if (isinstance(tree, tuple) and hasattr(tree, "_fields")) or type(tree) in (tuple, list):
        return [tensor for item in tree for tensor in tensors_of(item)]
    return []
