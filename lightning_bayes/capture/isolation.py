"""Working on somebody's model without leaving a trace: random states, precision, modes, operations."""

import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor

PLAIN = (bool, int, float, complex, str, bytes, type(None))
FULL = ("ieee", "none")
"""Values of a switch of precision that leave float32 whole."""
LARGEST_COLLECTION = 1000
"""Items up to which a collection is searched for random generators."""


@contextmanager
def isolated(*holders: object) -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python on exit; within, fixed seeds and full float32.

    The generators that `holders` keep for themselves (a DataLoader with its dataset, transforms, sampler and
    collate function) are restored too. Autocast and inference mode of the caller do not reach inside, nothing runs
    compiled, and autocast and activation checkpointing have no effect.

    Iterating a DataLoader draws from torch's global generator, transforms may draw from any; with
    fixed seeds two evaluations see the same draws. Trainers are often run with reduced matrix-product
    precision, which a log-determinant does not survive. Within, torch refuses to read its older switches of
    TF32 where they say otherwise.
    """
    restores: list[Callable[[], object]] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(np.random.set_state, np.random.get_state()),
        partial(random.setstate, random.getstate()),
        *_restores(holders),
    ]
    num_devices = _num_cuda_devices()
    try:
        with ExitStack() as stack:
            stack.enter_context(_full_float32())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda") if num_devices else ("cpu",):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            # Hooks and modes do not reach into compiled code. Without dynamo there is none, and importing it
            # takes a second. (The stance is newer than torch 2.4.)
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if num_devices:
                stack.enter_context(torch.random.fork_rng(devices=range(num_devices)))
            seed_streams()
            stack.enter_context(_plain_operations())
            yield
    finally:
        for restore in restores:
            restore()


def seed_streams() -> None:
    """Seed the random streams of torch, NumPy and Python by 0."""
    # Not by `torch.manual_seed`, which without a GPU formats a stack trace, for later, at each call.
    torch.default_generator.manual_seed(0)
    if _num_cuda_devices():
        torch.cuda.manual_seed_all(0)
    np.random.seed(0)
    random.seed(0)


@cache
def _num_cuda_devices() -> int:
    """Count once: without a driver torch looks for one at each call."""
    return torch.cuda.device_count()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products, convolutions and recurrent layers in IEEE float32, whichever switches of torch are in use."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        matmul = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with _switched("allow_tf32", False, torch.backends.cudnn):
                yield
        finally:
            torch.set_float32_matmul_precision(matmul)
    elif all(operation.fp32_precision in FULL for operation in _operations()):
        yield
    else:
        own = _own_precisions()
        for operation in own:
            operation.fp32_precision = "ieee"
        try:
            yield
        finally:
            for operation, precision in own.items():
                operation.fp32_precision = precision


def _operations() -> list[Any]:
    """The switches of precision of single operations; one that is not set tells what it takes from its backend."""
    backends: Any = torch.backends
    cuda, onednn = backends.cudnn, backends.mkldnn
    # Without a GPU its own would only make torch refuse to read `cudnn.allow_tf32`.
    own = [cuda.conv, cuda.rnn] if _num_cuda_devices() else []
    return [backends.cuda.matmul, *own, onednn.matmul, onednn.conv, onednn.rnn]


def _own_precisions() -> dict[Any, str]:
    """Each switch of precision with its own value, which is "none" where it takes that of its backend."""
    backends: Any = torch.backends
    onednn = backends.mkldnn
    # A switch tells what it takes from above, not that it takes it: while they are read there is nothing above.
    with _switched("fp32_precision", "none", backends, backends.cudnn):
        own = {operation: operation.fp32_precision for operation in _operations()}
        # But that of all oneDNN, which `mkldnn.flags` alone sets: an equal value is taken to come from there.
        inherited = dict.fromkeys((onednn.matmul, onednn.conv, onednn.rnn), onednn.fp32_precision)
    return {switch: "none" if inherited.get(switch) == value else value for switch, value in own.items()}


@contextmanager
def _switched(name: str, value: object, *owners: Any) -> Iterator[None]:
    """Within, an attribute of some objects has another value."""
    before = [getattr(owner, name) for owner in owners]
    for owner in owners:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            setattr(owner, name, own)


@contextmanager
def _plain_operations() -> Iterator[None]:
    """Within, autocast and activation checkpointing have no effect, and embeddings' gradients are derivatives.

    They have no switch in torch: their entry points are exchanged, whatever name they are imported by.
    """
    without_reentrance = "_checkpoint_without_reentrant_generator"
    exchanged: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (torch.amp.autocast_mode.autocast, "__enter__", _disabled),
        (checkpointing.CheckpointFunction, "apply", _called),
        (checkpointing, without_reentrance, _nothing_around),
        (checkpointing, f"{without_reentrance}_impl", _nothing_around),  # newer than torch 2.4
        (torch, "embedding", partial(_unscaled, places=(3, 4))),
        (torch, "embedding_bag", partial(_unscaled, places=(3, 5))),
    ]
    with ExitStack() as stack:
        for owner, name, make in exchanged:
            if hasattr(owner, name):
                stack.enter_context(_exchanged(owner, name, make))
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
    """Make autocast's `__enter__` that of one that is not enabled."""

    def disabled(context: Any) -> Any:
        enabled, context._enabled = context._enabled, False
        try:
            return enter(context)
        finally:
            context._enabled = enabled

    return disabled


