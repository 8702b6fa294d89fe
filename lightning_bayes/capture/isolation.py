"""Working on somebody's model without leaving a trace: random state and throw-away copies."""

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_bayes.capture.as_written import memo_of_tools, plain_operations, take_off_tools

_Module = TypeVar("_Module", bound=nn.Module)

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
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    restores = list(_restores(holders))
    try:
        with ExitStack() as stack:
            stack.enter_context(_full_float32())
            stack.enter_context(plain_operations())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda") if _num_cuda_devices() else ("cpu",):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            if _num_cuda_devices():
                stack.enter_context(torch.random.fork_rng(devices=range(_num_cuda_devices())))
            # Hooks and modes do not reach into compiled code. Without dynamo there is none, and importing it
            # takes a second. (The stance is newer than torch 2.4.)
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            _seed_torch()
            np.random.seed(0)
            random.seed(0)
            yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for restore in restores:
            restore()


def _seed_torch() -> None:
    """As `torch.manual_seed(0)` for the generators that are restored.

    Without a GPU `torch.manual_seed` itself formats a stack trace, each time and for later, of who has asked for one.
    """
    torch.default_generator.manual_seed(0)
    if _num_cuda_devices():
        torch.cuda.manual_seed_all(0)


@cache
def _num_cuda_devices() -> int:
    """As it was at the first call: without a driver torch looks for one at each."""
    return torch.cuda.device_count()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products, convolutions and recurrent layers in IEEE float32, whichever switches of torch are in use."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = cudnn
        return
    if all(operation.fp32_precision in FULL for operation in _operations()):
        yield
        return
    own = _own_precisions()
    for operation, _ in own:
        operation.fp32_precision = "ieee"
    try:
        yield
    finally:
        for operation, precision in own:
            operation.fp32_precision = precision


def _operations() -> list[Any]:
    """The switches of precision of single operations; one that is not set tells what it takes from its backend."""
    backends: Any = torch.backends
    cuda, onednn = backends.cudnn, backends.mkldnn
    # Without a GPU its own would only make torch refuse to read `cudnn.allow_tf32`.
    own = [cuda.conv, cuda.rnn] if _num_cuda_devices() else []
    return [backends.cuda.matmul, *own, onednn.matmul, onednn.conv, onednn.rnn]


def _own_precisions() -> list[tuple[Any, str]]:
    """Each switch of precision with its own value, which is "none" where it takes that of its backend."""
    backends: Any = torch.backends
    cuda, onednn = backends.cudnn, backends.mkldnn
    # A switch tells what it takes from above, not that it takes it: while they are read there is nothing above.
    above = []
    for parent in (backends, cuda):
        above.append((parent, parent.fp32_precision))
        parent.fp32_precision = "none"
    own = [(operation, operation.fp32_precision) for operation in _operations()]
    # That of all oneDNN is set by `mkldnn.flags` alone: an equal value is taken to come from there.
    of_all = onednn.fp32_precision
    own[-3:] = [(operation, "none" if value == of_all else value) for operation, value in own[-3:]]
    for parent, precision in above:
        parent.fp32_precision = precision
    return own


def _restores(holders: Iterable[object]) -> Iterator[Callable[[], object]]:
    """For each random generator within reach of `holders`, the call that takes it back to its present state."""
    seen: dict[int, object] = {}  # keeps the objects, so that no other takes over the id of one that is gone
    pending = list(holders)
    while pending:
        thing = pending.pop()
        if isinstance(thing, PLAIN) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Generator):
            yield partial(thing.set_state, thing.get_state())
        elif isinstance(thing, np.random.Generator):
            yield partial(setattr, thing.bit_generator, "state", thing.bit_generator.state)
        elif isinstance(thing, np.random.RandomState):
            yield partial(thing.set_state, thing.get_state())
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


class _DetachOnCopy(TorchFunctionMode):
    """Lets `copy.deepcopy` meet tensors with a graph, such as losses that a module has kept in a list."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def throw_away_copy(module: _Module, shared: Sequence[object] = ()) -> _Module:
    """Deep copy of a module as it is written, in eval mode, in float32 at least, without gradients.

    What tools hang on a module is taken off, and complex parameters are their real and imaginary parts, see
    `as_written`.

    Args:
        module: Left as it is.
        shared: Objects that the copy shares with the original, such as the Trainer.

    Raises:
        ValueError: If something that the module holds cannot be copied.
    """
    try:
        with _DetachOnCopy():
            memo = memo_of_tools(module) | {id(thing): thing for thing in shared}
            duplicate = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(module).__name__} holds something that copy.deepcopy cannot copy ({error}); the evidence "
            "is computed on a copy so that training is not disturbed. Keep it out of the module, or name the "
            "part that can be copied: network=."
        ) from error
    duplicate.eval()
    take_off_tools(module, duplicate)
    for part in duplicate.modules():  # they log or alter gradients of training; there is no public way
        part._backward_hooks.clear()
        part._backward_pre_hooks.clear()
    for parameter in duplicate.parameters():
        parameter.grad = None
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in duplicate.parameters()):
        duplicate.float()
    return duplicate
