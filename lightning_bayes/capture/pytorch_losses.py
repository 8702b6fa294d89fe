"""From a call of one of PyTorch's losses to a likelihood with the outputs and targets that it takes.

Weights are data of the call: those of classes are the same in every batch, those of examples are not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bayes.capture.example_layout import (
    Layout,
    follows_graph,
    layout_of_rows,
    rows_of_examples,
)
from lightning_bayes.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
)

WAY_OUT = (
    "LaplaceEvidence(likelihood=..., network=...) reads the network directly: network= the name of the "
    "submodule that maps batch[0] to logits or means, with batch[1] as targets, or a function "
    "(module, batch) -> (outputs, targets)."
)


class UnreadLossError(ValueError):
    """A loss that is none of PyTorch's as they are written; its graph may tell what it is."""


Grouping = Callable[[Tensor], Tensor]
"""Brings a tensor with a row for each row of the outputs to one with a row for each example."""
GroupingOf = Callable[[int | None, Tensor], Grouping]
"""The grouping, from the number of examples, None where a batch does not say, and the outputs."""


@dataclass
class RowsOfExamples:
    """How the rows that a loss sees make examples: read off the first batch that tells, and kept to by the others."""

    layout: Layout | None = None

    def grouping(self, num_examples: int | None, outputs: Tensor) -> Grouping:
        """What groups the rows of one batch.

        Args:
            num_examples: N of the batch; None where it does not say, and each row is one.
            outputs: That the loss sees, with their graph.

        Raises:
            ValueError: If the rows are not equally many of each example.
        """
        num_rows = len(outputs) if outputs.dim() else 1
        if num_examples in (None, num_rows):
            return one_row_each
        layout = None
        if num_examples and num_rows and num_rows % num_examples == 0:
            layout = self.layout or layout_of_rows(outputs, num_examples)
        if layout is None or not follows_graph(outputs, num_examples, layout):
            raise UnreadLossError(
                f"The loss sees {num_rows} rows of outputs, but the batch holds {num_examples} examples, so the "
                "tokens of an example cannot be told. Keep every token and mark those that do not count by "
                f"ignore_index instead of selecting by a mask. {WAY_OUT}"
            )
        if num_examples > 1:  # one example does not tell
            self.layout = layout
        return rows_of_examples(layout, num_examples)


def one_row_each(tensor: Tensor) -> Tensor:
    """The grouping of outputs whose rows are the examples."""
    return tensor


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


@dataclass(frozen=True)
class Reading:
    """A call of a loss as a likelihood sees it."""

    likelihood: Likelihood
    outputs: Tensor
    targets: Tensor
    total: float | None = None
    """PyTorch's sum of the loss where that is not the likelihood's: by a constant, or by its rounding."""


def _cross_entropy(call: LossCall, rows: Grouping) -> Reading:
    outputs, targets = call.arguments["input"], call.arguments["target"]
    if outputs.dim() > 1:  # PyTorch's classes are in dimension 1; behind `rows` that may be a token's
        outputs = outputs.movedim(1, -1)
        targets = targets.movedim(1, -1) if targets.is_floating_point() else targets
    outputs, targets = rows(outputs), rows(targets)
    likelihood = Categorical(
        weight=call.arguments["weight"],
        label_smoothing=call.arguments.get("label_smoothing", 0.0),
        ignore_index=call.arguments["ignore_index"],
        class_dim=-1,
    )
    return Reading(likelihood, outputs, targets)


def _divergence(call: LossCall, rows: Grouping) -> Reading:
    """Σ q (ln q − ln p): the cross-entropy of class probabilities q, less their entropy."""
    log_p, q = call.arguments["input"], call.arguments["target"]
    _one_shape(call.name, log_p, q)
    log_p, q = (tensor.movedim(1, -1) if tensor.dim() > 1 else tensor for tensor in (log_p, q))
    q = q.exp() if call.arguments["log_target"] else q
    ones = [tensor.detach().sum(-1) for tensor in (log_p.exp(), q)]
    if not all(torch.allclose(total, torch.ones_like(total), atol=1e-4) for total in ones):
        raise UnreadLossError(
            f"training_step calls {call.name} on numbers that are no log-probabilities of classes in dimension 1, "
            f"beside class probabilities. {WAY_OUT}"
        )
    total = F.kl_div(log_p.detach(), q.detach(), reduction="sum")
    return Reading(Categorical(class_dim=-1), rows(log_p), rows(q), total.item())


