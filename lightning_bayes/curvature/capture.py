"""Finds the loss inside any function: its outputs, its targets, and the likelihood that it stands for.

The calls of PyTorch's loss functions are noted while somebody's code runs (their module forms end in
them). The one that counts is the one in the graph of the value returned: metrics and other helpers may
call losses of their own. It must also *be* the value returned; a regulariser, a mask or a factor makes the
training loss something else than a negative log-likelihood, and that is an error rather than a guess.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_bayes.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

__all__ = ["CapturedLoss", "capture_loss"]

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

NEUTRAL_ARGUMENTS: dict[str, object] = {
    "weight": None,
    "pos_weight": None,
    "label_smoothing": 0.0,
    "size_average": None,
    "reduce": None,
}
"""Arguments of losses that the likelihoods do not express yet, with the values that do nothing."""

READABLE: dict[Callable[..., Any], Callable[[], Likelihood]] = {
    F.cross_entropy: Categorical,
    # On log-softmax outputs. Log-probabilities serve as logits: the softmax of them is itself.
    F.nll_loss: Categorical,
    F.binary_cross_entropy_with_logits: Bernoulli,
    F.mse_loss: Gaussian,
}
KNOWN = (
    *READABLE,
    F.binary_cross_entropy,
    F.cosine_embedding_loss,
    F.ctc_loss,
    F.gaussian_nll_loss,
    F.hinge_embedding_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.margin_ranking_loss,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.multilabel_soft_margin_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
    F.triplet_margin_loss,
)

WAY_OUT = (
    "LaplaceEvidence(likelihood=..., network=...) reads the network directly: network= the name of the "
    "submodule that maps batch[0] to logits or means, with batch[1] as targets, or a function "
    "(module, batch) -> (outputs, targets)."
)


@dataclass(frozen=True)
class CapturedLoss:
    """A loss that is the negative log-likelihood of `targets` given `outputs`, up to its reduction."""

    outputs: Tensor
    targets: Tensor
    likelihood: Likelihood
    reduction: Reduction
    value: float


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    arguments: dict[str, Any]
    result: Tensor

    @property
    def name(self) -> str:
        return f"F.{self.function.__name__}"


class _LossCalls(TorchFunctionMode):
    """Notes every call of a loss in `KNOWN`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in KNOWN and isinstance(result, Tensor) and result.grad_fn is not None:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            self.calls.append(_Call(func, bound.arguments, result))
        return result


