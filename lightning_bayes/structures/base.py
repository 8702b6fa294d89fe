"""What every curvature structure answers, and what it may take."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_bayes.numerics.sampling_estimates import BlockSample
from lightning_bayes.rows.products import DataPasses
from lightning_bayes.rows.rows import RowChunk

MINUTE = 60.0


@dataclass(frozen=True)
class Budget:
    """What may be taken of time and memory: where each structure trades them for accuracy, or for one another.

    Attributes:
        memory: Bytes that "auto" lets the exact matrix and its rows take.
        seconds: That "auto" lets an exact matrix take, or else "lanczos", beside the reading of the rows. None for a
            minute, or in a Trainer for the larger of ten seconds and an epoch of training.
        columns: Outputs per example up to which "auto" reads all columns of the loss Hessian's root, whatever
            they cost.
        hessian_memory: Bytes that the true Hessian, scaled, and its eigenvectors may take: 7,905 parameters.
        searched_spectrum: Rows or parameters of an exact matrix up to which a search for one λ takes all its
            eigenvalues. (On two cores the eigenvalues cost ten factorisations and more, of which a search needs
            four.)
        common_spectrum: Parameters of an exact matrix up to which all its eigenvalues are taken for the best
            prior alone: of G they cost about a tenth of the evaluation. Those of K may be three times that: rows
            have `searched_spectrum`.
        small: Rows of K up to which its trace is exact, and float64 so cheap that it is taken without a word.
        probes: Random vectors of the trace of more rows than that.
        left_out_share: Share of so many rows of K that must be negligible for them to be left out: turning them
            costs something.
        primal_rows: Rows that are kept to form G at once, in units of p; more become a sum in float64: twice as
            long.
        bracket_share: Share of the exact operations from which on the exact answer is given instead of a bracket
            about it.
        bracket_trace: Rows of a bracket up to which its trace is exact.
        marked_rows: Columns of a bracket's factor that are computed at a time to choose its rows by.
        marked_share: The part that these may be of the rows that were chosen before: one in so many.
        kept_flop: Operations that K_SS of "blocks" and its factor may take at each prior that is tried: how large
            S is.
        kept_bytes: Memory of that matrix and of the rows of S.
        least_kept: Rows of S that are kept whatever they take.
        landmarks: Landmark rows of "blocks" where the data are few; halved until the pass fits its operations.
        pool_rows: Rows of the first batches that are held back to choose the landmarks from, where they are
            short.
        stored_bytes: Rows of "lanczos" that are stored; more are formed again for each product with them.
        selected_rows: Rows that "lanczos" selects; None for as many as cost about as much as they save.
        basis_bytes: Bases of its random vectors that are stored; where more are needed the vectors take turns.
        sampled_rows: Rows outside S that are held back as a random sample.
        kronecker_exact: Parameters up to which a tensor without a Kronecker form keeps its exact block, larger
            ones its diagonal.
        kronecker_left_out: Side of a second moment up to which it is decomposed again for each group of
            sampled columns.
    """

    memory: float = 2e9
    seconds: float | None = None
    columns: int = 512
    hessian_memory: float = 2e9
    searched_spectrum: int = 1024
    common_spectrum: int = 2048
    small: int = 4096
    probes: int = 256
    left_out_share: float = 0.15
    primal_rows: int = 6
    bracket_share: float = 0.8
    bracket_trace: int = 1024
    marked_rows: int = 256
    marked_share: int = 4
    kept_flop: float = 3e11
    kept_bytes: float = 6e8
    least_kept: int = 64
    landmarks: int = 1024
    pool_rows: int = 8192
    stored_bytes: float = 2.5e9
    selected_rows: int | None = None
    basis_bytes: float = 1e9
    sampled_rows: int = 256
    kronecker_exact: int = 1024
    kronecker_left_out: int = 1024


DEFAULT_BUDGET = Budget()


def total_memory(device: torch.device) -> float:
    """Bytes that a device has, or the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float("inf")


