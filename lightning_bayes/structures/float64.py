"""Running a float32 network in float64, whatever float32 tensors its forward pass meets or makes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """Turns every float32 tensor, and every request for one, into float64.

    The parameters and buffers of the network are to be float64 themselves; this takes care of the batch, of plain
    tensors that a module holds or makes, and of casts. One tensor has one double for as long as the mode lasts, so
    that what is written in place, or through a view, is read again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._doubles: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the tensors, so that no id is used again

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # shape, device and the like
            return func(*args, **(kwargs or {}))
        if func is Tensor.float:
            func = Tensor.double
        return self._widened(func(*self._widened(args), **self._widened(kwargs or {})))

    def _widened(self, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return self._double_of(thing) if thing.dtype == torch.float32 else thing
        if thing is torch.float32:
            return torch.float64
        if type(thing) in (list, tuple):
            return type(thing)(self._widened(part) for part in thing)
        if type(thing) is dict:
            return {key: self._widened(part) for key, part in thing.items()}
        return thing

    def _double_of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._doubles:
            self._doubles[id(tensor)] = tensor, tensor.to(torch.float64)
        return self._doubles[id(tensor)][1]
