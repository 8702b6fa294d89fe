"""The result: a number, its parts, and what is known of its errors."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from scipy.special import ndtri, stdtrit

MOST_PRIOR_LINES = 6
"""Lines about the prior that one screen has room for."""


@dataclass(frozen=True)
class Evidence:
    """Laplace log-evidence of a network at given weights, on its training data alone.

    Everything is in nats and summed over the `num_examples` examples. For the equations see
    `lightning_bayes.functional.evidence`; Smith & Le, ICLR 2018 (arXiv:1710.06451), eqs. 9-10.

    Attributes:
        log_evidence: log_likelihood − weight_penalty + log_occam_factor.
        lower: Certified lower bound of the log-evidence with the whole curvature matrix, −∞ if none is known; an
            estimate of one where `lower_stderr` is not 0.
        upper: Certified upper bound; equal to `lower` when the structure is exact.
        log_evidence_ratio: log_evidence minus that of guessing; above 0 the data believe the model rather
            than chance. None for regression, where there is no guess to compare with.
        log_likelihood: ln P(y | ω, x).
        weight_penalty: ½ Σ λ ω² over the parameters that carry a prior.
        log_occam_factor: −½ ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²), at most 0.
        effective_parameters: γ = tr G(G + Λ)⁻¹, the parameters that the data determine; of "blocks" an
            estimate, the derivative of twice the log Occam factor in ln λ.
        newton_decrement: ½ ∇Cᵀ(G + Λ)⁻¹∇C, what one Newton step would take off the cost. The Laplace
            approximation is about a minimum; see `at_minimum`.
        prior_precision: λ, or one for each parameter where they differ.
        num_examples: N.
        num_parameters: p, the parameters that carry a prior.
        structure: "full", "lanczos", "blocks", "kron", "kron_joint", "kron_expand" or "diag".
        curvature: "ggn", "hessian" or "hessian_positive" (the eigenvalues λᵢ ≥ λ of the cost's Hessian alone).
        seconds: What it took.
        effective_parameters_stderr: Standard error of `effective_parameters`; 0 where it is exact.
        noise_variance: σ² of a Gaussian likelihood, given or estimated; None otherwise.
        fixed_parameters: Parameters held at their values: without a proper prior, frozen, or outside the
            subset of weights.
        log_evidence_stderr: Standard error from sampling of the number that the structure gives, where columns or
            blocks are sampled, else 0; infinite where the sample does not tell. How far that number is from the
            evidence of the whole matrix it does not say: `lower` and `upper` do, where they are finite.
        prior_optimized: Whether `prior_precision` holds a λ that maximises the log-evidence at these weights.
        num_eigenvalues_below_prior: Eigenvalues λᵢ of the cost's true Hessian below λ, that is, negative ones
            of the likelihood's; None for the GGN, which has none. (Where parameters differ in λ, of the
            Hessian in units of the prior.)
        num_negative_eigenvalues: Those at or below 0; above 0 there is no minimum.
        num_samples: Columns of the loss Hessian's root that were sampled, None for all.
        num_blocks: Batches whose rows were read for "blocks", None for all. The log-likelihood, the weight penalty
            and the gradient are those of all examples all the same.
        lower_stderr: Standard error of `lower`; above 0 it is an estimate from sampled blocks and no certificate.
        subset_of_weights: As it was asked for.
        log_evidence_best_prior: The log-evidence, by the same structure, at the one λ for all parameters that
            maximises it at these weights and this noise: the number to compare runs of different weight decay by.
            None where it would cost too much, or there is no such λ.
        best_prior_precision: That λ.
        log_evidence_dof: Degrees of freedom of `log_evidence_stderr`, infinite where it is as good as certain.
        samples: The log-evidence by each random vector of "lanczos", of which `log_evidence` is the mean.
        newton_decrement_error: What `newton_decrement` may be too small by at most; 0 where it is exact.
        note: What is scored, where that is not the plain likelihood of the targets; a sentence, or None.
    """

    log_evidence: float
    lower: float
    upper: float
    log_evidence_ratio: float | None
    log_likelihood: float
    weight_penalty: float
    log_occam_factor: float
    effective_parameters: float
    newton_decrement: float
    prior_precision: float | Mapping[str, float]
    num_examples: int
    num_parameters: int
    structure: str
    curvature: str
    seconds: float
    effective_parameters_stderr: float = 0.0
    noise_variance: float | None = None
    fixed_parameters: tuple[str, ...] = ()
    log_evidence_stderr: float = 0.0
    prior_optimized: bool = False
    num_eigenvalues_below_prior: int | None = None
    num_negative_eigenvalues: int | None = None
    num_samples: int | None = None
    subset_of_weights: str | tuple[str, ...] = "all"
    num_blocks: int | None = None
    lower_stderr: float = 0.0
    log_evidence_best_prior: float | None = None
    best_prior_precision: float | None = None
    log_evidence_dof: float = math.inf
    newton_decrement_error: float = 0.0
    samples: tuple[float, ...] = field(default=(), repr=False)
    note: str | None = None

    def above(self, other: "Evidence") -> tuple[float, float]:
        """By how much this log-evidence is above another one, and the standard error of that.

        Two evaluations by "lanczos" take the same random vectors, at every prior and epoch, so that their difference
        is surer than either: that of the vectors which both have taken. By the spread of the vectors' own
        differences: few of them, so allow for Student's t.
        """
        paired = [mine - its for mine, its in zip(self.samples, other.samples, strict=False)]
        if len(paired) < 2:
            difference = self.log_evidence - other.log_evidence
            return difference, math.hypot(self.log_evidence_stderr, other.log_evidence_stderr)
        return statistics.fmean(paired), statistics.stdev(paired) / len(paired) ** 0.5

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of `log_evidence`, as far as its standard error from sampling goes.

        By Student's t with `log_evidence_dof` degrees of freedom. Of "lanczos" it is one of the exact log-evidence.
        """
        if not math.isfinite(self.log_evidence_stderr):
            return -math.inf, math.inf
        reach = self.log_evidence_stderr * _quantile(self.log_evidence_dof)
        return self.log_evidence - reach, self.log_evidence + reach

    @property
    def at_minimum(self) -> bool:
        """Whether the cost is at a minimum, as far as is known.

        The Newton decrement is at most 1 nat or 1 % of the log-evidence (ratio), and no eigenvalue of the
        true Hessian, where it was computed, is negative.
        """
        reference = self.log_evidence if self.log_evidence_ratio is None else self.log_evidence_ratio
        most = self.newton_decrement + self.newton_decrement_error
        return not self.num_negative_eigenvalues and most <= max(1.0, 0.01 * abs(reference))

    @property
    def status(self) -> str:
        """What the Laplace expansion stands on: "at a minimum", "not at a minimum" or "negative curvature"."""
        if self.num_negative_eigenvalues:
            return "negative curvature"
        return "at a minimum" if self.at_minimum else "not at a minimum"

    def __str__(self) -> str:
        """One screen, in columns."""
        rows = [
            ("log-evidence", self.log_evidence, self._spread()),
            ("  log-likelihood", self.log_likelihood, ""),
            ("  - weight penalty", self.weight_penalty, ""),
            ("  + log Occam factor", self.log_occam_factor, self._matrix()),
        ]
        if self.log_evidence_ratio is not None:
            rows.append(("log-evidence ratio", self.log_evidence_ratio, self._verdict()))
        stderr = self.effective_parameters_stderr
        spread = f"± {stderr:.2g} of {self.num_parameters:,}" if stderr else f"of {self.num_parameters:,}"
        rows.append(("effective parameters", self.effective_parameters, spread))
        doubt = self.status if self.at_minimum else f"{self.status.upper()}: the expansion is in doubt"
        if self.newton_decrement_error > 0.01 * self.newton_decrement:
            doubt = f"and at most {self.newton_decrement + self.newton_decrement_error:,.4g}; {doubt}"
        rows.append(("Newton decrement", self.newton_decrement, doubt))
        if self.log_evidence_best_prior is not None and not self.prior_optimized:
            remark = (
                f"log-evidence at λ = {self.best_prior_precision:.4g} for all, the largest at these weights"
            )
            rows.append(("best prior", self.log_evidence_best_prior, remark))
        if self.noise_variance is not None:
            rows.append(("noise variance", self.noise_variance, ""))
        lines = [
            f"Laplace evidence of {self.num_examples:,} examples, nats ({self.structure} {self.curvature})"
        ]
        lines += [f"{name:<22}{value:>16,.4f}  {remark}".rstrip() for name, value, remark in rows]
        lines += [*self._eigenvalue_lines(), *self._prior_lines()]
        if self.subset_of_weights != "all":
            subset = self.subset_of_weights
            lines.append(
                f"{'subset of weights':<22}{subset if isinstance(subset, str) else _shorten(subset)}"
            )
        if self.fixed_parameters:
            lines.append(f"{'held fixed':<22}{_shorten(self.fixed_parameters)}")
        lines.append(f"{'seconds':<22}{self.seconds:>16.2f}")
        if self.note is not None:
            lines.append(f"{self.note}.")
        return "\n".join(lines)

    def _verdict(self) -> str:
        """What the ratio says, as far as the expansion holds."""
        above = (self.log_evidence_ratio or 0.0) > 0
        if not self.at_minimum:
            return f"{'above' if above else 'below'} guessing, if the expansion holds"
        return "the data believe the model" if above else "the data prefer guessing"

    def _spread(self) -> str:
        per_example = f"{self.log_evidence / self.num_examples:+.4f} per example"
        if not self.log_evidence_stderr:
            return per_example
        if self.structure == "lanczos":
            reach = _quantile(self.log_evidence_dof) * self.log_evidence_stderr
            return f"± {self.log_evidence_stderr:.2g} (95 %: ± {reach:.2g}), {per_example}"
        if math.isfinite(self.log_evidence_stderr):
            sampling = f"± {self.log_evidence_stderr:.2g} from sampling"
        else:
            sampling = "error of sampling not known"
        # Where nothing bounds the exact value, the sampling error is no error of the evidence.
        own = f"; {self.structure}'s own error is not known" if math.isinf(self.lower) else ""
        return f"{sampling}{own}, {per_example}"

    def _matrix(self) -> str:
        """How near the matrix is to the whole one."""
        if self.lower == self.upper == self.log_evidence:
            return "exact GGN" if self.curvature == "ggn" else "exact Hessian"
        columns = "" if self.num_samples is None else f" of {self.num_samples} sampled columns"
        if self.curvature == "hessian_positive":
            return "eigenvalues above the prior's alone, a heuristic"
        if math.isinf(self.upper):
            return f"{self.structure}{columns}; no bounds known"
        if math.isinf(self.lower):
            return f"{self.structure}{columns}; log-evidence at most {self.upper:,.2f}"
        if self.lower_stderr:
            return (
                f"{self.structure}; log-evidence at most {self.upper:,.2f}, and at least {self.lower:,.2f} ± "
                f"{self.lower_stderr:.2g}: estimated from {self.num_blocks} batches, not certified"
            )
        certified = " certified" if self.structure == "lanczos" else ""
        return f"{self.structure}{columns}; log-evidence{certified} in [{self.lower:,.2f}, {self.upper:,.2f}]"

    def _eigenvalue_lines(self) -> list[str]:
        if self.num_eigenvalues_below_prior is None:
            return []
        below = f"{self.num_eigenvalues_below_prior:,}"
        return [
            f"{'eigenvalues':<22}{below:>16}  below the prior's, {self.num_negative_eigenvalues:,} of them negative"
        ]

    def _prior_lines(self) -> list[str]:
        label = "optimized prior" if self.prior_optimized else "prior precision"
        if not isinstance(self.prior_precision, Mapping):
            return [f"{label:<22}{self.prior_precision:>16,.4g}"]
        groups: dict[float, list[str]] = {}
        for name, precision in self.prior_precision.items():
            groups.setdefault(precision, []).append(name)
        lines = [f"{label:<22}{precision:>16,.4g}  {_shorten(names)}" for precision, names in groups.items()]
        if len(lines) > MOST_PRIOR_LINES:
            rest = len(lines) - MOST_PRIOR_LINES + 1
            lines[MOST_PRIOR_LINES - 1 :] = [f"{'':<22}{'...':>16}  and {rest} more"]
        return lines


def _quantile(dof: float) -> float:
    """Of 97.5 %, of Student's t."""
    return float(ndtri(0.975) if math.isinf(dof) else stdtrit(dof, 0.975))


def _shorten(names: tuple[str, ...] | list[str], at_most: int = 4) -> str:
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
