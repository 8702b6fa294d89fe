"""A run beside a known-good one: whether their noise differs, and which single change makes it the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from lightning_bayes.functional._validation import non_negative
from lightning_bayes.functional.configuration import (
    AdamConfiguration,
    AnyConfiguration,
    Configuration,
    NoSolutionError,
)
from lightning_bayes.functional.noise_scale import momentum_factor
from lightning_bayes.functional.scaling import square_root_rule

Quantity = Literal["learning_rate", "batch_size", "momentum", "dataset_size"]

TOLERANCE = 0.01
"""Relative difference of two noise scales beyond which they differ."""


@dataclass(frozen=True)
class Restoration:
    """One change of the present run that gives it the noise of the reference.

    Attributes:
        quantity: what changes: "learning_rate", "batch_size", "momentum" or "dataset_size".
        value: its new value. Batch and dataset sizes are not rounded.
        noise_scale: what it leads to where the value has to be whole, after rounding; else the reference's.
    """

    quantity: Quantity
    value: float
    noise_scale: float


@dataclass(frozen=True)
class Comparison:
    """The noise of a run beside that of a known-good one, as data.

    Attributes:
        present: the run's configuration.
        reference: the known-good one; None where only its noise scale is known.
        reference_noise_scale: g of the reference; ε/√B for Adam-like optimizers.
        restorations: the single changes, whichever solve.
        expected: for Adam, the reference carried to the present batch size by the square-root rule, betas and
            eps with it; None where there is none.
        name: the parameter groups that it is for.
        source: where the reference was read.
    """

    SAVED_TOO: ClassVar = ("differs", "summary")

    present: AnyConfiguration
    reference: AnyConfiguration | None
    reference_noise_scale: float
    restorations: tuple[Restoration, ...]
    expected: AdamConfiguration | None = None
    name: str = ""
    source: str = ""

    @property
    def ratio(self) -> float:
        """The present noise scale over the reference's; infinite where only the reference has none."""
        if self.reference_noise_scale == 0:
            return 1.0 if self.present.noise_scale == 0 else math.inf
        return self.present.noise_scale / self.reference_noise_scale

    @property
    def differs(self) -> bool:
        """Whether the noise scales differ by more than 1 %, or Adam's memory in examples does."""
        return abs(self.ratio - 1) > TOLERANCE or self.betas_differ

    @property
    def betas_differ(self) -> bool:
        """Whether some 1-β is more than 1 % off what the square-root rule makes of the reference's."""
        if self.expected is None or not isinstance(self.present, AdamConfiguration):
            return False
        betas, expected = self.present.betas, self.expected.betas
        return len(betas) != len(expected) or any(
            abs((1 - one) / (1 - other) - 1) > TOLERANCE for one, other in zip(betas, expected, strict=True)
        )

    @property
    def summary(self) -> str:
        """In one or two sentences: both noise scales, and every single change that makes them the same."""
        quantity = "lr/sqrt(B)" if isinstance(self.present, AdamConfiguration) else "The noise scale g"
        whose = f" of {self.name}" if self.name else ""
        where = f" ({self.source})" if self.source else ""
        here, there = f"{self.present.noise_scale:.5g}{whose}", f"{self.reference_noise_scale:.5g}"
        numbers = f"{here}, and {there} in the reference{where}"
        if not self.differs:
            return f"{quantity} is {numbers}: the same within {TOLERANCE:.0%}."
        return " ".join((f"{quantity} is {numbers}{self._times()}.", *self._remedies()))

    def _times(self) -> str:
        """How many times the reference's, where both have noise."""
        if self.reference_noise_scale == 0 or self.present.noise_scale == 0:
            return ", of which one has no noise" if self.ratio != 1 else ""
        return f": {self.ratio:.4g} times"

    def _remedies(self) -> Iterator[str]:
        if abs(self.ratio - 1) > TOLERANCE:
            changes = ", ".join(_phrase(change, self.reference_noise_scale) for change in self.restorations)
            yield (
                f"Any one of these changes restores it: {changes}."
                if changes
                else "No single change of learning rate, batch size, momentum or data restores it."
            )
        if self.betas_differ and self.expected is not None:
            betas = ", ".join(f"{beta:.6g}" for beta in self.expected.betas)
            yield (
                f"At this batch size the reference's betas become ({betas}), and its eps {self.expected.eps:.4g}"
                " (square-root rule)."
            )


