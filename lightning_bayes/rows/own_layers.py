"""Parameter derivatives of layers that BackPACK's first-order extensions lack, or take longer for.

Each takes a layer's input and the gradients [C, N, ...] in its output to per-example gradients
[C, N, *parameter.shape].
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Affine:
    """y = γ ∘ x̂ + β with x̂ what the layer makes of its input without γ and β.

    ∂/∂γ = Σ g ∘ x̂ and ∂/∂β = Σ g, over the dimensions that γ is spread over.
    """

    def rows(
        self, module: nn.Module, local_name: str, inputs: Tensor, output: Tensor, grads: Tensor
    ) -> Tensor:
        """Per-example gradients [C, N, *parameter.shape]."""
        products = grads if local_name == "bias" else grads * self.normalised(module, inputs)
        return self.summed(module, products)

    def normalised(self, module: Any, inputs: Tensor) -> Tensor:
        """x̂ [N, ...]."""
        raise NotImplementedError

    def summed(self, module: Any, products: Tensor) -> Tensor:
        """Sum [C, N, ...] over all dimensions that the parameter does not have."""
        raise NotImplementedError


class _LastDimensions(_Affine):
    """Layers whose parameters stand for the last dimensions of the input."""

    def summed(self, module: Any, products: Tensor) -> Tensor:
        between = range(2, products.dim() - module.weight.dim())
        return products.sum(tuple(between)) if between else products


class _LayerNorm(_LastDimensions):
    def normalised(self, module: Any, inputs: Tensor) -> Tensor:
        return F.layer_norm(inputs, module.normalized_shape, None, None, module.eps)


class _RMSNorm(_LastDimensions):
    def normalised(self, module: Any, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, module.normalized_shape, None, module.eps)


class _Channels(_Affine):
    """Layers with one γ and one β for each channel, the dimension after the batch's."""

    def summed(self, module: Any, products: Tensor) -> Tensor:
        return products.sum(tuple(range(3, products.dim()))) if products.dim() > 3 else products


class _GroupNorm(_Channels):
    def normalised(self, module: Any, inputs: Tensor) -> Tensor:
        return F.group_norm(inputs, module.num_groups, None, None, module.eps)


class _InstanceNorm(_Channels):
    def normalised(self, module: Any, inputs: Tensor) -> Tensor:
        own = module.running_mean is None  # else running statistics, as in eval mode
        return F.instance_norm(
            inputs, module.running_mean, module.running_var, None, None, own, 0.0, module.eps
        )


class _BatchNorm(_Channels):
    """By running statistics, as in eval mode; BackPACK's einsum takes four times as long."""

    def normalised(self, module: Any, inputs: Tensor) -> Tensor:
        return F.batch_norm(
            inputs, module.running_mean, module.running_var, None, None, False, 0.0, module.eps
        )


class _PReLU(_Channels):
    """y = max(x, 0) + γ min(x, 0), γ one number or one for each channel."""

    def normalised(self, module: Any, inputs: Tensor) -> Tensor:
        return inputs.clamp(max=0)

    def summed(self, module: Any, products: Tensor) -> Tensor:
        if module.num_parameters == 1:
            flat = products.reshape(*products.shape[:2], -1)  # an example may be one number
            return flat.sum(2, keepdim=True)
        return super().summed(module, products)


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


OWN_DERIVATIVES: dict[type[nn.Module], Any] = {
    nn.LayerNorm: _LayerNorm(),
    nn.BatchNorm1d: _BatchNorm(),
    nn.BatchNorm2d: _BatchNorm(),
    nn.BatchNorm3d: _BatchNorm(),
    nn.GroupNorm: _GroupNorm(),
    nn.InstanceNorm1d: _InstanceNorm(),
    nn.InstanceNorm2d: _InstanceNorm(),
    nn.InstanceNorm3d: _InstanceNorm(),
    nn.PReLU: _PReLU(),
    nn.RMSNorm: _RMSNorm(),
    nn.Embedding: _Embedding(),
}
