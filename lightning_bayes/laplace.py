"""The Laplace log-evidence of any module on any training set, without a Trainer."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bayes.curvature.base import Curvature, Problem, accumulation_dtype
from lightning_bayes.curvature.data import Examples, examples_from_loader, examples_from_tensors
from lightning_bayes.curvature.errors import EvidenceUnavailableError, check_finite
from lightning_bayes.curvature.gram import kept_widths
from lightning_bayes.curvature.isolation import isolated, throw_away_copy
from lightning_bayes.curvature.likelihoods import Likelihood, resolve_likelihood
from lightning_bayes.curvature.priors import Prior, fixed_prior, require_prior_precision
from lightning_bayes.curvature.reader import RowReader
from lightning_bayes.curvature.rows import RowBlock
from lightning_bayes.curvature.structures import STRUCTURES, choose_structure
from lightning_bayes.evidence import Evidence
from lightning_bayes.functional import evidence as terms
from lightning_bayes.functional._validation import count, positive

__all__ = ["accumulate_evidence", "check_options", "laplace_evidence", "problem_of"]

Forward = Callable[[], tuple[Tensor, Tensor]]


def laplace_evidence(
    model: nn.Module,
    data: "DataLoader[Any] | tuple[Tensor, Tensor]",
    *,
    likelihood: str | Likelihood = "classification",
    structure: str = "auto",
    subset_of_weights: str | list[str] = "all",
    curvature: str = "ggn",
    prior_precision: float | Mapping[str, float] | str = 1.0,
    backend: str = "auto",
    batch_size: int | None = None,
    max_examples: int | None = None,
    tolerance: float | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Evidence:
    """Laplace log-evidence of a network at its present weights, from its training data alone.

    ln P(y|x; M) ≈ ln P(y|ω, x) − ½ Σ λ ω² − ½ ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²), G the generalized Gauss-Newton
    matrix of the summed negative log-likelihood (Smith & Le, ICLR 2018, arXiv:1710.06451, eq. 9).

    Args:
        model: Maps a batch of inputs to logits or means, [N, C] or [N]. It is copied and left as it was:
            mode, gradients, hooks, buffers, random state.
        data: The training set: a DataLoader of (inputs, targets), read unshuffled and whole, or the two
            tensors.
        likelihood: "classification" (C logits), "binary" (one logit per output), "regression" (means), or a
            `Likelihood` such as `Gaussian(sigma=0.1)`.
        structure: "full" (exact), "blocks" (bounds, in time linear in N), "kron", "diag"; "auto" takes the first
            of "full", "blocks" and "kron" within the memory and time stated in `curvature.structures`.
        subset_of_weights: "all"; anything else is not supported yet. Freeze parameters to leave them out.
        curvature: "ggn"; "hessian" is not supported yet.
        prior_precision: λ of the Gaussian prior, one number or a mapping from parameter-name patterns
            (`"*.bias"`) to numbers, 0 for parameters to hold fixed. "optimize" is not supported yet.
        backend: "auto" or "backpack"; "autograd" is not supported yet.
        batch_size: Examples at a time; None for the loader's own (at least 32), or 256 for tensors.
        max_examples: A random subset of this size, the same at every call; N is then its size.
        tolerance: Width in nats of the bracket `lower` .. `upper` that "full" may answer with; None for exact.
        device: Where to compute; None for the model's own device.
        progress: Whether to show a progress bar.

    Returns:
        An `Evidence`; every value in nats, summed over the examples.

    Raises:
        ValueError: If an argument, the data or the network cannot be used; the message names the remedy.
        EvidenceUnavailableError: (a ValueError) If weights or outputs are not finite.

    Example:
        >>> evidence = laplace_evidence(model, (x, y), prior_precision=1.0)  # doctest: +SKIP
        >>> print(evidence)  # doctest: +SKIP
    """
    check_options(structure, subset_of_weights, curvature, backend, batch_size, max_examples, tolerance)
    require_prior_precision(prior_precision)
    if not isinstance(model, nn.Module):
        raise ValueError(f"Expected argument `model` to be a torch.nn.Module, got {type(model).__name__}.")
    resolved = resolve_likelihood(likelihood)
    place = _device(device)
    prior = fixed_prior(model, prior_precision)  # type: ignore[arg-type]
    with isolated(data):
        examples = _examples(data, batch_size, max_examples)
        network = throw_away_copy(model)
        if place is not None:
            network.to(place)
        where = next(network.parameters()).device
        forwards = (_forward(network, batch, where) for batch in _tracked(examples, progress))
        return accumulate_evidence(
            network, forwards, resolved, prior, structure, examples.num_examples, tolerance=tolerance
        )


def accumulate_evidence(
    network: nn.Module,
    forwards: Iterable[Forward],
    likelihood: Likelihood,
    prior: Prior,
    structure: str,
    num_examples: int,
    loss_scale: Callable[[float, float], float] = lambda terms_per_example, dispersion: 1.0,
    tolerance: float | None = None,
) -> Evidence:
    """One pass over the data: rows into a structure, a structure into the evidence.

    Args:
        network: A throw-away copy in eval mode.
        forwards: One callable a batch, which runs the network and returns its outputs and the targets.
        likelihood: Of the targets given the outputs.
        prior: Of the parameters of `network`, by name.
        structure: "auto" or a key of `STRUCTURES`.
        num_examples: Examples to expect, for the choice of a structure; the evidence counts those it sees.
        loss_scale: From the loss's terms per example and the dispersion to s of `Prior.precision`.
        tolerance: Width in nats of the bracket that is accepted; None for exact.
    """
    start = time.perf_counter()
    reader = RowReader(network, prior.strengths)
    for name, parameter in reader.parameters.items():
        check_finite(parameter.detach(), f"the parameter {name!r}")
    totals = _read_all(reader, forwards, likelihood, structure, num_examples, tolerance, prior.strengths)
    seen = totals.num_examples
    dispersion = likelihood.estimate_dispersion(totals.unit_loss, totals.num_terms)
    precision = prior.precision(seen, loss_scale(totals.num_terms / seen, dispersion))
    weights = {name: parameter.detach() for name, parameter in reader.parameters.items()}
    # In units of the dispersion φ the curvature is that of the unit loss and the prior is φλ.
    scaled = {name: dispersion * value for name, value in precision.items()}
    slope = {name: totals.gradient[name] + scaled[name] * weight for name, weight in weights.items()}
    summary = totals.curved.at(scaled, slope)
    log_likelihood = likelihood.log_likelihood(totals.unit_loss, dispersion, totals.num_terms)
    if not all(map(math.isfinite, (log_likelihood, summary.log_det, summary.quadratic))):
        raise EvidenceUnavailableError(
            f"The evidence overflows: log-likelihood {log_likelihood:g}, log-determinant {summary.log_det:g}, "
            f"squared Newton step {summary.quadratic:g}."
        )
    penalty = sum(
        terms.weight_penalty(weight.to(accumulation_dtype(weight.device)), precision[name]).item()
        for name, weight in weights.items()
    )
    occam = terms.log_occam_factor(summary.log_det)
    value = terms.log_evidence(log_likelihood, penalty, occam)
    distinct = set(precision.values())
    return Evidence(
        log_evidence=value,
        lower=terms.log_evidence(log_likelihood, penalty, terms.log_occam_factor(summary.bounds[1])),
        upper=terms.log_evidence(log_likelihood, penalty, terms.log_occam_factor(summary.bounds[0])),
        log_evidence_ratio=None if totals.null_loss is None else value + totals.null_loss,
        log_likelihood=log_likelihood,
        weight_penalty=penalty,
        log_occam_factor=occam,
        effective_parameters=summary.effective_parameters,
        newton_decrement=0.5 * summary.quadratic / dispersion,
        prior_precision=distinct.pop() if len(distinct) == 1 else precision,
        num_examples=seen,
        num_parameters=totals.curved.problem.num_parameters,
        structure=totals.structure,
        curvature="ggn",
        seconds=time.perf_counter() - start,
        effective_parameters_stderr=summary.effective_parameters_stderr,
        noise_variance=dispersion if likelihood.name == "regression" else None,
        fixed_parameters=tuple(name for name, _ in network.named_parameters() if name not in precision),
    )


@dataclass(frozen=True)
class _Totals:
    """What one pass over the data adds up to, in units of the dispersion."""

    curved: Curvature
    structure: str
    gradient: dict[str, Tensor]
    unit_loss: float
    null_loss: float | None
    num_examples: int
    num_terms: float


def _read_all(
    reader: RowReader,
    forwards: Iterable[Forward],
    likelihood: Likelihood,
    structure: str,
    num_examples: int,
    tolerance: float | None,
    strengths: Mapping[str, float],
) -> _Totals:
    curved = None
    seen, unit_loss, num_terms = 0, 0.0, 0.0
    null_loss: float | None = 0.0
    gradient = {name: torch.zeros_like(parameter) for name, parameter in reader.parameters.items()}
    for forward in forwards:
        batch = reader.read(forward, likelihood)
        for block in batch.blocks:
            if curved is None:
                problem = problem_of(reader, block, num_examples, tolerance, strengths)
                structure, _ = choose_structure(structure, problem)
                curved = STRUCTURES[structure](problem)
            curved.update(block)
        seen += batch.num_examples
        unit_loss += batch.unit_loss
        num_terms += batch.num_terms
        null_loss = None if null_loss is None or batch.null_loss is None else null_loss + batch.null_loss
        for name, part in batch.gradient.items():
            gradient[name] += part
    if curved is None:
        raise ValueError("The training data are empty: there is nothing to take the evidence of.")
    return _Totals(curved, structure, gradient, unit_loss, null_loss, seen, num_terms)


def check_options(
    structure: object,
    subset_of_weights: object,
    curvature: object,
    backend: object,
    batch_size: object,
    max_examples: object,
    tolerance: object,
) -> None:
    """Check the options that `laplace_evidence` and `LaplaceEvidence` share.

    Raises:
        ValueError: Naming the argument, what was got, and the remedy.
    """
    _one_of("structure", structure, ("auto", *STRUCTURES))
    _one_of("subset_of_weights", subset_of_weights, ("all",), "Freeze parameters to leave them out.")
    _one_of("curvature", curvature, ("ggn",), "The Hessian is not supported yet.")
    _one_of("backend", backend, ("auto", "backpack"), "torch.func is not supported yet.")
    for name, value in (("batch_size", batch_size), ("max_examples", max_examples)):
        if value is not None:
            count(name, value)
    if tolerance is not None:
        positive("tolerance", tolerance)


def _one_of(name: str, value: object, choices: tuple[str, ...], remark: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected argument `{name}` to be {listed}, got {value!r}. {remark}".rstrip())


def _examples(data: object, batch_size: int | None, max_examples: int | None) -> Examples:
    if isinstance(data, DataLoader):
        return examples_from_loader(data, batch_size, max_examples)
    if isinstance(data, tuple | list):
        return examples_from_tensors(data, batch_size, max_examples)
    raise ValueError(
        "Expected argument `data` to be a DataLoader or a tuple of tensors (inputs, targets), got "
        f"{type(data).__name__}."
    )


def _device(device: object) -> torch.device | None:
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)  # type: ignore[call-overload, no-any-return]
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"Expected argument `device` to be a torch.device, its name or None, got {device!r}."
        ) from error


def _tracked(examples: Examples, progress: bool) -> Iterable[Any]:
    if not progress:
        return examples.read()
    from rich.progress import track  # noqa: PLC0415 - only for the progress bar

    return track(examples.read(), description="evidence", total=examples.num_batches)


def _forward(network: nn.Module, batch: Any, device: torch.device) -> Forward:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise ValueError(
            f"Expected the DataLoader to yield (inputs, targets), got {type(batch).__name__}. For other "
            "batches use the LaplaceEvidence callback, which lets training_step take them apart."
        )
    inputs, targets = batch
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"Expected the DataLoader's inputs to be one tensor, got {type(inputs).__name__}. For other inputs "
            "use the LaplaceEvidence callback, which lets training_step take them apart."
        )
    if inputs.dtype in (torch.float16, torch.bfloat16):  # the copy of a half-precision model is float32
        inputs = inputs.to(next(network.parameters()).dtype)
    return lambda: (network(inputs.to(device)), targets.to(device))


def problem_of(
    reader: RowReader,
    block: RowBlock,
    num_examples: int,
    tolerance: float | None = None,
    strengths: Mapping[str, float] | None = None,
) -> Problem:
    """Sizes of an evidence, for the choice of a structure, from the rows of its first batch."""
    first = next(iter(reader.parameters.values()))
    kept_width, gram_width = kept_widths(block)
    return Problem(
        shapes={name: parameter.shape for name, parameter in reader.parameters.items()},
        num_examples=num_examples,
        rank=block.num_columns,
        batch_size=block.num_examples,
        kept_width=kept_width,
        gram_width=gram_width,
        dtype=first.dtype,
        device=first.device,
        tolerance=tolerance,
        strengths=strengths,
    )