def _binary_cross_entropy(call: LossCall, rows: Grouping) -> Reading:
    outputs, targets = call.arguments["input"], call.arguments["target"]
    _one_shape(call.name, outputs, targets)
    # Broadcast before the rows are put together: [K] goes with the last dimension of what the loss saw.
    weights = {
        key: rows(call.arguments[key].broadcast_to(outputs.shape))
        for key in ("weight", "pos_weight")
        if call.arguments.get(key) is not None
    }
    return Reading(Bernoulli(**weights), rows(outputs), rows(targets))


def _binary_cross_entropy_of_probabilities(call: LossCall, rows: Grouping) -> Reading:
    logits = call.arguments["logits"]
    if logits is None:
        raise UnreadLossError(
            f"training_step calls {call.name} on probabilities that are not the sigmoid of logits, or no longer "
            f"just that. Use F.binary_cross_entropy_with_logits on the logits, which is more exact as well. {WAY_OUT}"
        )
    reading = _binary_cross_entropy(replace(call, arguments={**call.arguments, "input": logits}), rows)
    # 1 - p has lost the digits that the logits still have, and PyTorch cuts logarithms off at -100.
    probabilities, targets, weight = (call.arguments[key] for key in ("input", "target", "weight"))
    total = F.binary_cross_entropy(probabilities.detach(), targets, weight, reduction="sum")
    return replace(reading, total=total.item())


def _mse(call: LossCall, rows: Grouping) -> Reading:
    outputs, targets = call.arguments["input"], call.arguments["target"]
    _one_shape(call.name, outputs, targets)
    if call.arguments.get("weight") is not None:  # an argument of newer PyTorch
        raise UnreadLossError(
            f"training_step calls {call.name} with weight=a tensor, which the likelihood does not express. Noise "
            f"that differs between examples is that of F.gaussian_nll_loss; or score the plain likelihood: {WAY_OUT}"
        )
    return Reading(Gaussian(), rows(outputs), rows(targets))


def _gaussian_nll(call: LossCall, rows: Grouping) -> Reading:
    names = ("input", "target", "var", "full", "eps")
    mean, targets, variance, in_full, eps = (call.arguments[name] for name in names)
    _one_shape(call.name, mean, targets)
    if not isinstance(variance, Tensor):
        variance = torch.full_like(mean, variance, requires_grad=False)
    elif variance.dim() < mean.dim():
        variance = variance.unsqueeze(-1)
    # A variance without a graph is noise that is known: its columns of the root then meet no parameter.
    both = [rows(part).reshape(len(rows(mean)), -1) for part in (mean, variance.expand_as(mean))]
    total = F.gaussian_nll_loss(mean.detach(), targets, variance.detach(), in_full, eps, "sum")
    return Reading(
        HeteroscedasticGaussian(eps),
        torch.cat(both, dim=1),
        rows(targets).reshape(both[0].shape),
        total.item() if in_full else None,
    )


READERS: dict[Callable[..., Any], Callable[[LossCall, Grouping], Reading]] = {
    F.cross_entropy: _cross_entropy,
    # On log-softmax outputs. Log-probabilities serve as logits: the softmax of them is itself.
    F.nll_loss: _cross_entropy,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
    F.binary_cross_entropy: _binary_cross_entropy_of_probabilities,
    F.mse_loss: _mse,
    F.gaussian_nll_loss: _gaussian_nll,
    # "batchmean" is the mean over examples; plain "mean" counts classes, and is a factor away.
    F.kl_div: _divergence,
}
"""Losses that can be read, as functions; their module forms end in them."""
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
"""Losses whose calls are noted."""
OF_NO_LIKELIHOOD = (
    F.cosine_embedding_loss,
    F.hinge_embedding_loss,
    F.margin_ranking_loss,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.triplet_margin_loss,
)
"""Losses of `KNOWN` that no density stands behind."""


def _one_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise ValueError(
            f"training_step calls {name} with outputs {list(outputs.shape)} and targets "
            f"{list(targets.shape)}: PyTorch broadcasts them against each other, which is hardly meant. Give "
            "both one shape, for instance by outputs.squeeze(-1)."
        )
