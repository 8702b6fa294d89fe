"""The calls of PyTorch's losses in a training_step, and which of them the value returned comes from."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_bayes.capture.pytorch_losses import READERS, WAY_OUT

KNOWN = (
    *READERS,
    F.cosine_embedding_loss,
    F.ctc_loss,
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


SIGMOIDS = (torch.sigmoid, Tensor.sigmoid, torch.special.expit)


OF_NO_LIKELIHOOD = (
    F.cosine_embedding_loss,
    F.hinge_embedding_loss,
    F.margin_ranking_loss,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.triplet_margin_loss,
)
"""Losses of `KNOWN` that no density stands behind."""


NO_LIKELIHOOD = (
    "A loss that is no likelihood of targets, one factor an example (Dice, contrastive, ranking), has no evidence: "
    "then leave LaplaceEvidence out of this run. Otherwise:"
)


@dataclass(frozen=True)
class LossCall:
    """One call of a loss, its arguments by name and what it returned."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    result: Tensor

    @property
    def name(self) -> str:
        """The function as users write it."""
        return f"F.{self.function.__name__}"


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


def call_of(calls: list[LossCall], loss: Tensor) -> LossCall:
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
    listed = ", ".join(f"F.{function.__name__}" for function in READERS)
    raise ValueError(
        f"No loss that can be read was found in training_step.{remark} Losses that can be read, as functions or "
        f"modules: {listed}. Losses written out by hand leave nothing to read. {NO_LIKELIHOOD} {WAY_OUT}"
    )


def _calls_in_graph(loss: Tensor, calls: list[LossCall]) -> list[LossCall]:
    by_node = {call.result.grad_fn: call for call in calls}
    in_graph, visited, pending = [], set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node in by_node:
            # What lies behind a loss is the network: no need to walk it.
            in_graph.append(by_node[node])
        else:
            pending.extend(parent for parent, _ in node.next_functions)
    return in_graph
