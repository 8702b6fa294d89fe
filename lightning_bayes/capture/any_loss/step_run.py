"""One run of a training_step with all that was seen of it, and what every way to read its loss has in common."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_bayes.capture.any_loss.distributions import noted_log_probs
from lightning_bayes.capture.any_loss.loss_graph import LossGraph, Results
from lightning_bayes.capture.any_loss.second_derivative import Derivatives, Outputs
from lightning_bayes.capture.autograd_graph import graph_nodes
from lightning_bayes.capture.example_layout import Layout, layout_in
from lightning_bayes.capture.loss_calls import LossCalls, Reduction, loss_of
from lightning_bayes.capture.pytorch_losses import LossCall, UnreadLossError
from lightning_bayes.likelihoods import Likelihood

CONSTANT = 1e4
"""Relative differences, in units of rounding, of coefficients that are one."""
OF_EXAMPLES = (
    "Weights of examples or targets multiply their log-densities: their weighted sum is scored, as if each were "
    "so many observations"
)
Read = tuple[Tensor, Any, Likelihood]
"""Outputs, targets and likelihood."""


@dataclass(frozen=True)
class StepRun:
    """One run of a training_step with all that was seen of it.

    Attributes:
        loss: A scalar, what was returned.
        num_examples: N of the batch, None where it does not say.
    """

    loss: Tensor
    graph: LossGraph
    results: Results
    calls: Sequence[LossCall]
    log_probs: Sequence[tuple[Any, Tensor]]
    num_examples: int | None

    @classmethod
    def of(cls, step: Callable[[], object], num_examples: int | None) -> "StepRun":
        """Run a training_step."""
        with Results() as results, LossCalls() as recorder, noted_log_probs() as log_probs:
            loss = loss_of(step()).reshape(())
        if loss.grad_fn is None:
            raise UnreadLossError("The loss of training_step has no graph.")
        nodes = set(graph_nodes([loss]))
        return cls(
            loss,
            LossGraph(loss),
            results,
            [call for call in recorder.calls if call.result.grad_fn in nodes],
            [(its, result) for its, result in log_probs if result.grad_fn in nodes],
            num_examples,
        )

    def separates(self, tensors: Sequence[Tensor]) -> bool:
        """Whether every parameter reaches the loss through these tensors, of which none is made from another."""
        return self.graph.separates({self.graph.edge(tensor) for tensor in tensors})

    def coefficients(self, terms: Sequence[Tensor]) -> list[Tensor] | None:
        """The gradient of the loss in terms that it is affine in; None if it is not."""
        derivatives = Derivatives(self.loss, terms)
        return derivatives.gradient if derivatives.is_zero() else None

    def last_sum(self) -> "LastSum | None":
        """What each entry of what the loss is the sum or mean of counts; None if not seen, or not alike."""
        scalars = {
            self.graph.edge(call.result): call
            for call in self.calls
            if call.result.numel() == 1 and isinstance(call.arguments.get("target"), Tensor)
        }
        is_mean, last, total = False, None, 0.0
        for cut in self.graph.dominators(self.graph.root):
            is_mean |= type(cut[0][0]).__name__.startswith("MeanBackward")
            tensor = self.results.tensor(cut[0]) if len(cut) == 1 else None
            call = scalars.get(cut[0])
            if tensor is None or (tensor.numel() == 1 and call is None):
                continue
            (each,) = torch.autograd.grad(self.loss, [tensor], retain_graph=True)
            if not is_constant(each):
                return last
            per_entry, number = abs(each.flatten()[0].item()), tensor.numel()
            if call is not None:
                number = call.arguments["target"].numel()
                is_mean = call.arguments.get("reduction", "mean") == "mean"
                return LastSum(per_entry / number if is_mean else per_entry, number, is_mean)
            total = total or per_entry * number
            if last is None:
                last = LastSum(per_entry, number, is_mean)
            elif math.isclose(per_entry * number, total, rel_tol=1e-6):  # a mean of means is one of all
                last = replace(last, number=number, is_mean=is_mean)
        return last


@dataclass(frozen=True)
class LastSum:
    """The last step of a loss, a sum or a mean of numbers that count alike.

    Attributes:
        per_entry: What one of them counts.
        number: Of them; where they are means, of all that they are the means of.
        is_mean: Whether a mean was taken.
    """

    per_entry: float
    number: int
    is_mean: bool


@dataclass
class Route:
    """One way to read a loss, before it is known how it is reduced.

    Attributes:
        rows: What the examples of the batch count in the loss, [N, ...]: coefficients, or gradients.
        per_term: The coefficient of one term of weight 1, None where only the last sum tells.
        is_known: Whether the terms are a likelihood's: then `rows` are coefficients, and a factor is no part of it.
    """

    rows: Tensor
    per_term: float | None = None
    is_known: bool = True

    def read(self, reduction: Reduction, normaliser: float, factor: float, given: Likelihood | None) -> Read:
        """Outputs, targets and likelihood, where a term of weight 1 counts `normaliser` in the loss."""
        raise NotImplementedError


def reduced(likelihood: Likelihood, reduction: Reduction, normaliser: float) -> tuple[Likelihood, float]:
    """A likelihood for a loss in which a term of weight 1 counts `normaliser`, and what the loss divides by."""
    likelihood = copy.copy(likelihood)
    if reduction == "sum":
        likelihood.torch_terms = normaliser * likelihood.torch_terms
    return likelihood, 1.0 / normaliser


def outputs_of(
    run: StepRun, tensors: Sequence[Tensor], layouts: Callable[[int, Tensor], Layout | None]
) -> Outputs | None:
    """Tensors as outputs of examples, None if one of them has no row for each."""
    number = run.num_examples or (len(tensors[0]) if tensors[0].dim() else 1)
    known = [layouts(index, tensor) for index, tensor in enumerate(tensors)]
    if any(layout is None or not layout.fits(t, number) for layout, t in zip(known, tensors, strict=True)):
        return None
    return Outputs(tensors, [layout for layout in known if layout is not None], number)


def layouts_of(run: StepRun) -> Callable[[int, Tensor], Layout | None]:
    """Finds where the examples of a run stand in a tensor."""
    return lambda index, tensor: layout_in(tensor, run.num_examples or (len(tensor) if tensor.dim() else 1))


def is_constant(each: Tensor) -> bool:
    """Whether all entries are one number, but for rounding."""
    first = each.flatten()[0]
    return bool(
        ((each - first).abs() <= CONSTANT * torch.finfo(each.dtype).eps * first.abs()).all()
    ) and bool(first != 0)


def remark_weights(likelihood: Likelihood, weights: Tensor) -> None:
    """Let a likelihood say so where some terms count more than others, and not just not at all."""
    counted = weights[weights != 0]
    if len(counted) and not is_constant(counted):
        likelihood.note = likelihood.note or OF_EXAMPLES
