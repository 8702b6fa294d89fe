"""One call of a loss of PyTorch's that is read as it is written, in a larger loss: Σᵢ cᵢ tᵢ of its terms t."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.capture.any_loss.step_run import Read, Route, StepRun, reduced
from lightning_bayes.capture.loss_calls import Reduction, overridden, reduction_of_call
from lightning_bayes.capture.pytorch_losses import READERS, GroupingOf, LossCall, Reading, UnreadLossError
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.likelihoods.bernoulli import BinaryTargets
from lightning_bayes.likelihoods.categorical import ClassTargets


@dataclass
class KnownCall(Route):
    """One call of a loss in `READERS`, whose terms the loss adds up with weights."""

    call: LossCall = field(kw_only=True)
    reading: Reading = field(kw_only=True)
    weights: Tensor | None = field(kw_only=True)
    """Coefficients of the terms, in the rows of the outputs; None where the call has reduced them."""

    @override
    def read(self, reduction: Reduction, normaliser: float, factor: float, given: Likelihood | None) -> Read:
        likelihood = self.reading.likelihood
        if given is not None:
            likelihood = overridden(self.call.name, likelihood, given)
        outputs, targets = likelihood.prepare(self.reading.outputs, self.reading.targets)
        likelihood, num_terms = reduced(likelihood, reduction, normaliser)
        if self.weights is None:
            plain = likelihood.num_terms(outputs.detach(), targets)
            if math.isclose(plain, num_terms, rel_tol=1e-6) or reduction == "sum":
                return outputs, targets, likelihood
            weights = torch.ones(_terms_shape(targets), dtype=outputs.dtype, device=outputs.device)
        else:
            weights = self.weights / normaliser
        return outputs, likelihood.weighted(targets, weights, num_terms), likelihood


def _terms_shape(targets: Any) -> torch.Size:
    """The shape of the weights that prepared targets take."""
    if isinstance(targets, ClassTargets):
        return targets.total.shape
    shape: torch.Size = targets.positive.shape if isinstance(targets, BinaryTargets) else targets.shape
    return shape


def known_call(run: StepRun, grouping_of: GroupingOf) -> Route | None:
    """The route of a loss made of one call in `READERS`, None if it is not."""
    calls = [call for call in run.calls if call.function in READERS and run.separates([call.result])]
    if not calls or calls[0].arguments["target"].requires_grad:
        return None
    call = calls[0]
    coefficients = run.coefficients([call.result])
    if coefficients is None or bool((coefficients[0] < 0).any()):
        return None
    (each,) = coefficients
    try:
        grouping = grouping_of(run.num_examples, call.arguments["input"])
        reading = READERS[call.function](call, grouping)
        outputs, targets = reading.likelihood.prepare(reading.outputs, reading.targets)
        unit_loss = reading.likelihood.unit_loss(outputs.detach(), targets).item()
        num_terms = reading.likelihood.num_terms(outputs.detach(), targets)
        total = call.result.detach().double().sum().item()
        own = reduction_of_call(call, reading, outputs.detach(), num_terms, unit_loss, total)
    except UnreadLossError:
        return None
    if call.result.numel() > 1:
        weights = grouping(each)
        return KnownCall(weights.reshape(len(weights), -1), call=call, reading=reading, weights=weights)
    per_term = each.item() / num_terms if own == "mean" and num_terms else each.item()
    rows = each.new_full((len(outputs), 1), per_term)
    return KnownCall(rows, per_term, call=call, reading=reading, weights=None)
