"""Notes the calls of modules during a forward pass: arguments, and outputs with their place in the graph."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Call:
    """One call of one module.

    Attributes:
        module: The module.
        arguments: (args, kwargs), their tensors detached.
        input: The first argument, whatever it is called.
        outputs: Those tensors that it returned and that carry a gradient, as it made them.
        places: Where these stand among all tensors that it returned.
    """

    module: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    input: Any
    outputs: tuple[Tensor, ...]
    places: tuple[int, ...]


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention and recurrent layers by ordinary operations: fused ones bypass hooks and cannot be vmapped."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def recorded_calls(modules: Iterable[nn.Module]) -> Iterator[list[Call]]:
    """Note the calls of some modules, in the order in which they return."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tensors = tensors_of(output)
        places = tuple(i for i, tensor in enumerate(tensors) if tensor.requires_grad)
        if not places:  # under no_grad, for a metric
            return None
        args, kwargs = arguments = mapped(Tensor.detach, (args, kwargs))
        first = args[0] if args else next(iter(kwargs.values()), None)
        calls.append(Call(module, arguments, first, tuple(tensors[i] for i in places), places))
        # In-place operations behind the module then change the clone, and `outputs` keep their gradient.
        return mapped(Tensor.clone, output)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def output_widths(network: nn.Module) -> Iterator[list[int]]:
    """Note the bytes of each tensor that a module of a network returns."""
    widths: list[int] = [0]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        widths.extend(tensor.numel() * tensor.element_size() for tensor in tensors_of(output))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    try:
        yield widths
    finally:
        for handle in handles:
            handle.remove()


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to the tensors of a nest of tuples, lists and mappings, which keeps its form."""
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
    """The tensors of a nest, in the order in which `mapped` comes to them."""
    if isinstance(tree, Tensor):
        return [tree]
    items = tuple(tree.values()) if isinstance(tree, dict) else tree
    if type(items) in (tuple, list) or (isinstance(items, tuple) and hasattr(items, "_fields")):
        return [tensor for item in items for tensor in tensors_of(item)]
    return []
