"""The call of a network on one batch: outputs and targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bayes.capture.example_layout import mapped, tensors_of

Forward = Callable[[], tuple[Tensor, Tensor]]
"""Runs the network on one batch and returns its outputs, with their graph, and the targets."""
PLAIN = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class BatchForward:
    """The call of a network on one batch, whole or some of its examples.

    Attributes:
        run: Runs the network on a batch that it may work on in place, and returns its outputs, with their graph,
            and the targets.
        batch: The batch, left as it is.
    """

    run: Callable[[Any], tuple[Tensor, Tensor]]
    batch: Any

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets of all examples."""
        return self.run(mapped(Tensor.clone, self.batch))

    def of(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets of some examples by themselves."""
        return self.run(_chosen(self.batch, examples))

    def num_examples(self) -> int | None:
        """N; None where the batch cannot be taken apart: a graph, tensors that do not agree, objects."""
        if not _is_plain(self.batch):
            return None
        sizes = {len(tensor) for tensor in tensors_of(self.batch) if tensor.dim()}
        return sizes.pop() if len(sizes) == 1 else None


def _is_plain(tree: Any) -> bool:
    """Whether a batch is made of dense tensors and plain things in tuples, lists and dicts alone."""
    if isinstance(tree, Tensor):
        return tree.layout is torch.strided and not tree.is_nested
    if isinstance(tree, PackedSequence):
        return False
    if type(tree) is dict:
        return all(map(_is_plain, tree.values()))
    if type(tree) in (tuple, list) or (isinstance(tree, tuple) and hasattr(tree, "_fields")):
        return all(map(_is_plain, tree))
    return isinstance(tree, PLAIN)


def _chosen(tree: Any, examples: Tensor) -> Any:
    return mapped(lambda tensor: tensor[examples.to(tensor.device)] if tensor.dim() else tensor.clone(), tree)
