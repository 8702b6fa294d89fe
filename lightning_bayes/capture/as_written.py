"""The user's module as it is written: what Lightning, torch and tools hang on it is taken off the copy.

Profilers' and loggers' hooks, compiled calls and functions, gradients that are scaled by frequency or sparse are
properties of the copy; activation checkpointing and autocast belong to code that runs, and are lifted while it does.
A complex parameter of the copy is its real and imaginary part: two real numbers, each with its prior.
"""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn

TOOLS = (
    *("lightning.", "pytorch_lightning.", "lightning_fabric.", "torchmetrics."),
    *("torch.profiler", "torch.autograd.profiler", "torch.utils.flop_counter", "torch._dynamo"),
    *("wandb.", "neptune.", "comet_ml.", "fvcore.", "torchinfo.", "deepspeed."),
)
"""Where hooks come from that watch a module and are no part of what it computes."""
COMPILED = "_torchdynamo_orig_callable"
"""What torch.compile leaves on a function that it has compiled: the function."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def memo_of_tools(module: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` is to put in the place of things that tools have hung on a module, by id."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        compiled = vars(part).get("_compiled_call_impl")
        if compiled is not None:
            memo[id(compiled)] = None
        for hooks in HOOKS:
            memo |= {id(hook): _no_hook for hook in vars(part)[hooks].values() if _is_a_tools(hook)}
    return memo


def take_off_tools(original: nn.Module, duplicate: nn.Module) -> None:
    """Make a deep copy of a module what is written: nothing compiled, gradients the derivatives, parameters real.

    Args:
        original: Left as it is.
        duplicate: Its copy.
    """
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


@contextmanager
def plain_operations() -> Iterator[None]:
    """Within, autocast and activation checkpointing have no effect, and embeddings' gradients are derivatives.

    They have no switch in torch: their entry points are exchanged, whatever name they are imported by.
    """
    with ExitStack() as stack:
        stack.enter_context(_exchanged(torch.amp.autocast_mode.autocast, "__enter__", _disabled))
        stack.enter_context(_exchanged(checkpointing.CheckpointFunction, "apply", _called))
        name = "_checkpoint_without_reentrant_generator"
        for generator in (name, f"{name}_impl"):  # the latter is newer than torch 2.4
            if hasattr(checkpointing, generator):
                stack.enter_context(_exchanged(checkpointing, generator, _nothing_around))
        stack.enter_context(_exchanged(torch, "embedding", partial(_unscaled, places=(3, 4))))
        stack.enter_context(_exchanged(torch, "embedding_bag", partial(_unscaled, places=(3, 5))))
        yield


@contextmanager
def _exchanged(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put what `make` makes of an attribute in its place."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _disabled(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of autocast's `__enter__`: the same for one that is not enabled."""

    def disabled(context: Any) -> Any:
        enabled, context._enabled = context._enabled, False
        try:
            return enter(context)
        finally:
            context._enabled = enabled

    return disabled


def _called(apply: object) -> object:
    """Of reentrant checkpointing: the function itself, within the graph."""
    return staticmethod(lambda function, preserve, *args: function(*args))


def _nothing_around(generator: object) -> Callable[..., Generator[None, None, None]]:
    """Of checkpointing without reentrance, which is what happens before and after a call: nothing."""

    def nothing(*args: object, **kwargs: object) -> Generator[None, None, None]:
        yield

    return nothing


def _unscaled(function: Callable[..., Any], places: tuple[int, int]) -> Callable[..., Any]:
    """Of torch.embedding and its like: with a gradient that is the derivative, and dense.

    Args:
        function: The operation.
        places: Of `scale_grad_by_freq` and `sparse` among its arguments.
    """

    def unscaled(*args: Any, **kwargs: Any) -> Any:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("scale_grad_by_freq", "sparse")}
        return function(*(False if i in places else arg for i, arg in enumerate(args)), **kwargs)

    return unscaled


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
    real: dict[
        int, tuple[Tensor, nn.Parameter]
    ] = {}  # keeps what is exchanged, so that no other takes over its id
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
