"""The calls of PyTorch's losses: noted while somebody's code runs, and held against what that returned.

The module forms of the losses end in the functions. The call that counts is the one in the graph of the value
returned: metrics and other helpers may call losses of their own.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_bayes.capture.autograd_graph import graph_nodes
from lightning_bayes.capture.pytorch_losses import (
    KNOWN,
    OF_NO_LIKELIHOOD,
    READERS,
    WAY_OUT,
    GroupingOf,
    LossCall,
    Reading,
    UnreadLossError,
)
from lightning_bayes.likelihoods import Categorical, Likelihood

Reduction = Literal["mean", "sum"]

RELATIVE_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    # A training_step that uses autocast itself.
    torch.bfloat16: 1e-2,
    torch.float16: 1e-2,
}
"""Between the loss returned and the likelihood's own value, by the type of the outputs.

A small regulariser must not pass: once the loss has fallen it is no longer small."""

SIGMOIDS = (torch.sigmoid, Tensor.sigmoid, torch.special.expit)


@dataclass(frozen=True)
class CapturedLoss:
    """A loss that is the negative log-likelihood of `targets` given `outputs`, up to its reduction.

    Both are as `likelihood.prepare` returns them: the weights of this call are in the targets. `unit_loss` is the
    likelihood's, with its graph; `value` is what the training_step returned.
    """

    outputs: Tensor
    targets: Any
    likelihood: Likelihood
    unit_loss: Tensor
    reduction: Reduction
    value: float

    @property
    def scale(self) -> float:
        """The factor s for which the loss is s · `unit_loss` of this batch, up to a constant."""
        scale = self.likelihood.torch_terms
        if self.reduction == "sum":
            return scale
        num_terms = self.likelihood.num_terms(self.outputs, self.targets)
        # As in PyTorch, the mean over no token at all is not a number.
        return scale / num_terms if num_terms else math.nan


class LossCalls(TorchFunctionMode):
    """Notes every call of a loss in `KNOWN`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._sigmoids: dict[Any, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in SIGMOIDS and result.grad_fn is not None:
            self._sigmoids[result.grad_fn] = (args[0] if args else kwargs["input"], result)
        if func in KNOWN and isinstance(result, Tensor) and result.grad_fn is not None:
            bound = _signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            if func is F.binary_cross_entropy:
                bound.arguments["logits"] = self._logits_of(bound.arguments["input"])
            self.calls.append(LossCall(func, bound.arguments, result))
        return result

    def _logits_of(self, probabilities: Tensor) -> Tensor | None:
        """Logits in the shape of their sigmoid, None if something else was made of it."""
        # Whatever lies between (a view, a clone, a cast) shows in the values, which are compared below.
        node = probabilities.grad_fn
        while node is not None and node not in self._sigmoids:
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            node = parents[0] if len(parents) == 1 else None
        logits, result = self._sigmoids.get(node, (None, None))
        if logits is None or result is None or result.numel() != probabilities.numel():
            return None
        again = logits.detach().sigmoid().reshape(probabilities.shape).to(probabilities.dtype)
        same = torch.equal(again, probabilities.detach())
        return logits.reshape(probabilities.shape) if same else None


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def readable_call(calls: list[LossCall], loss: Tensor) -> LossCall:
    """The one noted call that the loss depends on, which some likelihood stands behind."""
    by_node = {call.result.grad_fn: call for call in calls}
    # What lies behind a loss is the network: no need to walk it.
    reachable = [by_node[node] for node in graph_nodes([loss], ends=by_node) if node in by_node]
    if len(reachable) > 1:
        names = [call.name for call in reachable]
        raise UnreadLossError(
            f"The loss of training_step is made of {len(names)} losses ({', '.join(names)}), so it is not the "
            f"negative log-likelihood of one output. {WAY_OUT}"
        )
    if not reachable:
        unused = sorted({call.name for call in calls})
        remark = f" {', '.join(unused)} was called, but the loss does not depend on it." if unused else ""
        listed = ", ".join(f"F.{function.__name__}" for function in READERS)
        raise UnreadLossError(
            f"No loss of PyTorch's that is read as it is written was found in training_step.{remark} These are, as "
            f"functions or modules: {listed}. {WAY_OUT}"
        )
    (call,) = reachable
    if call.function in OF_NO_LIKELIHOOD:
        raise ValueError(
            f"training_step uses {call.name}, which is not the negative log-likelihood of anything: there is no "
            "evidence of it. Leave LaplaceEvidence out of this run."
        )
    if getattr(call.arguments.get("target"), "requires_grad", False):
        raise UnreadLossError(
            f"training_step calls {call.name} with targets that depend on parameters, as the outputs do. {WAY_OUT}"
        )
    if call.function not in READERS:
        raise UnreadLossError(
            f"training_step uses {call.name}, which is not read as it is written. {WAY_OUT}"
        )
    legacy = [name for name in ("size_average", "reduce") if call.arguments.get(name) is not None]
    if legacy:
        raise ValueError(
            f"training_step calls {call.name} with {legacy[0]}=, which PyTorch has deprecated. Give reduction=."
        )
    return call


def loss_of(returned: object) -> Tensor:
    """The loss in what a training step returned.

    Raises:
        ValueError: If it is no scalar tensor.
    """
    loss = returned["loss"] if isinstance(returned, Mapping) and "loss" in returned else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {list(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ValueError(
            f"training_step returned {type(loss).__name__}{shape}; a scalar loss, or a dict that holds one under "
            f"'loss', can be read. {WAY_OUT}"
        )
    return loss


def overridden(name: str, own: Likelihood, given: Likelihood) -> Likelihood:
    """The likelihood that was given, for outputs in the layout of the one that was read.

    Raises:
        ValueError: If they are not of one kind.
    """
    if given.name != own.name:
        raise ValueError(
            f"likelihood={given!r} was given, but training_step uses {name}, which is "
            f"{type(own).__name__}. Give likelihood='auto', or name the network. {WAY_OUT}"
        )
    if isinstance(given, Categorical) and isinstance(own, Categorical):
        given = copy.copy(given)
        given.class_dim = own.class_dim
    return given


def reduction_of_call(
    call: LossCall, reading: Reading, outputs: Tensor, num_terms: float, unit_loss: float, value: float
) -> Reduction:
    """Which reduction of the likelihood's terms the returned value is; refuse if it is none."""
    total = unit_loss * reading.likelihood.torch_terms if reading.total is None else reading.total
    # As in PyTorch, the mean over no token at all is not a number.
    values: dict[Reduction, float] = {"mean": total / num_terms if num_terms else math.nan, "sum": total}
    declared = cast(Reduction, call.arguments.get("reduction", "mean"))
    if not all(map(math.isfinite, (value, *values.values()))):  # the pass over the data reports it
        return declared if declared in values else "mean"
    relative = RELATIVE_TOLERANCE[outputs.dtype]
    if declared in values and math.isclose(values[declared], value, rel_tol=relative):
        return declared
    # Of one term; log-softmax outputs are rounded at the size of the logits, however small the loss.
    eps = min(torch.finfo(outputs.dtype).eps, torch.finfo(torch.float32).eps)
    rounding = 10 * eps * (1 + outputs.abs().max().item())
    terms = {"mean": 1, "sum": num_terms}
    # With one term both agree: the declared one is meant.
    for reduction in sorted(values, key=lambda name: name != declared):
        if math.isclose(values[reduction], value, rel_tol=relative, abs_tol=terms[reduction] * rounding):
            return reduction
    remark = (
        " F.nll_loss expects log-probabilities: are its inputs the outputs of log_softmax?"
        if call.function is F.nll_loss
        else ""
    )
    raise UnreadLossError(
        f"training_step returned {value:.6g}, but the {call.name} in it has mean {values['mean']:.6g} and sum "
        f"{values['sum']:.6g}: a factor, a mask or a further term is in the loss, so it is not a negative "
        f"log-likelihood.{remark} Regularise through the optimizer's weight_decay. {WAY_OUT}"
    )


def as_written(
    step: Callable[[], object],
    likelihood: Likelihood | None,
    grouping_of: GroupingOf,
    num_examples: int | None,
) -> CapturedLoss:
    """Read a loss of PyTorch's that is the value returned.

    Raises:
        UnreadLossError: If it is not, and its graph may tell.
        ValueError: If it cannot be meant.
    """
    with LossCalls() as recorder:
        loss = loss_of(step())
    call = readable_call(recorder.calls, loss)
    reading = READERS[call.function](call, grouping_of(num_examples, call.arguments["input"]))
    read = reading.likelihood
    outputs, targets = read.prepare(reading.outputs, reading.targets)
    num_terms = read.num_terms(outputs.detach(), targets)
    unit_loss, value = read.unit_loss(outputs, targets), loss.item()
    reduction = reduction_of_call(call, reading, outputs.detach(), num_terms, unit_loss.item(), value)
    if likelihood is not None:
        read = overridden(call.name, reading.likelihood, likelihood)
        outputs, targets = read.prepare(reading.outputs, reading.targets)
        unit_loss = read.unit_loss(outputs, targets)
    return CapturedLoss(outputs, targets, read, unit_loss, reduction, value)