@dataclass(frozen=True)
class Problem:
    """The sizes that a structure can plan with before it has seen a row.

    Attributes:
        shapes: Of the parameters that carry a prior.
        num_examples: Examples expected; an estimate is enough.
        rank: Rows per example.
        batch_size: Examples whose rows exist at one time before a structure has taken them in.
        kept_width: Numbers that a row is kept as beyond its batch, see `kept_widths`.
        gram_width: Multiplications of the inner product of two kept rows.
        map_width: Multiplications of one example on its way through the network, about.
        tolerance: Width in nats of the bracket about the log-evidence that is accepted; None for exact.
        sampled: Whether the columns of a batch are samples, of which G is the mean in expectation.
        strengths: Λ of each parameter tensor up to one factor, where that is known beforehand.
        scale: The factor of `strengths` that is expected; an estimate is enough.
        block_sample: Batches whose rows are read, None for all.
        sought: Whether prior precisions are to be found.
        rises_together: Whether every Λ that will be asked for is `strengths` times one number.
        curvature: Of which matrix: "ggn", or the true Hessian as "hessian" or "hessian_positive".
        seconds: `Budget.seconds`, or what stands in its place.
        num_probes: Random vectors of "lanczos".
        max_stderr: Standard error of its log-determinant, until which there are more of them; None for no more.
        seed: Of these vectors.
        by_products: Whether products with G take the place of rows.
        measured: Seconds that answers by some structures take, where they were measured.
        passes: Makes products by further passes over the data; None where these can be read once only.
        report: Takes a few words on what is being done.
    """

    shapes: Mapping[str, torch.Size]
    num_examples: int
    rank: int
    batch_size: int
    kept_width: int
    gram_width: int
    map_width: int
    dtype: torch.dtype
    device: torch.device
    tolerance: float | None = None
    sampled: bool = False
    strengths: Mapping[str, float] | None = None
    scale: float = 1.0
    block_sample: BlockSample | None = None
    sought: bool = False
    rises_together: bool = True
    curvature: str = "ggn"
    budget: Budget = DEFAULT_BUDGET
    seconds: float = MINUTE
    num_probes: int = 8
    max_stderr: float | None = None
    seed: int = 0
    by_products: bool = False
    measured: Mapping[str, float] = field(default_factory=dict)
    passes: Callable[[], DataPasses] | None = None
    report: Callable[[str], object] = field(default=lambda text: None, repr=False)

    @property
    def num_parameters(self) -> int:
        """Entries of the parameters that carry a prior, p."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def num_rows(self) -> int:
        """Rows of V."""
        return self.num_examples * self.rank

    @property
    def is_small(self) -> bool:
        """Whether the eigenvalues of the exact matrix cost a search no more than its factors."""
        return min(self.num_rows, self.num_parameters) <= self.budget.searched_spectrum


@dataclass(frozen=True)
class CurvatureSummary:
    """Numbers of G at one prior Λ, each from the structure's own factor, estimates with standard errors.

    Attributes:
        log_det: ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²) as the structure has it, nats.
        bounds: Certified bounds on the log-determinant of the *whole* G: equal where the structure is exact.
        effective_parameters: tr G(G + Λ)⁻¹.
        quadratic: gᵀ(G + Λ)⁻¹g for the gradient g that was given.
        log_det_stderr: 0 where nothing is sampled.
        log_det_dof: Degrees of freedom of that error.
        samples: The log-determinant by each random vector, of which `log_det` is the mean.
        quadratic_error: What `quadratic` may be too small by at most.
        effective_parameters_stderr: 0 where the trace is exact.
        upper_stderr: Of the upper bound where it is an estimate from sampled blocks; 0 where it is certain.
        num_below_prior: Eigenvalues of the true Hessian of the whitened cost below 1, which is λᵢ < λ; None for
            the GGN.
        num_negative: Those at or below 0: the cost has no minimum there.
    """

    log_det: float
    bounds: tuple[float, float]
    effective_parameters: float
    quadratic: float
    log_det_stderr: float = 0.0
    log_det_dof: float = math.inf
    quadratic_error: float = 0.0
    samples: tuple[float, ...] = ()
    effective_parameters_stderr: float = 0.0
    upper_stderr: float = 0.0
    num_below_prior: int | None = None
    num_negative: int | None = None


@dataclass(eq=False)
class Curvature(ABC):
    """One view of a matrix G, built block by block: of VᵀV from its rows, of a true Hessian from those of batches.

    Laws: the order and the size of the blocks do not matter; the other methods may be called for any number
    of priors once all blocks are in. λ > 0 for each parameter tensor; a mapping from names holds them.
    """

    problem: Problem

    chooses_rows = False
    """Whether rows are chosen for one prior, so that a search for a prior goes by `of_chosen_rows`."""
    reads_rows = True
    """Whether batches after the first need their rows to be formed."""
    costly_priors = False
    """Whether every further prior takes about as long as the first."""
    rereads = False
    """Whether answers take further passes over the data."""

    @property
    def searches_by_spectrum(self) -> bool:
        """Whether a search for a prior that goes up and down as a whole takes the spectrum, and not factors."""
        return False

    @abstractmethod
    def update(self, chunk: RowChunk) -> None:
        """Take in the rows of one batch, or of some columns of it."""

    @abstractmethod
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """Answer for one prior.

        Args:
            precision: λ of each parameter tensor.
            gradient: g of each parameter tensor, in its shape.
        """

    def prepare(self, precisions: Sequence[Mapping[str, float]]) -> None:
        """Learn which priors will be asked for, where answers to all together cost less."""
        return None

    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        """The log-determinant of `at`, and γ, which is minus its derivative in ln s for the prior s·Λ."""
        shapes, device = self.problem.shapes, self.problem.device
        nothing = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        summary = self.at(precision, nothing)
        return summary.log_det, summary.effective_parameters

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Log-determinant for one prior, and γ of each parameter tensor.

        γᵢ = pᵢ − λᵢ trᵢ (G + Λ)⁻¹, the trace over the entries of tensor i. ∂ ln det / ∂ ln λᵢ = −γᵢ.
        """
        raise NotImplementedError(f"{type(self).__name__} has one γ for all parameters.")

    def spectrum(self, precision: Mapping[str, float]) -> Tensor | None:
        """Eigenvalues of Λ⁻¹ᐟ² G Λ⁻¹ᐟ², in any order; zeros may be left out. None where there are none to be had.

        With them the log-determinant for the prior s·Λ is Σ ln(1 + e/s), for every s at no cost.
        """
        return None

    def cheap_spectra(self, precision: Mapping[str, float]) -> Iterator[Tensor]:
        """Spectra that cost little beside `at`, the quickest first; none where columns are sampled."""
        sought = self.searches_by_spectrum and not self.problem.sampled
        values = self.spectrum(precision) if sought else None
        if values is not None:
            yield values

    def of_chosen_rows(self, precision: Mapping[str, float]) -> "Curvature":
        """Answer for this prior, and any that is not smaller for some tensor, from the rows that it needs."""
        return self
