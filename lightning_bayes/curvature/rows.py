"""The rows of the square root of the generalized Gauss-Newton matrix: G = VᵀV.

With R[c, n] column c of a square root of the Hessian of the loss in output n, and Jₙ the Jacobian of that
output, row (n, c) of V is v₍ₙ,c₎ = JₙᵀR[c, n] ∈ ℝᵖ. One backward pass of Σₙ ⟨f(xₙ), R[c, n]⟩ gives row c of
every example at once: autograd takes it to the *output of each layer*, through whatever graph lies between,
and BackPACK's parameter derivatives (those of its first-order extensions) take it from there to per-example
gradients.

This module knows the layers; `reader` runs the passes.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
from backpack.core.derivatives.conv1d import Conv1DDerivatives
from backpack.core.derivatives.conv2d import Conv2DDerivatives
from backpack.core.derivatives.conv3d import Conv3DDerivatives
from backpack.core.derivatives.conv_transpose1d import ConvTranspose1DDerivatives
from backpack.core.derivatives.conv_transpose2d import ConvTranspose2DDerivatives
from backpack.core.derivatives.conv_transpose3d import ConvTranspose3DDerivatives
from backpack.core.derivatives.linear import LinearDerivatives
from backpack.utils.conv import unfold_input
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "CONVOLUTIONS",
    "DERIVATIVES",
    "DenseRows",
    "LayerUse",
    "OuterRows",
    "RowBlock",
    "Rows",
    "derivatives_of",
    "kept_width",
    "pad_beforehand",
    "unsupported_parameters",
]

DERIVATIVES: dict[type[nn.Module], BaseParameterDerivatives] = {
    nn.Linear: LinearDerivatives(),
    nn.Conv1d: Conv1DDerivatives(),
    nn.Conv2d: Conv2DDerivatives(),
    nn.Conv3d: Conv3DDerivatives(),
    nn.ConvTranspose1d: ConvTranspose1DDerivatives(),
    nn.ConvTranspose2d: ConvTranspose2DDerivatives(),
    nn.ConvTranspose3d: ConvTranspose3DDerivatives(),
    nn.BatchNorm1d: BatchNormNdDerivatives(),
    nn.BatchNorm2d: BatchNormNdDerivatives(),
    nn.BatchNorm3d: BatchNormNdDerivatives(),
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class LayerUse:
    """One call of one layer: its parameters' contribution to the rows of one batch."""

    module: nn.Module
    derivatives: BaseParameterDerivatives
    input: Tensor  # [N, ...]
    output: Tensor  # [N, ...], as the layer made it
    grads: Tensor  # [C, N, ...]: column c's gradient in the output

    def column(self, local_name: str, column: slice) -> Tensor:
        """Per-example gradients [columns, N, *parameter.shape]."""
        self.module.input0, self.module.output = self.input, self.output
        rows: Tensor = self.derivatives.param_mjp(
            local_name, self.module, (), (), self.grads[column], sum_batch=False
        )
        return rows

    def of_example(self, example: int) -> "LayerUse":
        """The same use, of one example of the batch."""
        one = slice(example, example + 1)
        return replace(self, input=self.input[one], output=self.output[one], grads=self.grads[:, one])

    def positions(self) -> tuple[Tensor, Tensor] | None:
        """The layer as a linear map applied at T positions: inputs [N, T, in] and gradients [C, N, T, out]."""
        if isinstance(self.module, nn.Linear):
            inputs = self.input.reshape(len(self.input), -1, self.input.shape[-1])
            return inputs, self.grads.reshape(*self.grads.shape[:2], -1, self.grads.shape[-1])
        if isinstance(self.module, CONVOLUTIONS) and self.module.groups == 1:
            return unfold_input(self.module, self.input).mT, self.grads.flatten(3).mT
        return None


