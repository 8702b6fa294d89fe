"""The options that `laplace_evidence` and `LaplaceEvidence` share, and their checks."""

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_bayes.curvature.structures import STRUCTURES
from lightning_bayes.curvature.subset import Subset, require_subset
from lightning_bayes.functional._validation import count, positive

__all__ = ["Method", "check_options", "sampling_if_many_columns"]

CURVATURES = ("ggn", "hessian", "hessian_positive")
BACKENDS = ("auto", "backpack", "autograd")
MAX_COLUMNS = 512
"""Outputs per example beyond which "auto" samples columns of the loss Hessian's root."""
DEFAULT_SAMPLES = 64
"""Columns that "auto" then samples."""


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

    def __post_init__(self) -> None:
        require_subset(self.subset_of_weights)
        _one_of("structure", self.structure, ("auto", *STRUCTURES))
        _one_of("curvature", self.curvature, CURVATURES)
        _one_of("backend", self.backend, BACKENDS)
        if self.tolerance is not None:
            positive("tolerance", self.tolerance)
            if self.structure not in ("auto", "full"):
                raise ValueError(
                    f"Expected argument `tolerance` to be None beside structure={self.structure!r}, got "
                    f"{self.tolerance!r}: it is the width of a bracket about the exact log-evidence, which "
                    'structure="full" and "auto" give.'
                )
        if self.num_samples is not None:
            count("num_samples", self.num_samples)
            self._check_sampling()
        if self.num_blocks is not None:
            if count("num_blocks", self.num_blocks) < 2:
                raise ValueError(
                    f"Expected argument `num_blocks` to be 2 or more, got {self.num_blocks!r}: the rows of one batch "
                    "say nothing of what the others add, and those of two nothing of the error of that. Some ten "
                    "give a standard error to go by."
                )
            if self.structure != "blocks":
                raise ValueError(
                    f"Expected argument `num_blocks` to be None beside structure={self.structure!r}, got "
                    f'{self.num_blocks!r}: it is the number of batches whose rows structure="blocks" reads.'
                )
        if self.is_hessian:
            self._check_hessian()

    @property
    def is_hessian(self) -> bool:
        """Whether the matrix is the true Hessian rather than the generalized Gauss-Newton matrix."""
        return self.curvature != "ggn"

    def _check_sampling(self) -> None:
        if self.structure in ("full", "blocks") or self.tolerance is not None:
            raise ValueError(
                f"Expected argument `num_samples` to be None beside structure={self.structure!r} and tolerance="
                f"{self.tolerance!r}, got {self.num_samples!r}: with sampled columns the matrix is right on average "
                'only, and neither exact nor bracketed. Use structure="kron" or "diag".'
            )

    def _check_hessian(self) -> None:
        if self.structure not in ("auto", "full"):
            raise ValueError(
                f"Expected argument `structure` to be 'auto' or 'full' beside curvature={self.curvature!r}, got "
                f'{self.structure!r}: the others are views of the rows of the GGN. Use curvature="ggn".'
            )
        for name, value, usual in (
            ("tolerance", self.tolerance, None),
            ("num_samples", self.num_samples, None),
            ("backend", self.backend, "auto"),
        ):
            if value != usual:
                raise ValueError(
                    f"Expected argument `{name}` to be {usual!r} beside curvature={self.curvature!r}, got "
                    f'{value!r}: the Hessian is formed by autograd, whole and exact. Use curvature="ggn".'
                )


def check_options(batch_size: object, max_examples: object) -> None:
    """Check the options that both APIs share beside the `Method`.

    Raises:
        ValueError: Naming the argument, what was got, and the remedy.
    """
    for name, value in (("batch_size", batch_size), ("max_examples", max_examples)):
        if value is not None:
            count(name, value)


def sampling_if_many_columns(method: Method, outputs: Tensor) -> tuple[Method, str | None]:
    """Let structure="auto" sample where an example has more than `MAX_COLUMNS` outputs.

    Args:
        method: As it was asked for.
        outputs: Of the network, the examples first.

    Returns:
        The method to take, and a sentence that says what was changed, None for nothing.
    """
    columns = outputs[:1].numel()
    asked = method.structure != "auto" or method.num_samples is not None or method.tolerance is not None
    if asked or method.is_hessian or columns <= MAX_COLUMNS:
        return method, None
    return replace(method, structure="kron", num_samples=DEFAULT_SAMPLES), (
        f"The loss has {columns:,} outputs per example, so structure='auto' takes structure='kron' with "
        f'num_samples={DEFAULT_SAMPLES} random columns of the loss Hessian\'s root. structure="kron" with '
        'num_samples=None takes all columns; structure="full" or tolerance= goes for the exact value.'
    )


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected argument `{name}` to be {listed}, got {value!r}.")
