"""Likelihoods of a network's output: log-likelihood, square root of its Hessian, null model.

A likelihood sees `outputs` [N, C] (logits, or means) and `targets`, one row an example. Its negative
log-likelihood is `unit_loss` / φ plus a constant, where the dispersion φ is 1 for the discrete
likelihoods and the noise variance for the Gaussian. Square roots belong to `unit_loss`: a variance that
is estimated from the same pass over the data then needs no second pass.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bayes.curvature.errors import EvidenceUnavailableError
from lightning_bayes.functional._validation import positive
from lightning_bayes.functional.evidence import log_null_evidence

__all__ = ["LIKELIHOODS", "Bernoulli", "Categorical", "Gaussian", "Likelihood", "resolve_likelihood"]


class Likelihood(ABC):
    """What the evidence needs to know of p(target | output).

    Laws, for outputs f [N, C] and R = `sqrt_hessian(f)` [rank, N, C]:

    - Σᵣ R[r, n, :] R[r, n, :]ᵀ is the Hessian of example n's `unit_loss` in f[n].
    - `log_likelihood(unit_loss(f, y), ...)` is the summed log-density of y, every constant included.

    `prepare` brings what a network returned into the form that all other methods take: outputs [N, ...] and
    targets of any form, the examples first.
    """

    name: ClassVar[str]
    dispersion: float | None = 1.0
    """φ; None where it is to be estimated from the residuals."""

    @abstractmethod
    def prepare(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Bring outputs to [N, C] and targets beside them.

        Raises:
            ValueError: If the shapes or the targets' values do not fit the likelihood.
        """

    @abstractmethod
    def unit_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over examples of φ times the negative log-density, without constants; a scalar, nats · φ."""

    @abstractmethod
    def sqrt_hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Columns [rank, N, ...] of a square root of the Hessian of `unit_loss` in the outputs, detached."""

    def sample_columns(
        self, outputs: Tensor, targets: Tensor, num_columns: int, generator: torch.Generator
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
    def num_terms(self, outputs: Tensor, targets: Tensor) -> float:
        """What PyTorch's mean-reduced loss divides the sum over this batch by."""

    def null_loss(self, outputs: Tensor, targets: Tensor) -> float | None:
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

        s with λ = N · weight_decay / s: 1 for mean cross-entropy, 2σ²/K for mean squared error, 1/K for
        mean binary cross-entropy, and B times as much per term for `reduction="sum"`.

        Args:
            reduction: As in PyTorch's losses.
            terms_per_example: `num_terms` of the training set over N: K for K outputs.
            batch_size: B, the examples of one training_step; used by "sum" only.
            dispersion: φ.
        """
        scale = self._torch_terms * dispersion
        return scale * batch_size if reduction == "sum" else scale / terms_per_example

    # PyTorch's summed loss as a multiple of `unit_loss`: F.mse_loss has no ½.
    _torch_terms: ClassVar[float] = 1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Categorical(Likelihood):
    """One of C classes, from logits [N, C]; targets are class indices [N] or probabilities [N, C]."""

    name = "classification"

    def prepare(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Likelihood.prepare`."""
        if outputs.dim() != 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"A categorical likelihood needs logits of shape [N, C] with C >= 2, got {_shape(outputs)}. "
                "Sequence and per-pixel outputs are not supported yet; for one logit per output use "
                'likelihood="binary".'
            )
        if targets.shape == outputs.shape and targets.is_floating_point():
            _check(bool((targets >= 0).all()), "Class probabilities must not be negative.")
            sums = targets.sum(1)
            _check(
                torch.allclose(sums, torch.ones_like(sums), atol=1e-4),
                f"Class probabilities must sum to 1 in each row, got sums between "
                f"{sums.min().item():.6g} and {sums.max().item():.6g}.",
            )
            return outputs, targets.to(outputs.dtype)
        if targets.shape != outputs.shape[:1] or targets.is_floating_point():
            raise ValueError(
                f"Targets of a categorical likelihood are class indices [N] (integers) or class "
                f"probabilities [N, C] beside logits {_shape(outputs)}, got {_shape(targets)} of "
                f'{targets.dtype}. For real-valued targets use likelihood="regression".'
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise ValueError(
                f"Class indices must lie in 0 .. {outputs.shape[1] - 1} for logits {_shape(outputs)}, got "
                f"{low} .. {high}. Examples that the loss ignores (`ignore_index`) are not supported yet."
            )
        return outputs, targets.long()

    def unit_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """−Σₙ ln softmax(fₙ)[yₙ], or its expectation under class probabilities."""
        return F.cross_entropy(outputs, targets, reduction="sum")

    def sqrt_hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Lower-triangular Cholesky factor of diag(p) − p pᵀ, without its last column of zeros.

        With tail sums q_k = Σ_{j>k} p_j, L_kk = √(p_k q_k / q_{k−1}) and L_ik = −L_kk p_i / q_k for i > k
        (Tanabe & Sagae, *An exact Cholesky decomposition and the generalized inverse of the
        variance-covariance matrix of the multinomial distribution*, JRSS B 54, 1992).
        """
        log_p = F.log_softmax(outputs.detach(), dim=1)
        # log q_{k-1} for k = 0 .. C-1, in logs because tails underflow long before their ratios do.
        tails = log_p.flip(1).logcumsumexp(1).flip(1)
        diagonal = (0.5 * (log_p[:, :-1] + tails[:, 1:] - tails[:, :-1])).exp()
        conditional = (log_p.unsqueeze(1) - tails[:, 1:].unsqueeze(2)).clamp(max=0.0).exp()  # [N, k, i]
        root = torch.triu(-conditional, diagonal=1) * diagonal.unsqueeze(2)
        root.diagonal(dim1=1, dim2=2).copy_(diagonal)
        return root.transpose(0, 1)

    def num_terms(self, outputs: Tensor, targets: Tensor) -> float:
        """N, whatever the number of classes."""
        return len(outputs)

    def null_loss(self, outputs: Tensor, targets: Tensor) -> float:
        """N ln C."""
        return -log_null_evidence(len(outputs), outputs.shape[1])


class Bernoulli(Likelihood):
    """K independent binary outputs, from logits [N, K] (or [N]); targets in [0, 1] of the same shape."""

    name = "binary"

    def prepare(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Likelihood.prepare`."""
        outputs, targets = _flatten_alike(outputs, targets, self.name)
        low, high = targets.min().item(), targets.max().item()
        _check(low >= 0.0 and high <= 1.0, f"Binary targets must lie in [0, 1], got {low:g} .. {high:g}.")
        return outputs, targets

    def unit_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """−Σ y ln σ(f) + (1 − y) ln(1 − σ(f)) over examples and outputs."""
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")

    def sqrt_hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Diag √(p(1 − p))."""
        outputs = outputs.detach()
        return _diagonal_columns((0.5 * (F.logsigmoid(outputs) + F.logsigmoid(-outputs))).exp())

    def num_terms(self, outputs: Tensor, targets: Tensor) -> float:
        """N K."""
        return outputs.numel()

    def null_loss(self, outputs: Tensor, targets: Tensor) -> float:
        """N K ln 2."""
        return -log_null_evidence(len(outputs), 2, outputs.shape[1])


class Gaussian(Likelihood):
    """Real targets with Gaussian noise, from means [N, K] (or [N]); targets of the same shape.

    Args:
        sigma: Standard deviation of the noise, in the targets' units. None: the variance is the mean
            squared residual at the weights in question, and the result reports it.
    """

    name = "regression"
    _torch_terms = 2.0

    def __init__(self, sigma: float | None = None) -> None:
        self.dispersion = None if sigma is None else positive("sigma", sigma) ** 2

    def prepare(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Likelihood.prepare`."""
        return _flatten_alike(outputs, targets, self.name)

    def unit_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """½ Σ (f − y)² over examples and outputs."""
        return 0.5 * F.mse_loss(outputs, targets, reduction="sum")

    def sqrt_hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The identity for each example."""
        return _diagonal_columns(torch.ones_like(outputs))

    def num_terms(self, outputs: Tensor, targets: Tensor) -> float:
        """N K."""
        return outputs.numel()

    def estimate_dispersion(self, unit_loss: float, num_terms: float) -> float:
        """σ², the mean squared residual unless it was given."""
        if self.dispersion is not None:
            return self.dispersion
        variance = 2.0 * unit_loss / num_terms
        if variance <= 0.0:
            raise EvidenceUnavailableError(
                "The residuals are all zero, so the noise variance cannot be estimated from them; give it: "
                "likelihood=Gaussian(sigma=...)."
            )
        return variance

    def log_likelihood(self, unit_loss: float, dispersion: float, num_terms: float) -> float:
        """−Σ (f − y)²/(2σ²) − ½ N K ln(2πσ²)."""
        return -unit_loss / dispersion - 0.5 * num_terms * math.log(2 * math.pi * dispersion)

    def __repr__(self) -> str:
        return f"Gaussian(sigma={None if self.dispersion is None else math.sqrt(self.dispersion)!r})"


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    likelihood.name: likelihood for likelihood in (Categorical, Bernoulli, Gaussian)
}


def resolve_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Return the likelihood that a name or an object stands for.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in LIKELIHOODS:
        return LIKELIHOODS[likelihood]()
    raise ValueError(
        f"Expected argument `likelihood` to be one of {sorted(LIKELIHOODS)} or a Likelihood object such as "
        f"Gaussian(sigma=0.1), got {likelihood!r}."
    )


def _flatten_alike(outputs: Tensor, targets: Tensor, name: str) -> tuple[Tensor, Tensor]:
    # [N] beside [N, 1] is one output; [N, 2, 3] beside [N, 3, 2] would pair the wrong numbers.
    if outputs.dim() == 0 or _without_ones(outputs) != _without_ones(targets):
        raise ValueError(
            f"A {name} likelihood needs targets of the outputs' shape, got outputs {_shape(outputs)} and "
            f"targets {_shape(targets)}."
        )
    return outputs.reshape(len(outputs), -1), targets.reshape(len(outputs), -1).to(outputs.dtype)


def _without_ones(tensor: Tensor) -> list[int]:
    return [*tensor.shape[:1], *(size for size in tensor.shape[1:] if size != 1)]


def _diagonal_columns(values: Tensor) -> Tensor:
    """[N, K] -> [K, N, K] with values[:, k] on output k of column k."""
    return torch.diag_embed(values.detach()).transpose(0, 1)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
