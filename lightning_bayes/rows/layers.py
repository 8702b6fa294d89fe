"""Layers by their derivatives: BackPACK's, those of its first-order extensions, and our own."""

from dataclasses import dataclass
from typing import Protocol

from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
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

from lightning_bayes.rows.own_layers import OWN_DERIVATIVES

__all__ = [
    "AXIS_FREE",
    "CONVOLUTIONS",
    "DERIVATIVES",
    "Derivatives",
    "derivatives_of",
    "pad_beforehand",
    "unfold_input",
]

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
        self, module: nn.Module, local_name: str, inputs: Tensor, output: Tensor, grads: Tensor
    ) -> Tensor:
        """Rows [C, N, *parameter] of one parameter, from the gradients [C, N, …] of its module's output."""
        return self._pulled_back(module, local_name, inputs, output, grads, sum_batch=False)

    def total(
        self, module: nn.Module, local_name: str, inputs: Tensor, output: Tensor, grads: Tensor
    ) -> Tensor:
        """Σ over examples and columns of `rows`, in the parameter's shape."""
        return self._pulled_back(module, local_name, inputs, output, grads, sum_batch=True).sum(0)

    def _pulled_back(
        self,
        module: nn.Module,
        local_name: str,
        inputs: Tensor,
        output: Tensor,
        grads: Tensor,
        sum_batch: bool,
    ) -> Tensor:
        module.input0, module.output = inputs, output
        rows: Tensor = self.derivatives.param_mjp(local_name, module, (), (), grads, sum_batch=sum_batch)
        return rows


DERIVATIVES: dict[type[nn.Module], Derivatives] = {
    nn.Linear: _Backpack(LinearDerivatives()),
    nn.Conv1d: _Backpack(Conv1DDerivatives()),
    nn.Conv2d: _Backpack(Conv2DDerivatives()),
    nn.Conv3d: _Backpack(Conv3DDerivatives()),
    nn.ConvTranspose1d: _Backpack(ConvTranspose1DDerivatives()),
    nn.ConvTranspose2d: _Backpack(ConvTranspose2DDerivatives()),
    nn.ConvTranspose3d: _Backpack(ConvTranspose3DDerivatives()),
    **OWN_DERIVATIVES,
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
