"""What a piece of advice was held against, as data, and what was measured for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_bayes.functional._validation import finite, fraction, positive

Verdict = Literal["safe", "unverified", "doubtful", "impossible"]
Status = Literal["ok", "fails", "not measured", "do"]

SOLUTION = "solution"
"""Name of the check that there is a solution at all."""


@dataclass(frozen=True)
class Check:
    """One thing that advice was held against, or one more thing that it asks for.

    Attributes:
        name: such as "batch_size", "stability", "warm_up"; the names are listed in docs/scaling.md.
        passed: True, False, or None where the number that decides was not measured. For an action, True
            where nothing is to be done.
        value: what was compared; None where there is no number.
        limit: what it was compared with; None where there is none, or it was not measured.
        sentence: the same in words.
        action: True for what is to be done with a move (warm-up, epochs, an average of the weights, ...), in
            place of a reason to doubt it.
    """

    name: str
    passed: bool | None
    value: float | None
    limit: float | None
    sentence: str
    action: bool = False

    @property
    def status(self) -> Status:
        """One word for a table: "ok", "fails", "not measured" or "do"."""
        if self.passed:
            return "ok"
        if self.action:
            return "do"
        return "not measured" if self.passed is None else "fails"


@dataclass(frozen=True)
class Measurements:
    """What was measured on the run beside its configuration; None where it was not.

    Attributes:
        gradient_noise_scale: B_simple = tr Σ/‖G‖² in examples, above 0; NaN where it was measured and not resolved.
        largest_eigenvalue: h of the Hessian of the mean loss; where it is not positive every step is stable.
        ema_decay: ρ in [0, 1) of an average of the weights, ρ a + (1 - ρ) ω at each step.

    Raises:
        ValueError: naming the argument that is outside its domain.
    """

    gradient_noise_scale: float | None = None
    largest_eigenvalue: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        noise = self.gradient_noise_scale
        if noise is not None and not (isinstance(noise, float) and math.isnan(noise)):
            positive("gradient_noise_scale", noise)
        if self.largest_eigenvalue is not None:
            finite("largest_eigenvalue", self.largest_eigenvalue)
        if self.ema_decay is not None:
            fraction("ema_decay", self.ema_decay)
