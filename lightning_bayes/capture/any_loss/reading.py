"""Reads any loss that is a sum over examples, by its graph: terms that are known, or its second derivative."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_bayes.capture.any_loss.cut import HowRead, Kind, UnreadableGraphError, curved_route
from lightning_bayes.capture.any_loss.densities import known_densities
from lightning_bayes.capture.any_loss.known_call import known_call
from lightning_bayes.capture.any_loss.step_run import LastSum, Route, StepRun, layouts_of, remark_weights
from lightning_bayes.capture.loss_calls import Reduction
from lightning_bayes.capture.pytorch_losses import WAY_OUT, GroupingOf, UnreadLossError
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.likelihoods.expansion import IndefiniteLossError

OTHERWISE = "Then leave LaplaceEvidence out of this run, or:"
DEPENDS = (
    "what an example counts in it depends on the others of its batch, as weights by the frequency of classes in a "
    "batch, targets that are standardised by it, or its hardest examples do. So it is no sum over examples."
)
CONVEX_NOWHERE = "The loss of training_step is a sum over examples, but no evidence can be made of it."
TOLERANCE = 1e-3
"""Relative difference up to which the gradients of an example in a batch and in a part of it are proportional."""


def read_by_graph(
    step: Callable[[], object],
    how: HowRead,
    given: Likelihood | None,
    grouping_of: GroupingOf,
    num_examples: int | None,
    part: Callable[[int | None], Callable[[], object]] | None,
) -> tuple[Tensor, Any, Likelihood, Tensor, Reduction, float]:
    """Outputs, targets, likelihood, unit loss, reduction and value of a loss that is a sum over examples.

    Raises:
        EvidenceUnavailableError: If it is not finite or not convex in the outputs, for these weights.
        ValueError: If it is no sum over examples that can be read.
    """
    try:
        run = StepRun.of(step, num_examples)
    except UnreadLossError as error:
        raise ValueError(f"{how.why} {error} {WAY_OUT}") from error
    if not bool(run.loss.isfinite()):
        raise EvidenceUnavailableError(f"The loss of training_step is {run.loss.item():g}.")
    try:
        route = _route(run, how, grouping_of)
        kind, normaliser = _normaliser(run, route, how, grouping_of, part)
        reduction: Reduction = "sum" if kind == "sum" else "mean"
        outputs, targets, likelihood = route.read(reduction, normaliser, how.factor or 1.0, given)
        if route.is_known:
            remark_weights(likelihood, route.rows)
    except UnreadableGraphError as error:
        raise ValueError(
            f"No evidence can be made of the loss of training_step: {error} {how.why} {OTHERWISE} {WAY_OUT}"
        ) from error
    except IndefiniteLossError as error:
        message = f"{CONVEX_NOWHERE} {error} {OTHERWISE} {WAY_OUT}"
        # What other batches have allowed is not to be had at these weights; else the loss is not of the kind.
        raise (ValueError if how.cut is None else EvidenceUnavailableError)(message) from error
    unit_loss = likelihood.unit_loss(outputs, targets)
    return outputs, targets, likelihood, unit_loss, reduction, run.loss.item()


def _route(run: StepRun, how: HowRead, grouping_of: GroupingOf) -> Route:
    route = known_call(run, grouping_of) or known_densities(run, layouts_of(run))
    return route or curved_route(run, how)


def _normaliser(
    run: StepRun,
    route: Route,
    how: HowRead,
    grouping_of: GroupingOf,
    part: Callable[[int | None], Callable[[], object]] | None,
) -> tuple[Kind, float]:
    """How the loss is reduced, and what a term of weight 1 counts in it."""
    last, number = run.last_sum(), len(route.rows)
    per_term = route.per_term
    if per_term is None and last is not None:
        per_term = last.per_entry
    if how.kind is None:
        kind = _kind_by_parts(run, route, how, grouping_of, part)
        if kind is None:  # of a batch that cannot be parted: a sum, where nothing is divided by
            kind = "sum" if per_term is not None and math.isclose(per_term, 1.0, rel_tol=1e-6) else "mean"
        if number > 1:
            how.kind = kind
    else:
        kind = how.kind
    if per_term is None:
        per_term = 1.0 if kind == "sum" else 1.0 / number
    elif kind != "sum" and route.per_term is None and math.isclose(per_term, 1.0, rel_tol=1e-6):
        # Weights that add up to 1 in each batch: the mean weight of what counts is 1.
        counted = route.rows[route.rows != 0].abs()
        per_term = counted.double().mean().item() if route.is_known and len(counted) else 1.0 / number
    if route.is_known and route.per_term is None:
        per_term = how.term(route.rows, per_term, number)
    if not per_term > 0.0:
        raise EvidenceUnavailableError("No target counts: the loss ignores them all.")
    if not route.is_known and how.factor is None:
        _settle_factor(how, kind, per_term, last, number)
    return kind, per_term


def _settle_factor(how: HowRead, kind: Kind, per_term: float, last: LastSum | None, number: int) -> None:
    """What a loss that is no likelihood's is a multiple of its terms by, which belongs to it."""
    factor = 1.0 if kind == "weighted mean" else per_term
    if kind == "mean":
        of_entries = last is not None and (last.is_mean or math.isclose(per_term * last.number, 1.0))
        factor = per_term * (last.number if of_entries and last is not None else number)
    how.factor = factor


def _kind_by_parts(
    run: StepRun,
    route: Route,
    how: HowRead,
    grouping_of: GroupingOf,
    part: Callable[[int | None], Callable[[], object]] | None,
) -> Kind | None:
    """By what two thirds of the examples count alone: as much as in the batch, or as often as there are more.

    Returns:
        None if that does not tell.
    """
    number = run.num_examples
    if part is None or number is None or number < 2 or len(route.rows) != number:
        return None
    few = max(1, 2 * number // 3)
    try:
        with torch.random.fork_rng(devices=[]):
            other = _route(StepRun.of(part(few), few), how, grouping_of)
    except Exception:  # somebody's step need not take part of a batch: anything may come, and nothing is told
        return None
    whole, alone = route.rows[:few].double(), other.rows.double()
    if whole.shape != alone.shape or not bool(whole.any() or alone.any()):
        return None
    ratio = ((whole * alone).sum() / whole.square().sum()).item() if bool(whole.any()) else 0.0
    if (alone - ratio * whole).norm() > TOLERANCE * alone.norm():
        with torch.random.fork_rng(devices=[]):
            again = _route(StepRun.of(part(None), number), how, grouping_of).rows
        if torch.equal(again, route.rows):  # else it is random numbers that differ
            raise UnreadableGraphError(DEPENDS)
        return None
    if math.isclose(ratio, 1.0, rel_tol=TOLERANCE):
        return "sum"
    return "mean" if math.isclose(ratio, number / few, rel_tol=TOLERANCE) else "weighted mean"
