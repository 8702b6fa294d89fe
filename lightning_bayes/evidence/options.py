"""The options that `laplace_evidence` and `LaplaceEvidence` share, and their checks."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_bayes.functional._validation import count, positive
from lightning_bayes.priors.subset import Subset, require_subset
from lightning_bayes.structures.base import DEFAULT_BUDGET, Budget
from lightning_bayes.structures.registry import DEFAULT_SAMPLES, STRUCTURES, samples_of_many_columns

CURVATURES = ("ggn", "hessian", "hessian_positive")
BACKENDS = ("auto", "backpack", "autograd")
DEFAULT_PROBES = 8
"""Random vectors of "lanczos"."""
FEWEST_BLOCKS = 8
"""Batches whose rows "blocks" may read: intervals from two to four were seen to cover 0.3 of the truths for 0.95."""


@dataclass(frozen=True)
class Method:
    """How the curvature is computed, and in which parameters; see `laplace_evidence` for each option.

    Raises:
        ValueError: Naming the argument, what was got, and the remedy.
    """

    structure: str = "auto"
    curvature: str = "ggn"
    backend: str = "auto"
    tolerance: float | None = None
    num_samples: int | None = None
    subset_of_weights: Subset = "all"
    num_blocks: int | None = None
    num_probes: int | None = None
    max_stderr: float | None = None
    seed: int = field(default=0, repr=False)
    by_products: bool = field(default=False, repr=False)
    """Whether "lanczos" takes products with G alone and forms no column; found out from the outputs."""
    budget: Budget = field(default=DEFAULT_BUDGET, repr=False)

    def __post_init__(self) -> None:
        require_subset(self.subset_of_weights)
        _one_of("structure", self.structure, ("auto", *STRUCTURES))
        _one_of("curvature", self.curvature, CURVATURES)
        _one_of("backend", self.backend, BACKENDS)
        if self.tolerance is not None:
            positive("tolerance", self.tolerance)
        if self.num_samples is not None:
            count("num_samples", self.num_samples)
        if self.num_blocks is not None and count("num_blocks", self.num_blocks) < FEWEST_BLOCKS:
            raise ValueError(
                f"Expected argument `num_blocks` to be {FEWEST_BLOCKS} or more, got {self.num_blocks!r}: half of "
                "the batches tell how far off the other half may be, and the standard error of fewer does not "
                f"hold what it says. Use num_blocks={FEWEST_BLOCKS}, or None for all batches."
            )
        if self.num_probes is not None:
            count("num_probes", self.num_probes)
        if self.max_stderr is not None:
            positive("max_stderr", self.max_stderr)
        if self.is_hessian and self.structure not in ("auto", "full"):
            raise ValueError(
                f"Expected argument `structure` to be 'auto' or 'full' beside curvature={self.curvature!r}, got "
                f'{self.structure!r}: the others are views of the rows of the GGN. Use curvature="ggn".'
            )
        for name, usual, excluded, beside, why in self._combinations():
            value = getattr(self, name)
            if excluded and value != usual:
                raise ValueError(
                    f"Expected argument `{name}` to be {usual!r} beside {beside}, got {value!r}: {why}"
                )

    def _combinations(self) -> list[tuple[str, str | None, bool, str, str]]:
        """Options with the one value that some others leave them: whether these do, which they are, and why."""
        structure, curvature = f"structure={self.structure!r}", f"curvature={self.curvature!r}"
        no_samples = self.structure in ("full", "lanczos", "blocks") or self.tolerance is not None
        of_exact = (
            "it is the width of a bracket about the exact log-evidence, which "
            'structure="full" and "auto" give.'
        )
        on_average = (
            "with sampled columns the matrix is right on average only, and neither exact nor bracketed. Use "
            'structure="kron" or "diag".'
        )
        of_lanczos = 'it is of the random vectors of structure="lanczos", which "auto" may choose.'
        not_lanczos = self.structure not in ("auto", "lanczos")
        of_blocks = 'it is the number of batches whose rows structure="blocks" reads.'
        by_autograd = 'the Hessian is formed by autograd, whole and exact. Use curvature="ggn".'
        return [
            ("tolerance", None, self.structure not in ("auto", "full"), structure, of_exact),
            ("num_samples", None, no_samples, f"{structure} and tolerance={self.tolerance!r}", on_average),
            ("num_blocks", None, self.structure != "blocks", structure, of_blocks),
            ("num_probes", None, not_lanczos, structure, of_lanczos),
            ("max_stderr", None, not_lanczos, structure, of_lanczos),
            ("num_probes", None, self.is_hessian, curvature, by_autograd),
            ("max_stderr", None, self.is_hessian, curvature, by_autograd),
            ("tolerance", None, self.is_hessian, curvature, by_autograd),
            ("num_samples", None, self.is_hessian, curvature, by_autograd),
            ("backend", "auto", self.is_hessian, curvature, by_autograd),
        ]

    @property
    def is_hessian(self) -> bool:
        """Whether the matrix is the true Hessian rather than the generalized Gauss-Newton matrix."""
        return self.curvature != "ggn"


def sampling_if_many_columns(
    method: Method, outputs: Tensor, num_examples: int, num_parameters: int, batch_size: int
) -> tuple[Method, str | None]:
    """Let structure="auto" sample where all columns of the root are many and beyond its budget, "lanczos" do without.

    Args:
        method: As it was asked for.
        outputs: Of the network, the examples first.
        num_examples: N.
        num_parameters: p.
        batch_size: Examples at a time.

    Returns:
        The method to take, and a sentence that says what was changed, None for nothing.
    """
    if method.structure == "lanczos" and outputs[:1].numel() > method.budget.columns:
        return replace(method, by_products=True), None
    asked = method.structure != "auto" or method.num_samples is not None or method.tolerance is not None
    if asked or method.is_hessian:
        return method, None
    why = samples_of_many_columns(outputs, num_examples, num_parameters, batch_size, method.budget)
    if why is None:
        return method, None
    if method.num_probes is not None or method.max_stderr is not None:
        why += ' num_probes= and max_stderr= are those of structure="lanczos", which takes them at this size as well.'
    kron = replace(method, structure="kron", num_samples=DEFAULT_SAMPLES, num_probes=None, max_stderr=None)
    return kron, why


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected argument `{name}` to be {listed}, got {value!r}.")