def _called(apply: object) -> object:
    """Make reentrant checkpointing call the function itself, within the graph."""
    return staticmethod(lambda function, preserve, *args: function(*args))


def _nothing_around(generator: object) -> Callable[..., Generator[None, None, None]]:
    """Make checkpointing without reentrance, which is what happens before and after a call, do nothing."""

    def nothing(*args: object, **kwargs: object) -> Generator[None, None, None]:
        yield

    return nothing


def _unscaled(function: Callable[..., Any], places: tuple[int, int]) -> Callable[..., Any]:
    """Make the gradient of torch.embedding and its like the derivative, and dense.

    Args:
        function: The operation.
        places: Where `scale_grad_by_freq` and `sparse` stand among its arguments.
    """

    def unscaled(*args: Any, **kwargs: Any) -> Any:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("scale_grad_by_freq", "sparse")}
        return function(*(False if i in places else arg for i, arg in enumerate(args)), **kwargs)

    return unscaled


def _restores(holders: Iterable[object]) -> Iterator[Callable[[], object]]:
    """For each random generator within reach of `holders`, the call that takes it back to its present state."""
    seen: dict[int, object] = {}  # keeps the objects, so that no other takes over the id of one that is gone
    pending: list[Any] = list(holders)
    while pending:
        thing = pending.pop()
        if isinstance(thing, PLAIN) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Generator | np.random.RandomState):
            yield partial(thing.set_state, thing.get_state())  # type: ignore[arg-type]
        elif isinstance(thing, np.random.Generator):
            yield partial(setattr, thing.bit_generator, "state", thing.bit_generator.state)
        elif isinstance(thing, random.Random):
            yield partial(thing.setstate, thing.getstate())
        else:
            pending.extend(_parts(thing))


def _parts(thing: object) -> Iterable[object]:
    """What an object holds: attributes, items of small collections, what a function closes over."""
    if isinstance(thing, Tensor | np.ndarray | ModuleType | type):
        return ()
    if isinstance(thing, dict | list | tuple | set):
        # Longer ones are the examples themselves.
        items = thing.values() if isinstance(thing, dict) else thing
        return items if len(thing) <= LARGEST_COLLECTION else ()
    if isinstance(thing, MethodType | BuiltinMethodType):
        return (thing.__self__,)
    if isinstance(thing, FunctionType):
        return [cell.cell_contents for cell in thing.__closure__ or () if cell != CellType()]
    if isinstance(thing, partial):
        return (thing.func, thing.args, thing.keywords)
    return getattr(thing, "__dict__", {}).values()
