"""Layers by their derivatives: BackPACK's, and our own of layers that it lacks, or takes longer for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
from backpack.core.derivatives.conv1d import Conv1DDerivatives
from backpack.core.derivatives.conv2d import Conv2DDerivatives
from backpack.core.derivatives.conv3d import Conv3DDerivatives
from backpack.core.derivatives.conv_transpose1d import ConvTranspose1DDerivatives
from backpack.core.derivatives.conv_transpose2d import ConvTranspose2DDerivatives
from backpack.core.derivatives.conv_transpose3d import ConvTranspose3DDerivatives
from backpack.core.derivatives.linear import LinearDerivatives
from torch import Tensor, nn
from torch.nn import functional as F

MAX_TEMPORARY = 2**24
"""Numbers that a temporary of per-example gradients may hold where it can be made in pieces."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

AXIS_FREE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
"""Layers that do not ask which of the leading dimensions is the batch's."""


class Derivatives(Protocol):
    """From a layer's input and the gradient in its output to per-example gradients of its parameters."""

    def rows(
        self, module: nn.Module, local_name: str, inputs: Tensor, output: Tensor, grads: Tensor
    ) -> Tensor:
        """Per-example gradients [C, N, *parameter.shape] for gradients [C, N, ...] in the output."""
        ...


@dataclass(frozen=True)
class _Backpack:
    """Derivatives of BackPACK's first-order extensions."""

    derivatives: BaseParameterDerivatives

    def rows(
        self,
        module: nn.Module,
        local_name: str,
        inputs: Tensor,
        output: Tensor,
        grads: Tensor,
        sum_batch: bool = False,
    ) -> Tensor:
        """Rows [C, N, *parameter] of one parameter, or their sum over examples [C, *parameter]."""
        module.input0, module.output = inputs, output
        rows: Tensor = self.derivatives.param_mjp(local_name, module, (), (), grads, sum_batch=sum_batch)
        return rows

    def total(
        self, module: nn.Module, local_name: str, inputs: Tensor, output: Tensor, grads: Tensor
    ) -> Tensor:
        """Σ over examples and columns of `rows`, in the parameter's shape."""
        return self.rows(module, local_name, inputs, output, grads, sum_batch=True).sum(0)


@dataclass(frozen=True)
class _Affine:
    """y = γ ∘ x̂ + β with x̂ what the layer makes of its input without γ and β.

    ∂/∂γ = Σ g ∘ x̂ and ∂/∂β = Σ g, over the dimensions that γ is not spread over: the last are those of a layer norm's
    γ, the one after the batch's those of others, channel by channel.
    """

    normalised: Callable[[Any, Tensor], Tensor]
    by_channel: bool = True

    def rows(
        self, module: nn.Module, local_name: str, inputs: Tensor, output: Tensor, grads: Tensor
    ) -> Tensor:
        """Per-example gradients [C, N, *parameter.shape]."""
        products = grads if local_name == "bias" else grads * self.normalised(module, inputs)
        weight: Any = module.weight
        if (
            self.by_channel and weight.numel() == 1
        ):  # a PReLU's one number for all channels; an example may be one
            return products.reshape(*products.shape[:2], -1).sum(2, keepdim=True)
        first, last = (3, products.dim()) if self.by_channel else (2, products.dim() - weight.dim())
        return products.sum(tuple(range(first, last))) if first < last else products


def _layer_norm(module: Any, inputs: Tensor) -> Tensor:
    return F.layer_norm(inputs, module.normalized_shape, None, None, module.eps)


def _rms_norm(module: Any, inputs: Tensor) -> Tensor:
    return F.rms_norm(inputs, module.normalized_shape, None, module.eps)


def _group_norm(module: Any, inputs: Tensor) -> Tensor:
    return F.group_norm(inputs, module.num_groups, None, None, module.eps)


def _instance_norm(module: Any, inputs: Tensor) -> Tensor:
    mean, variance = module.running_mean, module.running_var  # as in eval mode, if there are any
    return F.instance_norm(inputs, mean, variance, None, None, mean is None, 0.0, module.eps)


def _batch_norm(module: Any, inputs: Tensor) -> Tensor:
    """By running statistics, as in eval mode; BackPACK's einsum takes four times as long."""
    mean, variance = module.running_mean, module.running_var
    return F.batch_norm(inputs, mean, variance, None, None, False, 0.0, module.eps)


def _negative_part(module: Any, inputs: Tensor) -> Tensor:
    """What a PReLU's γ stands before, in max(x, 0) + γ min(x, 0)."""
    return inputs.clamp(max=0)