@dataclass(frozen=True)
class OuterRows:
    """Rows of a linear layer that sees each example once: v₍ₙ,c₎ = (g₍ₙ,c₎ aₙᵀ, g₍ₙ,c₎).

    Kept as their two factors: the p-long rows of the weight are never formed.
    """

    weight: str | None
    bias: str | None
    inputs: Tensor  # aₙ [N, in]
    grads: Tensor  # g [C, N, out]

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters in the order of `dense`."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def of_example(self, example: int) -> "OuterRows":
        """The rows of one example of the batch."""
        one = slice(example, example + 1)
        return replace(self, inputs=self.inputs[one], grads=self.grads[:, one])

    def dense(self) -> dict[str, Tensor]:
        """Rows [C, N, p] of each parameter."""
        rows = {}
        if self.weight is not None:
            rows[self.weight] = (self.grads.unsqueeze(3) * self.inputs.unsqueeze(1)).flatten(2)
        if self.bias is not None:
            rows[self.bias] = self.grads
        return rows

    def sum_squares(self) -> dict[str, Tensor]:
        """Σ over rows of v², in the parameters' shapes."""
        squares = self.grads.square().sum(0)  # [N, out]
        sums = {}
        if self.weight is not None:
            sums[self.weight] = squares.mT @ self.inputs.square()
        if self.bias is not None:
            sums[self.bias] = squares.sum(0)
        return sums


@dataclass(frozen=True)
class DenseRows:
    """Rows of one parameter of any other layer, as per-example gradients summed over the parameter's uses."""

    name: str
    shape: torch.Size
    uses: tuple[tuple[str, LayerUse], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter's name, as a tuple of one."""
        return (self.name,)

    def of_example(self, example: int) -> "DenseRows":
        """The rows of one example of the batch."""
        return replace(self, uses=tuple((name, use.of_example(example)) for name, use in self.uses))

    def dense(self) -> dict[str, Tensor]:
        """Rows [C, N, p]."""
        return {self.name: self._columns(slice(None)).flatten(2)}

    def columns(self) -> Iterator[Tensor]:
        """Rows [N, p] of one column after the other: C times less memory than `dense`."""
        for column in range(len(self.uses[0][1].grads)):
            yield self._columns(slice(column, column + 1)).flatten(2).squeeze(0)

    def sum_squares(self) -> dict[str, Tensor]:
        """Σ over rows of v², in the parameter's shape."""
        squares = torch.stack([rows.square().sum(0) for rows in self.columns()]).sum(0)
        return {self.name: squares.reshape(self.shape)}

    def positions(self) -> tuple[Tensor, Tensor] | None:
        """See `LayerUse.positions`; only for a weight that is used once."""
        local_name, use = self.uses[0]
        return use.positions() if len(self.uses) == 1 and local_name == "weight" else None

    def _columns(self, column: slice) -> Tensor:
        total = self.uses[0][1].column(self.uses[0][0], column)
        for local_name, use in self.uses[1:]:
            total = total + use.column(local_name, column)
        return total


Rows = OuterRows | DenseRows


@dataclass(frozen=True)
class RowBlock:
    """Everything that one batch says about the evidence."""

    num_examples: int
    num_outputs: int
    unit_loss: float
    """Summed over the examples, in units of the dispersion."""
    gradient: dict[str, Tensor]
    """Of `unit_loss`, per parameter, in its shape."""
    layers: list[Rows]


def unsupported_parameters(network: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Those of `names` that no derivative is known for, each with the type of the layer that holds it."""
    wanted = {id(parameter): name for name, parameter in network.named_parameters() if name in names}
    unsupported = {}
    for module in network.modules():
        derivatives = derivatives_of(module)
        for local_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in wanted and (
                derivatives is None or not hasattr(derivatives, f"_{local_name}_jac_t_mat_prod")
            ):
                unsupported[wanted[id(parameter)]] = type(module).__name__
    return unsupported


def kept_width(layers: Iterable[Rows]) -> int:
    """Numbers that a row is kept as: its length, but only the outputs of a linear layer with factors."""
    return sum(
        layer.grads.shape[2] if isinstance(layer, OuterRows) else layer.shape.numel() for layer in layers
    )


def derivatives_of(module: nn.Module) -> BaseParameterDerivatives | None:
    """BackPACK's derivatives of a layer, None where there are none or they are wrong."""
    if isinstance(module, _TRANSPOSED) and any(module.output_padding):  # BackPACK gets the shape wrong
        return None
    if isinstance(module, _BATCH_NORMS) and module.running_mean is None:  # mixes examples even in eval mode
        return None
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