def compare(
    present: AnyConfiguration,
    reference: AnyConfiguration | float,
    *,
    name: str = "",
    source: str = "",
) -> Comparison:
    """Whether a run has the noise of a known-good one, and which single change restores it.

    g = ε (N/B - 1) (1 - τ) / (1 - m), solved for each of ε, B, m and N with the others as they are:

    ε = g (1 - m) / ((N/B - 1)(1 - τ)),    B = N / (1 + g (1 - m) / (ε (1 - τ))),
    m = 1 - ε (N/B - 1)(1 - τ) / g,        N = B (1 + g (1 - m) / (ε (1 - τ)))

    For Adam-like optimizers ε/√B, solved for ε and for B, with betas by the square-root rule.

    Args:
        present: the run.
        reference: the known-good configuration; or its noise scale alone, of the kind that goes with `present`.
        name: copied into the comparison.
        source: copied into the comparison.

    Returns:
        The comparison.

    Raises:
        ValueError: for SGD beside an Adam-like optimizer, whose noise scales are no one quantity.

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5; for Adam Malladi et al., NeurIPS 2022,
        arXiv:2205.10287.
    """
    if isinstance(reference, AnyConfiguration):
        if type(reference) is not type(present):
            raise ValueError(
                f"Expected argument `reference` to be a {type(present).__name__}, as the present run is, but got"
                f" {reference}: the noise scales of SGD and of Adam-like optimizers are different quantities."
            )
        known, scale = reference, reference.noise_scale
    else:
        known, scale = None, non_negative("reference", reference)
    restorations = tuple(_restorations(present, scale))
    expected = None
    if isinstance(known, AdamConfiguration) and isinstance(present, AdamConfiguration):
        expected = _expected(known, present)
    return Comparison(present, known, scale, restorations, expected, name, source)


def _restorations(present: AnyConfiguration, scale: float) -> Iterator[Restoration]:
    """The single changes that lead to a noise scale."""
    if isinstance(present, Configuration):
        yield from _sgd_restorations(present, scale)
    elif scale > 0:
        yield Restoration("learning_rate", scale * math.sqrt(present.batch_size), scale)
        batch = (present.learning_rate / scale) * (present.learning_rate / scale)
        if 1 <= batch <= (present.dataset_size or math.inf):
            yield _rounded(present, batch)


def _sgd_restorations(present: Configuration, scale: float) -> Iterator[Restoration]:
    # Of the mean loss, as the noise scale is.
    rate, batch, examples = present.mean_learning_rate, present.batch_size, present.dataset_size
    factor = momentum_factor(present.momentum, present.dampening)
    ratio = (examples - batch) / batch
    if scale == 0:
        # Only the whole training set in every batch has no noise.
        yield Restoration("batch_size", examples, 0.0)
        return
    if ratio > 0:
        yield Restoration("learning_rate", scale / (ratio * factor) / present.summed_examples, scale)
    if rate == 0:
        return
    solved = examples / (1 + scale / (rate * factor))
    if present.reduction == "sum":  # the learning rate of the sum stays, that on the mean goes with the batch
        solved = examples - scale * present.averaged_batches / (present.learning_rate * factor)
    if solved >= 1:
        yield _rounded(present, solved)
    momentum = 1 - rate * ratio * (1 - present.dampening) / scale
    # Dampening acts in the momentum buffer only, and Nesterov's momentum is positive.
    if 0 < momentum < 1:
        yield Restoration("momentum", momentum, scale)
    solved = batch * (1 + scale / (rate * factor))
    # Rounded up: the batch still has to fit.
    whole = replace(present, dataset_size=math.ceil(solved - 1e-9))
    yield Restoration("dataset_size", solved, whole.noise_scale)


def _rounded(present: AnyConfiguration, batch_size: float) -> Restoration:
    whole = replace(present, batch_size=max(1, math.floor(batch_size + 0.5)))
    return Restoration("batch_size", batch_size, whole.noise_scale)


def _expected(reference: AdamConfiguration, present: AdamConfiguration) -> AdamConfiguration | None:
    if reference.learning_rate == 0:
        return None
    # eps is compared with the gradient, which a sum over b examples makes b times as large.
    known = replace(
        reference,
        eps=reference.eps / reference.summed_examples,
        dataset_size=None,
        reduction="mean",
        averaged_batches=1,
    )
    try:
        moved = square_root_rule(known, batch_size=present.batch_size)
    except NoSolutionError:
        return None  # outside the rule's domain no betas go with the batch
    return replace(
        moved,
        eps=moved.eps * present.summed_examples,
        reduction=present.reduction,
        averaged_batches=present.averaged_batches,
    )


def _phrase(change: Restoration, goal: float) -> str:
    name = change.quantity.replace("_", " ")
    if change.quantity not in ("batch_size", "dataset_size"):
        return f"{name} {change.value:.4g}"
    # As they were rounded.
    whole = math.floor(change.value + 0.5)
    if change.quantity == "dataset_size":
        whole = math.ceil(change.value - 1e-9)
    off = goal > 0 and abs(change.noise_scale / goal - 1) > TOLERANCE
    return f"{name} {max(1, whole)}" + (f" ({change.noise_scale:.4g})" if off else "")
