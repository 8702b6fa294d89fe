"""What the evidence needs to know of a likelihood, and what those of independent outputs share.

A likelihood sees the outputs of a network (logits, or means) and targets, one row an example. Its negative
log-likelihood is `unit_loss` / φ plus a constant, where the dispersion φ is 1 for the discrete
likelihoods and the noise variance for the Gaussian. Square roots belong to `unit_loss`: a variance that
is estimated from the same pass over the data then needs no second pass.
"""

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

MAX_ROOT_BYTES = 8e9
"""Memory of the square root of one batch; a larger one is refused rather than left to the operating system."""


class Likelihood(ABC):
    """What the evidence needs to know of p(target | output).

    Laws, for prepared outputs f [N, ...] with targets y, and R = `sqrt_hessian(f, y)` [rank, N, ...]:

    - Σᵣ R[r, n] R[r, n]ᵀ is the Hessian of example n's `unit_loss` in f[n], or its Fisher information where
      the Hessian has negative eigenvalues.
    - `hessian_product(f, y, t)` is Σᵣ R[r, n] ⟨R[r, n], t[n]⟩ for any t of f's shape.
    - `log_likelihood(unit_loss(f, y), ...)` is the summed log-density of y, every constant included. Weights
      of classes or examples multiply their terms of it: the weighted sum that training minimises is taken
      at its word, as the log-density of so many observations.
    - `prepare(*prepare(f, y))` is `prepare(f, y)`: weights are applied once.
    """

    name: ClassVar[str]
    dispersion: float | None = 1.0
    """φ; None where it is to be estimated from the residuals."""
    optimizes_dispersion: bool = False
    """Whether φ is to maximise the log-evidence rather than the likelihood."""
    torch_terms: float = 1.0
    """PyTorch's summed loss as a multiple of `unit_loss`: F.mse_loss has no ½."""
    note: str | None = None
    """A sentence on what is scored where that is not plain, None where it is."""

    @abstractmethod
    def prepare(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """Bring outputs to [N, ...] and targets into the form that the other methods take.

        Raises:
            ValueError: If the shapes or the targets' values do not fit the likelihood.
        """

    @abstractmethod
    def unit_loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """Sum over examples of φ times the negative log-density, without constants; a scalar, nats · φ.

        Summed in float64 where the device has it, since the log-likelihood is one end of a certified bracket.
        """

    @abstractmethod
    def sqrt_hessian(self, outputs: Tensor, targets: Any) -> Tensor:
        """Columns [rank, N, ...] of a square root of the Hessian of `unit_loss` in the outputs, detached."""

    def hessian_product(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """The Hessian of `unit_loss` in the outputs times vectors, [k, N, ...], detached; linear in their size.

        Args:
            outputs: Prepared, [N, ...].
            targets: Prepared.
            tangents: k vectors of the outputs' shape, [k, N, ...].
        """
        root = self.sqrt_hessian(outputs, targets)
        root = root.reshape(*root.shape[:2], -1)
        along = torch.einsum("rno,kno->krn", root, tangents.detach().reshape(*tangents.shape[:2], -1))
        return torch.einsum("krn,rno->kno", along, root).reshape(tangents.shape)

    def sample_columns(
        self, outputs: Tensor, targets: Any, num_columns: int, generator: torch.Generator
    ) -> Tensor:
        """Random columns [num_columns, N, ...] whose outer products sum to the Hessian in expectation.

        R z/√S with independent standard normal z: each column of each example is a draw of its own.
        """
        root = self.sqrt_hessian(outputs, targets)
        draws = torch.randn(
            num_columns, *root.shape[:2], generator=generator, dtype=root.dtype, device=root.device
        )
        return torch.einsum("srn,rn...->sn...", draws, root) / math.sqrt(num_columns)

    @abstractmethod
    def num_terms(self, outputs: Tensor, targets: Any) -> float:
        """What PyTorch's mean-reduced loss divides the sum over this batch by."""

    def num_observed(self, outputs: Tensor, targets: Any) -> float:
        """Summed weights of the log-densities in `unit_loss`: how often the normalising constant counts."""
        return self.num_terms(outputs, targets)

    def weighted(self, targets: Any, weights: Tensor, num_terms: float) -> Any:
        """Prepared targets whose terms of `unit_loss` count so many times.

        Args:
            targets: As `prepare` returns them.
            weights: At least 0, one for each target, in a shape that can be brought to theirs.
            num_terms: What the loss divides the weighted sum by.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weights of single targets")

    def null_loss(self, outputs: Tensor, targets: Any) -> float | None:
        """Summed unit loss of guessing, None where there is no guess to compare with."""
        return None

    def estimate_dispersion(self, unit_loss: float, num_terms: float) -> float:
        """Return φ: as given, or estimated from the summed unit loss of all examples.

        Raises:
            EvidenceUnavailableError: If an estimate is asked for and is zero.
        """
        if self.dispersion is None:
            raise NotImplementedError(f"{type(self).__name__} has no estimate of its dispersion")
        return self.dispersion

    def log_likelihood(self, unit_loss: float, dispersion: float, num_terms: float) -> float:
        """Summed log-density of the targets in nats, from the summed unit loss and φ."""
        return -unit_loss / dispersion

    def loss_scale(
        self,
        reduction: Literal["mean", "sum"],
        terms_per_example: float,
        batch_size: int,
        dispersion: float,
    ) -> float:
        """How many times the mean per-example nll the training loss is.

        s with λ = N · weight_decay / s: 1 for mean cross-entropy, 1/T for its mean over T tokens, 2σ²/K for
        mean squared error, 1/K for mean binary cross-entropy, and B times as much per term for
        `reduction="sum"`.

        Args:
            reduction: As in PyTorch's losses.
            terms_per_example: `num_terms` of the training set over N: K for K outputs, T for T tokens, the
                mean weight of a target's class where classes are weighted.
            batch_size: B, the examples of one training_step; used by "sum" only.
            dispersion: φ.
        """
        scale = self.torch_terms * dispersion
        return scale * batch_size if reduction == "sum" else scale / terms_per_example

    def __repr__(self) -> str:
        """The call that makes it, without what is left at its default."""
        given = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            shown = repr(value.tolist() if isinstance(value, Tensor) else value)
            if shown != repr(parameter.default):  # by its text: an array has no one truth value
                given.append(f"{name}={shown}")
        return f"{type(self).__name__}({', '.join(given)})"


WEIGHTED = (
    "With weights of classes or outputs the weighted sum of the log-densities of all examples is scored, as if each "
    "were so many observations"
)


class DiagonalLikelihood(Likelihood):
    """A likelihood whose outputs [N, K] are independent given the network: its Hessian is diagonal."""

    @abstractmethod
    def sqrt_diagonal(self, outputs: Tensor, targets: Any) -> Tensor:
        """Square root of the Hessian's diagonal, [N, K], detached."""

    @override
    def sqrt_hessian(self, outputs: Tensor, targets: Any) -> Tensor:
        """Columns [K, N, K], output k alone in column k."""
        check_root_fits(outputs.shape[1], outputs)
        return torch.diag_embed(self.sqrt_diagonal(outputs, targets)).transpose(0, 1)

    @override
    def hessian_product(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        return tangents.detach() * self.sqrt_diagonal(outputs, targets).square()

    @override
    def sample_columns(
        self, outputs: Tensor, targets: Any, num_columns: int, generator: torch.Generator
    ) -> Tensor:
        # Random signs in the place of normal draws spare variance.
        root = self.sqrt_diagonal(outputs, targets)
        size = (num_columns, *root.shape)
        draws = torch.randint(2, size, generator=generator, dtype=root.dtype, device=root.device)
        return (2 * draws - 1) * root / math.sqrt(num_columns)

    @override
    def num_terms(self, outputs: Tensor, targets: Any) -> float:
        """N K, whatever the weights: PyTorch's mean does not divide by them."""
        return outputs.numel()


def flatten_alike(outputs: Tensor, targets: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Outputs and targets of one shape as [N, K].

    Raises:
        ValueError: If the shapes differ by more than dimensions of size one.
    """
    # [N] beside [N, 1] is one output; [N, 2, 3] beside [N, 3, 2] would pair the wrong numbers.
    if outputs.dim() == 0 or _without_ones(outputs) != _without_ones(targets):
        raise ValueError(
            f"A {name} likelihood needs targets of the outputs' shape, got outputs {list(outputs.shape)} and "
            f"targets {list(targets.shape)} of {targets.dtype}.{_mismatch(outputs, targets, name)}"
        )
    return outputs.reshape(len(outputs), -1), targets.reshape(len(outputs), -1).to(outputs.dtype)


def _mismatch(outputs: Tensor, targets: Tensor, name: str) -> str:
    """The likelihood that fits better, as a sentence after a space, or nothing."""
    if not targets.is_floating_point() and outputs.dim() > 1 and targets.dim() < outputs.dim():
        return f" {kind_of(targets)}"
    if name == "regression" and outputs.dim() == 2 and targets.numel() * 2 == outputs.numel():
        return ' Means and variances side by side, [N, 2K], belong to likelihood="gaussian_nll".'
    return ""


def kind_of(targets: Tensor) -> str:
    """The likelihood for targets of a wrong kind, by what they look like; a sentence."""
    if not targets.is_floating_point():
        return 'Integers that name classes belong to likelihood="classification", with logits [N, C].'
    if targets.numel() and bool(((targets == 0) | (targets == 1)).all()):
        return (
            'Targets of 0 and 1 belong to likelihood="binary", with one logit per output and the outputs\' shape, or '
            'as integers, targets.long(), to likelihood="classification" with logits [N, C].'
        )
    return 'For real-valued targets use likelihood="regression", with one mean per target.'


def _without_ones(tensor: Tensor) -> list[int]:
    return [*tensor.shape[:1], *(size for size in tensor.shape[1:] if size != 1)]


def weights_of(name: str, weights: object) -> Tensor:
    """Weights of a loss as a tensor.

    Raises:
        ValueError: If one is negative or not finite.
    """
    tensor = torch.as_tensor(weights).detach()
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    if not bool((tensor.isfinite() & (tensor >= 0)).all()):
        raise ValueError(
            f"Expected argument `{name}` to be finite and at least 0, got {tensor.min().item():g} .. "
            f"{tensor.max().item():g}."
        )
    return tensor


def check_root_fits(rank: int, outputs: Tensor) -> None:
    """Raise a ValueError if so many columns beside the outputs [N, ...] take more than `MAX_ROOT_BYTES`."""
    size = float(rank) * outputs.numel() * outputs.element_size()
    if size > MAX_ROOT_BYTES:
        raise ValueError(
            f"The square root of the loss Hessian has {rank:,} columns an example and takes {size / 1e9:.3g} GB for "
            f"outputs {list(outputs.shape)}: read fewer examples at a time (batch_size=), or sample its columns "
            '(num_samples=64 with structure="kron" or "diag").'
        )