class _Embedding:
    """Row t of the output is the weight's row of token t: its gradient is added there."""

    def rows(self, module: Any, local_name: str, inputs: Tensor, output: Tensor, grads: Tensor) -> Tensor:
        """Per-example gradients [C, N, vocabulary, features]."""
        tokens, grads = self._masked(module, inputs, grads)
        rows = grads.new_zeros(*grads.shape[:2], *module.weight.shape)
        return rows.scatter_add_(2, tokens.unsqueeze(2).expand(grads.shape), grads)

    def sum_squares(self, module: Any, inputs: Tensor, grads: Tensor) -> Tensor:
        """Σ over rows of v² [vocabulary, features], without rows as long as the vocabulary.

        The gradients of one token are added over its places in an example, at its first place, then squared.
        """
        tokens, grads = self._masked(module, inputs, grads)
        same = tokens.unsqueeze(1) == tokens.unsqueeze(2)  # [N, T, T]
        first = ~same.tril(-1).any(2, keepdim=True)
        collected = same.to(grads) @ grads * first
        total = torch.zeros_like(module.weight)
        return total.index_add_(0, tokens.flatten(), collected.square().sum(0).flatten(0, 1))

    def total(self, module: Any, local_name: str, inputs: Tensor, output: Tensor, grads: Tensor) -> Tensor:
        """Σ over examples and columns of `rows` [vocabulary, features], without forming them."""
        tokens, grads = self._masked(module, inputs, grads)
        total = torch.zeros_like(module.weight)
        return total.index_add_(0, tokens.flatten(), grads.sum(0).flatten(0, 1))

    def _masked(self, module: Any, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, T] and their gradients [C, N, T, features]."""
        tokens = inputs.reshape(len(inputs), -1)
        grads = grads.reshape(*grads.shape[:2], tokens.shape[1], -1)
        if module.padding_idx is not None:  # a constant by definition
            grads = grads.masked_fill((tokens == module.padding_idx).unsqueeze(2), 0.0)
        return tokens, grads


DERIVATIVES: dict[type[nn.Module], Derivatives] = {
    nn.Linear: _Backpack(LinearDerivatives()),
    nn.Conv1d: _Backpack(Conv1DDerivatives()),
    nn.Conv2d: _Backpack(Conv2DDerivatives()),
    nn.Conv3d: _Backpack(Conv3DDerivatives()),
    nn.ConvTranspose1d: _Backpack(ConvTranspose1DDerivatives()),
    nn.ConvTranspose2d: _Backpack(ConvTranspose2DDerivatives()),
    nn.ConvTranspose3d: _Backpack(ConvTranspose3DDerivatives()),
    nn.LayerNorm: _Affine(_layer_norm, by_channel=False),
    nn.RMSNorm: _Affine(_rms_norm, by_channel=False),
    nn.BatchNorm1d: _Affine(_batch_norm),
    nn.BatchNorm2d: _Affine(_batch_norm),
    nn.BatchNorm3d: _Affine(_batch_norm),
    nn.GroupNorm: _Affine(_group_norm),
    nn.InstanceNorm1d: _Affine(_instance_norm),
    nn.InstanceNorm2d: _Affine(_instance_norm),
    nn.InstanceNorm3d: _Affine(_instance_norm),
    nn.PReLU: _Affine(_negative_part),
    nn.Embedding: _Embedding(),
}


def derivatives_of(module: nn.Module) -> Derivatives | None:
    """Derivatives of a layer, None where there are none or they are wrong."""
    if isinstance(module, _TRANSPOSED) and any(module.output_padding):  # BackPACK gets the shape wrong
        return None
    if isinstance(module, _BATCH_NORMS) and module.running_mean is None:  # mixes examples even in eval mode
        return None
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None  # its forward changes the weight, or its gradient is not that of its forward
    if any(
        isinstance(t, Tensor) and t.is_complex()
        for t in (getattr(module, n, None) for n in ("weight", "bias"))
    ):
        return None  # a row has the real and imaginary parts
    # A subclass counts only while its forward is the layer's own: LoRA and the like are other functions.
    for layer, derivatives in DERIVATIVES.items():
        if isinstance(module, layer) and type(module).forward is layer.forward:
            return derivatives
    return None


def pad_beforehand(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Turn padding that BackPACK does not know ("same", circular, ...) into a pre-hook of the layer."""
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return
    widths: list[int] = []  # last dimension first, as F.pad wants them
    for axis in reversed(range(len(module.kernel_size))):
        total = module.dilation[axis] * (module.kernel_size[axis] - 1) if module.padding == "same" else 0
        own = (
            (total // 2, total - total // 2)
            if isinstance(module.padding, str)
            else (module.padding[axis],) * 2
        )
        widths += own
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    module.register_forward_pre_hook(lambda _, args: (F.pad(args[0], widths, mode=mode), *args[1:]))
    module.padding, module.padding_mode = (0,) * len(module.kernel_size), "zeros"


def convolved(module: Any, inputs: Tensor, kernel: Tensor) -> Tensor:
    """What a convolution would make with one channel of this kernel, flat: a·v at each position."""
    convolution = (F.conv1d, F.conv2d, F.conv3d)[inputs.dim() - 3]
    shaped = kernel.view(1, *module.weight.shape[1:])
    made: Tensor = convolution(inputs, shaped, None, module.stride, module.padding, module.dilation)
    return made


def outer_squares(inputs: Tensor, grads: Tensor) -> Tensor:
    """Σ over examples and columns of (Σₜ gₜ aₜᵀ)², entry by entry, from a [N, T, in] and g [C, N, T, out].

    Σ over pairs of positions of (gₜ ∘ gₛ)(aₜ ∘ aₛ)ᵀ while that is less work.
    """
    positions = inputs.shape[1]
    total = inputs.new_zeros(grads.shape[3], inputs.shape[2])
    if positions < 2 * len(grads):
        left, right = torch.triu_indices(positions, positions, device=inputs.device)
        twice = torch.where(left == right, 1.0, 2.0).to(inputs).unsqueeze(1)
        step = max(1, MAX_TEMPORARY // (len(left) * max(grads.shape[3] * len(grads), inputs.shape[2])))
        for start in range(0, len(inputs), step):
            some = slice(start, start + step)
            g = (grads[:, some, left] * grads[:, some, right]).sum(0) * twice
            a = inputs[some, left] * inputs[some, right]
            total.addmm_(g.flatten(0, 1).mT, a.flatten(0, 1))
        return total
    step = max(1, MAX_TEMPORARY // total.numel())
    for column in grads:
        for start in range(0, len(inputs), step):
            some = slice(start, start + step)
            total += torch.bmm(column[some].mT, inputs[some]).square_().sum(0)
    return total
