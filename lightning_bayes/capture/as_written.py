"""The user's module as it is written: what Lightning, torch and tools hang on it is taken off the copy.

Profilers' and loggers' hooks, compiled calls and functions, gradients that are scaled by frequency or sparse are
properties of the copy; activation checkpointing and autocast belong to code that runs, and `isolated` lifts them.
A complex parameter of the copy is its real and imaginary part: two real numbers, each with its prior.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Module = TypeVar("_Module", bound=nn.Module)

TOOLS = (
    *("lightning.", "pytorch_lightning.", "lightning_fabric.", "torchmetrics."),
    *("torch.profiler", "torch.autograd.profiler", "torch.utils.flop_counter", "torch._dynamo"),
    *("wandb.", "neptune.", "comet_ml.", "fvcore.", "torchinfo.", "deepspeed."),
)
"""Where hooks come from that watch a module and are no part of what it computes."""
COMPILED = "_torchdynamo_orig_callable"
"""What torch.compile leaves on a function that it has compiled: the function."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def throw_away_copy(module: _Module, shared: Sequence[object] = ()) -> _Module:
    """Deep copy of a module as it is written, in eval mode, in float32 at least, without gradients.

    What tools hang on a module is taken off, and complex parameters are their real and imaginary parts.

    Args:
        module: Left as it is.
        shared: Objects that the copy shares with the original, such as the Trainer.

    Raises:
        ValueError: If something that the module holds cannot be copied.
    """
    try:
        with _DetachOnCopy():
            memo = _memo_of_tools(module) | {id(thing): thing for thing in shared}
            duplicate = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(module).__name__} holds something that copy.deepcopy cannot copy ({error}); the evidence "
            "is computed on a copy so that training is not disturbed. Keep it out of the module, or name the "
            "part that can be copied: network=."
        ) from error
    duplicate.eval()
    _take_off_tools(module, duplicate)
    for part in duplicate.modules():  # they log or alter gradients of training; there is no public way
        part._backward_hooks.clear()
        part._backward_pre_hooks.clear()
    for parameter in duplicate.parameters():
        parameter.grad = None
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in duplicate.parameters()):
        duplicate.float()
    return duplicate


class _DetachOnCopy(TorchFunctionMode):
    """Lets `copy.deepcopy` meet tensors with a graph, such as losses that a module has kept in a list."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def _memo_of_tools(module: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` puts in the place of things that tools have hung on a module, by id."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        compiled = vars(part).get("_compiled_call_impl")
        if compiled is not None:
            memo[id(compiled)] = None
        for hooks in HOOKS:
            memo |= {id(hook): _no_hook for hook in vars(part)[hooks].values() if _is_a_tools(hook)}
    return memo


def _take_off_tools(original: nn.Module, duplicate: nn.Module) -> None:
    """Make a deep copy of a module what is written: nothing compiled, gradients the derivatives, parameters real."""
    pairs = list(zip(original.modules(), duplicate.modules(), strict=True))
    copies = {id(theirs): mine for theirs, mine in pairs}
    for theirs, mine in pairs:
        if vars(mine).get("_compiled_call_impl") is not None:
            vars(mine)["_compiled_call_impl"] = None
        _uncompile(theirs, mine, copies)
        if isinstance(mine, nn.Embedding | nn.EmbeddingBag):
            mine.sparse = mine.scale_grad_by_freq = False
    _make_real(duplicate)


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts [..., 2], a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _is_a_tools(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    if isinstance(hook, MethodType):
        where = type(hook.__self__).__module__
    else:
        where = getattr(hook, "__module__", None) or type(hook).__module__
    return where.startswith(TOOLS)


def _no_hook(*args: object, **kwargs: object) -> None:
    return None


def _uncompile(theirs: nn.Module, mine: nn.Module, copies: dict[int, nn.Module]) -> None:
    """Give a copy its own functions in the place of compiled ones, which are the original's."""
    if "torch._dynamo" not in sys.modules:  # without dynamo nothing is compiled
        return
    wrapped = mine._modules.get("_orig_mod")
    if wrapped is not None and type(mine).__name__ == "OptimizedModule":  # its parameters keep their names
        vars(mine)["forward"] = wrapped.__call__
        return
    for kind in reversed(type(mine).__mro__):
        for name, value in vars(kind).items():
            if COMPILED in getattr(value, "__dict__", {}) and getattr(type(mine), name) is value:
                vars(mine)[name] = MethodType(getattr(value, COMPILED), mine)
    for name, value in vars(theirs).items():
        if COMPILED in getattr(value, "__dict__", {}) and name != "_compiled_call_impl":
            function = getattr(value, COMPILED)
            if isinstance(function, MethodType) and id(function.__self__) in copies:
                function = MethodType(function.__func__, copies[id(function.__self__)])
            vars(mine)[name] = function


def _make_real(network: nn.Module) -> None:
    """Exchange each complex parameter for its two parts, of which its module still sees the complex number."""
    # With what is exchanged, so that no other takes over its id.
    real: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for module in network.modules():
        names = [name for name, p in module._parameters.items() if p is not None and p.is_complex()]
        for name in names:
            before: Any = module._parameters[name]
            if id(before) not in real:
                parts = as_real(before.detach()).clone()
                real[id(before)] = before, nn.Parameter(parts, requires_grad=before.requires_grad)
            module._parameters[name] = real[id(before)][1]
        if names:
            kind, views = type(module), {name: _complex_view(name) for name in names}
            module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **views})


def _complex_view(name: str) -> property:
    def number(module: nn.Module) -> Tensor:
        parts: Any = module._parameters[name]
        # Not `view_as_complex`, which wants the two side by side in memory: they may be cut out of one long vector.
        return torch.complex(parts[..., 0], parts[..., 1])

    return property(number)
