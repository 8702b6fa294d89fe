"""Notes the calls of modules during a forward pass: arguments, and outputs with their place in the graph."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_bayes.capture.example_layout import mapped, tensors_of


@dataclass(frozen=True)
class Call:
    """One call of one module.

    Attributes:
        module: The module.
        arguments: (args, kwargs), their tensors detached.
        outputs: Those tensors that it returned and that carry a gradient, as it made them.
        places: Where these stand among all tensors that it returned.
    """

    module: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    outputs: tuple[Tensor, ...]
    places: tuple[int, ...]

    @property
    def input(self) -> Any:
        """The first argument, whatever it is called."""
        args, kwargs = self.arguments
        return args[0] if args else next(iter(kwargs.values()), None)


@contextmanager
def recorded_calls(modules: Iterable[nn.Module]) -> Iterator[list[Call]]:
    """Note the calls of some modules, in the order in which they return."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tensors = tensors_of(output)
        places = tuple(i for i, tensor in enumerate(tensors) if tensor.requires_grad)
        if not places:  # under no_grad, for a metric
            return None
        arguments = mapped(Tensor.detach, (args, kwargs))
        calls.append(Call(module, arguments, tuple(tensors[i] for i in places), places))
        # In-place operations behind the module then change the clone, and `outputs` keep their gradient.
        return mapped(Tensor.clone, output)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
