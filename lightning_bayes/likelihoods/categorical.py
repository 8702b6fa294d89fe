"""One of C classes, for each example or for each token of a sequence."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_bayes.functional._validation import finite
from lightning_bayes.likelihoods.base import WEIGHTED, Likelihood, check_root_fits, kind_of, weights_of
from lightning_bayes.numerics.devices import accumulation_dtype


@dataclass(frozen=True)
class ClassTargets:
    """Weights q ≥ 0 of the classes in the loss −Σ_c q_c ln p_c of each token."""

    total: Tensor
    """Σ_c q_c, [N] or [N, T]; zero for what is ignored."""
    classes: Tensor
    """The one class that carries `total` where integers, [N] or [N, T]; otherwise q itself, [..., C]."""
    num_terms: float


class Categorical(Likelihood):
    """One of C classes, from logits [N, C], or [N, C, T, ...] or [N, T, C] for sequences and images.

    Targets are class indices [N] or [N, T, ...], or class probabilities of the logits' shape. The loss of one
    token is that of `F.cross_entropy`: (1 − α) w_y (−ln p_y) + α/C Σ_c w_c (−ln p_c), in general
    −Σ_c q_c ln p_c with Hessian (Σ_c q_c)(diag(p) − p pᵀ). With class weights the sum over all examples is scored,
    Σₙ w_y (−ln p_y). PyTorch's mean divides that of a batch by the weights of the same batch, so that training weighs
    the examples of batches with many heavy ones a little less; over a batch of all examples the two are one.

    Args:
        weight: w ≥ 0 of each class, [C].
        label_smoothing: α in [0, 1].
        ignore_index: Class index of tokens that do not count.
        class_dim: Dimension of the logits that holds the classes: 1, as PyTorch has it, or -1. None takes the
            one that fits the targets.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "classification"

    def __init__(
        self,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_dim: int | None = None,
    ) -> None:
        self.weight = None if weight is None else weights_of("weight", weight)
        self.label_smoothing = label_smoothing
        if label_smoothing != 0.0:  # most have none, and one is made for every batch that is read
            self.label_smoothing = finite("label_smoothing", label_smoothing, "a number in [0, 1]")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"Expected argument `label_smoothing` to be in [0, 1], got {label_smoothing!r}.")
        if class_dim not in (None, 1, -1):
            raise ValueError(f"Expected argument `class_dim` to be 1, -1 or None, got {class_dim!r}.")
        self.ignore_index = ignore_index
        self.class_dim = class_dim
        if weight is not None:
            self.note = (
                f"{WEIGHTED}; PyTorch's mean divides by the weights of each batch, which the sum does not"
            )

    @override
    def prepare(self, outputs: Tensor, targets: Tensor | ClassTargets) -> tuple[Tensor, ClassTargets]:
        """Outputs become [N, C] or [N, T, C]."""
        if isinstance(targets, ClassTargets):
            return outputs, targets
        dim = self._class_dim(outputs, targets)
        logits = outputs.movedim(dim, -1)
        soft = targets.is_floating_point()
        classes = targets.movedim(dim, -1) if soft else targets
        if logits.dim() > 3:
            logits, classes = logits.flatten(1, -2), classes.flatten(1, -2 if soft else -1)
        if logits.shape[-1] < 2:
            raise ValueError(
                f"A categorical likelihood needs logits of at least 2 classes, C >= 2, got {list(outputs.shape)}; "
                'for one logit per output use likelihood="binary".'
            )
        if self.weight is not None and self.weight.shape != logits.shape[-1:]:
            raise ValueError(
                f"Expected argument `weight` to hold one number for each of {logits.shape[-1]} classes, got shape "
                f"{list(self.weight.shape)}."
            )
        return logits, (self._soft if soft else self._hard)(logits, classes)

    def _class_dim(self, outputs: Tensor, targets: Tensor) -> int:
        if outputs.dim() < 2:
            raise ValueError(
                f"A categorical likelihood needs logits of shape [N, C], [N, C, T] or [N, T, C], got "
                f'{list(outputs.shape)}. For one logit per output use likelihood="binary".'
            )
        choices = (1, -1) if self.class_dim is None and outputs.dim() > 2 else (self.class_dim or 1,)
        fitting = [dim for dim in choices if _fits(outputs, targets, dim)]
        if not fitting:
            raise ValueError(
                f"Targets of a categorical likelihood are class indices [N] or [N, T] (integers), or class "
                f"probabilities of the logits' shape, beside logits {list(outputs.shape)}; got {list(targets.shape)} "
                f"of {targets.dtype}. {_way_out(outputs, targets)}"
            )
        if len(fitting) > 1 and targets.is_floating_point():
            normalised = [dim for dim in fitting if _sum_to_one(targets.sum(dim))]
            fitting = normalised or fitting[:1]
        if len(fitting) > 1:
            raise ValueError(
                f"Logits {list(outputs.shape)} beside targets {list(targets.shape)} hold their classes in "
                "dimension 1 or in the last one: say which, likelihood=Categorical(class_dim=1) or "
                "Categorical(class_dim=-1)."
            )
        return fitting[0]

    def _hard(self, logits: Tensor, targets: Tensor) -> ClassTargets:
        num_classes = logits.shape[-1]
        counted = targets != self.ignore_index
        indices = targets.long().where(counted, 0)
        low, high = (int(extreme) for extreme in indices.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"Class indices must lie in 0 .. {num_classes - 1} for {num_classes} classes, got {low} .. {high}. "
                f"Tokens that do not count carry ignore_index={self.ignore_index}."
            )
        smoothing = self.label_smoothing
        weight = None if self.weight is None else self.weight.to(logits)
        carried = counted.to(logits.dtype) if weight is None else weight[indices] * counted
        num_terms = float((counted if weight is None else carried.double()).sum())
        if smoothing == 0.0:
            return ClassTargets(carried, indices, num_terms)
        q = torch.full_like(logits, smoothing / num_classes, requires_grad=False)
        if weight is not None:
            q *= weight
        q *= counted.unsqueeze(-1)
        q.scatter_add_(-1, indices.unsqueeze(-1), (1 - smoothing) * carried.unsqueeze(-1))
        return ClassTargets(q.sum(-1), q, num_terms)

    def _soft(self, logits: Tensor, targets: Tensor) -> ClassTargets:
        if not bool((targets >= 0).all()):
            raise ValueError(
                'Class probabilities must not be negative. For real-valued targets use likelihood="regression".'
            )
        sums = targets.sum(-1)
        if not _sum_to_one(sums):
            raise ValueError(
                f"Class probabilities must sum to 1 in each row, got sums between "
                f"{sums.min().item():.6g} and {sums.max().item():.6g}. Several labels an example belong to "
                'likelihood="binary", real values to likelihood="regression".'
            )
        q = targets.detach().to(logits.dtype)
        if self.label_smoothing > 0.0:
            q = (1 - self.label_smoothing) * q + self.label_smoothing / logits.shape[-1]
        if self.weight is not None:
            q = q * self.weight.to(logits)
        # PyTorch's mean counts tokens here, not their weights.
        return ClassTargets(q.sum(-1), q, sums.numel())

    @override
    def weighted(self, targets: ClassTargets, weights: Tensor, num_terms: float) -> ClassTargets:
        weights = weights.reshape(targets.total.shape).to(targets.total)
        classes = targets.classes
        if classes.is_floating_point():
            classes = classes * weights.unsqueeze(-1)
        return ClassTargets(targets.total * weights, classes, num_terms)

    @override
    def unit_loss(self, outputs: Tensor, targets: ClassTargets) -> Tensor:
        """−Σ q_c ln softmax(f)_c over examples, tokens and classes."""
        accurate = accumulation_dtype(outputs.device)
        if targets.classes.is_floating_point():
            return -(targets.classes * F.log_softmax(outputs, dim=-1)).sum(dtype=accurate)
        losses = F.cross_entropy(outputs.flatten(0, -2), targets.classes.flatten(), reduction="none")
        return (losses * targets.total.flatten()).sum(dtype=accurate)

    @override
    def sqrt_hessian(self, outputs: Tensor, targets: ClassTargets) -> Tensor:
        """Columns [C-1, N, C] or [T(C-1), N, T, C]: each token's square root, zero on the other tokens."""
        check_root_fits((outputs.shape[-1] - 1) * outputs[0].numel() // outputs.shape[-1], outputs)
        root = sqrt_multinomial(outputs.detach().flatten(0, -2))  # [C-1, N·T, C]
        root *= targets.total.flatten().sqrt().unsqueeze(-1)
        if outputs.dim() == 2:
            return root
        num_examples, num_tokens, num_classes = outputs.shape
        columns = root.new_zeros(num_tokens, len(root), num_examples, num_tokens, num_classes)
        of_own_token = columns.diagonal(dim1=0, dim2=3)  # [C-1, N, C, T]
        of_own_token.copy_(root.unflatten(1, (num_examples, num_tokens)).transpose(2, 3))
        return columns.flatten(0, 1)

    @override
    def hessian_product(self, outputs: Tensor, targets: ClassTargets, tangents: Tensor) -> Tensor:
        """Σ_c q_c (p∘t − p ⟨p, t⟩) of each token, no column formed."""
        p = outputs.detach().softmax(-1)
        # The same for t plus a constant: from the likeliest class, whose p rounds to 1 in a network that is sure of
        # it, nothing is then to cancel.
        likeliest = p.argmax(-1, keepdim=True).expand(*tangents.shape[:-1], 1)
        from_likeliest = tangents.detach() - tangents.detach().gather(-1, likeliest)
        mean = (p * from_likeliest).sum(-1, keepdim=True)
        return from_likeliest.sub_(mean).mul_(p * targets.total.unsqueeze(-1))

    @override
    def sample_columns(
        self, outputs: Tensor, targets: ClassTargets, num_columns: int, generator: torch.Generator
    ) -> Tensor:
        """Columns √(W/S) (e_y − p) with labels y drawn from p, for each token.

        The covariance of a one-hot label is diag(p) − p pᵀ; draws of different tokens are independent and of
        mean zero, so these do not correlate. No [C, N, C] is formed.
        """
        p = outputs.detach().softmax(-1)
        labels = torch.multinomial(p.flatten(0, -2), num_columns, replacement=True, generator=generator)
        labels = labels.mT.reshape(num_columns, *p.shape[:-1], 1)
        columns = -p.expand(num_columns, *p.shape)
        columns = columns.scatter_add(-1, labels, torch.ones_like(labels, dtype=p.dtype))
        return columns * (targets.total / num_columns).sqrt().unsqueeze(-1)

    @override
    def num_terms(self, outputs: Tensor, targets: ClassTargets) -> float:
        """Σ w_y over class indices that are not ignored, N T for class probabilities."""
        return targets.num_terms

    @override
    def null_loss(self, outputs: Tensor, targets: ClassTargets) -> float:
        """Summed weights times ln C; N ln C for N plain examples."""
        return math.log(outputs.shape[-1]) * targets.total.double().sum().item()


def _way_out(outputs: Tensor, targets: Tensor) -> str:
    """What to do with targets that do not fit the logits, as a sentence."""
    whole = not targets.is_floating_point() or bool((targets == targets.round()).all())
    if whole and targets.dim() == 2 and targets.shape[1] == 1 and outputs.shape[1] > 1:
        return "Take their last dimension off and give integers: targets.squeeze(1).long()."
    if not targets.is_floating_point() and targets.shape == outputs.shape:
        return (
            "One-hot targets are class probabilities: targets.float(); several labels an example belong to "
            'likelihood="binary", as targets.float() too.'
        )
    if whole and targets.is_floating_point() and targets.dim() == 1 and outputs.shape[1] > 1:
        return "Whole numbers that name classes are to be integers: targets.long()."
    return kind_of(targets)


def _fits(outputs: Tensor, targets: Tensor, class_dim: int) -> bool:
    """Whether the shapes are those of logits with their classes in this dimension, and of targets."""
    tokens = list(outputs.shape)
    tokens.pop(class_dim)
    return list(targets.shape) == (list(outputs.shape) if targets.is_floating_point() else tokens)


def _sum_to_one(sums: Tensor) -> bool:
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


def sqrt_multinomial(logits: Tensor) -> Tensor:
    """Lower-triangular Cholesky factor of diag(p) − p pᵀ, without its last column of zeros.

    With tail sums q_k = Σ_{j>k} p_j, L_kk = √(p_k q_k / q_{k−1}) and L_ik = −L_kk p_i / q_k for i > k
    (Tanabe & Sagae, *An exact Cholesky decomposition and the generalized inverse of the
    variance-covariance matrix of the multinomial distribution*, JRSS B 54, 1992).

    Args:
        logits: [N, C].

    Returns:
        Columns [C-1, N, C].
    """
    log_p = F.log_softmax(logits, dim=1)
    # log q_{k-1} for k = 0 .. C-1, in logs because tails underflow long before their ratios do.
    tails = log_p.flip(1).logcumsumexp(1).flip(1)
    diagonal = (0.5 * (log_p[:, :-1] + tails[:, 1:] - tails[:, :-1])).exp()
    conditional = (log_p.unsqueeze(1) - tails[:, 1:].unsqueeze(2)).clamp(max=0.0).exp()  # [N, k, i]
    root = torch.triu(-conditional, diagonal=1) * diagonal.unsqueeze(2)
    root.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return root.transpose(0, 1)