def capture_loss(step: Callable[[], object], likelihood: Likelihood | None = None) -> CapturedLoss:
    """Run a training step and read the likelihood from the loss that it returns.

    Args:
        step: Returns the loss, or a mapping that holds it under "loss".
        likelihood: Overrides the likelihood of the loss found, e.g. a Gaussian with its own noise; it must
            be of the same kind.

    Raises:
        ValueError: If there is no loss that can be read, more than one, or the value returned is not
            the loss that was found.
    """
    with _LossCalls() as recorder:
        returned = step()
    loss = returned["loss"] if isinstance(returned, Mapping) and "loss" in returned else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {list(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ValueError(
            f"training_step returned {type(loss).__name__}{shape}; a scalar loss, or a dict that holds one under "
            f"'loss', can be read. {WAY_OUT}"
        )
    call = _the_call(recorder.calls, loss)
    found = _likelihood_of(call, likelihood)
    outputs, targets = found.prepare(call.arguments["input"], call.arguments["target"])
    reduction = _reduction(call, found, outputs, targets, loss.item())
    return CapturedLoss(outputs, targets, found, reduction, loss.item())


def _the_call(calls: list[_Call], loss: Tensor) -> _Call:
    """The one noted call that the loss depends on."""
    reachable = _calls_in_graph(loss, calls)
    if len(reachable) == 1:
        return reachable[0]
    names = [call.name for call in reachable]
    if reachable:
        raise ValueError(
            f"The loss of training_step is made of {len(names)} losses ({', '.join(names)}), so it is not the "
            f"negative log-likelihood of one output. {WAY_OUT}"
        )
    unused = sorted({call.name for call in calls})
    remark = f" {', '.join(unused)} was called, but the loss does not depend on it." if unused else ""
    listed = ", ".join(f"F.{function.__name__}" for function in READABLE)
    raise ValueError(
        f"No loss that can be read was found in training_step.{remark} Losses that can be read, as functions or "
        f"modules: {listed}. Losses written out by hand leave nothing to read. {WAY_OUT}"
    )


def _calls_in_graph(loss: Tensor, calls: list[_Call]) -> list[_Call]:
    by_node = {call.result.grad_fn: call for call in calls}
    found, visited, pending = [], set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node in by_node:
            # What lies behind a loss is the network: no need to walk it.
            found.append(by_node[node])
        else:
            pending.extend(parent for parent, _ in node.next_functions)
    return found


def _likelihood_of(call: _Call, given: Likelihood | None) -> Likelihood:
    if call.function not in READABLE:
        raise ValueError(f"training_step uses {call.name}, which is not supported yet. {WAY_OUT}")
    for name, neutral in NEUTRAL_ARGUMENTS.items():
        value = call.arguments.get(name, neutral)
        if value is not neutral and not (isinstance(value, float | int) and value == neutral):
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"training_step calls {call.name} with {name}={shown}, which the likelihood does not express "
                f"yet. Leave it out of the training loss, or score the plain likelihood: {WAY_OUT}"
            )
    outputs, targets = call.arguments["input"], call.arguments["target"]
    if call.function in (F.mse_loss, F.binary_cross_entropy_with_logits) and outputs.shape != targets.shape:
        raise ValueError(
            f"training_step calls {call.name} with outputs {list(outputs.shape)} and targets "
            f"{list(targets.shape)}: PyTorch broadcasts them against each other, which is hardly meant. Give "
            "both one shape, for instance by outputs.squeeze(-1)."
        )
    if outputs.dim() > 1 and 0 <= call.arguments.get("ignore_index", -1) < outputs.shape[1]:
        raise ValueError(
            f"training_step calls {call.name} with ignore_index={call.arguments['ignore_index']}, a class that "
            "the loss leaves out. This is not supported yet: take these examples out of the dataset."
        )
    found = READABLE[call.function]()
    if given is None:
        return found
    if given.name != found.name:
        raise ValueError(
            f"likelihood={given!r} was given, but training_step uses {call.name}, which is "
            f"{type(found).__name__}. Leave likelihood='auto', or name the network: {WAY_OUT}"
        )
    return given


def _reduction(
    call: _Call, likelihood: Likelihood, outputs: Tensor, targets: Tensor, value: float
) -> Reduction:
    """Which reduction of the likelihood's terms the returned value is; refuse if it is none."""
    unit_loss = likelihood.unit_loss(outputs.detach(), targets).item()
    num_examples, num_terms = len(outputs), likelihood.num_terms(outputs, targets)
    values: dict[Reduction, float] = {
        reduction: unit_loss
        / num_examples
        * likelihood.loss_scale(reduction, num_terms / num_examples, num_examples, 1.0)
        for reduction in ("mean", "sum")
    }
    # Of one term; log-softmax outputs are rounded at the size of the logits, however small the loss.
    eps = min(torch.finfo(outputs.dtype).eps, torch.finfo(torch.float32).eps)
    rounding = 10 * eps * (1 + outputs.detach().abs().max().item())
    terms = {"mean": 1, "sum": num_terms}
    declared = cast(Reduction, call.arguments.get("reduction", "mean"))
    # With one term both agree: the declared one is meant.
    for reduction in sorted(values, key=lambda name: name != declared):
        if _close(values[reduction], value, RELATIVE_TOLERANCE[outputs.dtype], terms[reduction] * rounding):
            return reduction
    remark = (
        " F.nll_loss expects log-probabilities: are its inputs the outputs of log_softmax?"
        if call.function is F.nll_loss
        else ""
    )
    raise ValueError(
        f"training_step returned {value:.6g}, but the {call.name} in it has mean {values['mean']:.6g} and sum "
        f"{values['sum']:.6g}: a factor, a mask or a further term is in the loss, so it is not a negative "
        f"log-likelihood.{remark} Regularise through the optimizer's weight_decay, or score the likelihood alone: "
        f"{WAY_OUT}"
    )


def _close(expected: float, got: float, relative: float, absolute: float) -> bool:
    # Values that are not finite are not this function's business: the pass over the data reports them.
    if not math.isfinite(expected) or not math.isfinite(got):
        return True
    return math.isclose(expected, got, rel_tol=relative, abs_tol=absolute)
