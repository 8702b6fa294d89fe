"""The rows of the square root of the generalized Gauss-Newton matrix: G = VᵀV.

With R[c, n] column c of a square root of the Hessian of the loss in output n, and Jₙ the Jacobian of that
output, row (n, c) of V is v₍ₙ,c₎ = JₙᵀR[c, n] ∈ ℝᵖ. One backward pass of Σₙ ⟨f(xₙ), R[c, n]⟩ gives row c of
every example at once: autograd takes it to the *output of each layer*, through whatever graph lies between,
and BackPACK's parameter derivatives (those of its first-order extensions) take it from there to per-example
gradients.

Why not `backpack.extend`: its hooks make each layer's output a view that no in-place operation may touch,
form weight gradients that nobody asked for, and keep one call per module. Our hook notes (input, output) and
hands a clone on, so `x += y`, `relu_` and modules called twice are ordinary graph. The network must be a
throw-away copy all the same: BackPACK reads `input0` and `output` off the module.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

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

from lightning_bayes.curvature.errors import EvidenceUnavailableError
from lightning_bayes.curvature.likelihoods import Likelihood

__all__ = ["DenseRows", "OuterRows", "RowBlock", "RowReader", "Rows", "check_finite", "gram_width"]

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
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class _Use:
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

    def of_example(self, example: int) -> "_Use":
        """The same use, of one example of the batch."""
        one = slice(example, example + 1)
        return replace(self, input=self.input[one], output=self.output[one], grads=self.grads[:, one])

    def positions(self) -> tuple[Tensor, Tensor] | None:
        """The layer as a linear map applied at T positions: inputs [N, T, in] and gradients [C, N, T, out]."""
        if isinstance(self.module, nn.Linear):
            inputs = self.input.reshape(len(self.input), -1, self.input.shape[-1])
            return inputs, self.grads.reshape(*self.grads.shape[:2], -1, self.grads.shape[-1])
        if isinstance(self.module, _CONVOLUTIONS) and self.module.groups == 1:
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
    uses: tuple[tuple[str, _Use], ...]

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
        """See `_Use.positions`; only for a weight that is used once."""
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


def _unsupported_parameters(network: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Those of `names` that no derivative is known for, each with the type of the layer that holds it."""
    wanted = {id(parameter): name for name, parameter in network.named_parameters() if name in names}
    unsupported = {}
    for module in network.modules():
        derivatives = _derivatives_of(module)
        for local_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in wanted and (
                derivatives is None or not hasattr(derivatives, f"_{local_name}_jac_t_mat_prod")
            ):
                unsupported[wanted[id(parameter)]] = type(module).__name__
    return unsupported


def gram_width(network: nn.Module, names: Collection[str]) -> int:
    """Numbers that a row of these parameters is kept as: its length, or a linear layer's outputs only."""
    outer = {
        name: 0 if local_name == "bias" else module.out_features
        for prefix, module in network.named_modules()
        if isinstance(module, nn.Linear)
        for local_name, name in (
            ("weight", f"{prefix}.weight".lstrip(".")),
            ("bias", f"{prefix}.bias".lstrip(".")),
        )
    }
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return sum(outer.get(name, sizes[name]) for name in names)


def _derivatives_of(module: nn.Module) -> BaseParameterDerivatives | None:
    if isinstance(module, _TRANSPOSED) and any(module.output_padding):  # BackPACK gets the shape wrong
        return None
    if isinstance(module, _BATCH_NORMS) and module.running_mean is None:  # mixes examples even in eval mode
        return None
    # A subclass counts only while its forward is the layer's own: LoRA and the like are other functions.
    for layer, derivatives in DERIVATIVES.items():
        if isinstance(module, layer) and type(module).forward is layer.forward:
            return derivatives
    return None


def _pad_beforehand(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
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


class RowReader:
    """Reads the rows of some parameters of a network, one batch at a time.

    Args:
        network: A throw-away copy in eval mode; it is left with hooks and attributes of its own.
        parameters: Names, as in `network.named_parameters()`, of the parameters that carry a prior.

    Raises:
        ValueError: If a parameter belongs to a layer whose rows cannot be formed.
    """

    def __init__(self, network: nn.Module, parameters: Collection[str]) -> None:
        unsupported = _unsupported_parameters(network, parameters)
        if unsupported:
            listed = ", ".join(f"{name!r} ({layer})" for name, layer in sorted(unsupported.items()))
            raise ValueError(
                f"No per-example gradients for {listed}: supported layers are "
                f"{', '.join(layer.__name__ for layer in DERIVATIVES)} with their own forward (not "
                "transposed convolutions with output_padding, nor batch norm without running statistics). Hold "
                "these parameters fixed (requires_grad=False, weight_decay 0 in their optimizer group, or a prior "
                "precision of 0); other layers are not supported yet."
            )
        named = dict(network.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in parameters}
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._checked = False
        self._layers: dict[nn.Module, dict[str, str]] = {}
        for module in network.modules():
            local = {
                local_name: self._names[id(parameter)]
                for local_name, parameter in module.named_parameters(recurse=False)
                if id(parameter) in self._names
            }
            if local:
                self._layers[module] = local
                if isinstance(module, _CONVOLUTIONS):
                    _pad_beforehand(module)

    def read(self, forward: Callable[[], tuple[Tensor, Tensor]], likelihood: Likelihood) -> RowBlock:
        """Run one batch through the network and return its rows.

        Args:
            forward: Runs the network and returns its outputs, with their graph, and the targets.
            likelihood: Of the targets given the outputs.

        Raises:
            EvidenceUnavailableError: If the outputs, targets or gradients are not finite.
            ValueError: If outputs and targets do not fit the likelihood, or if autograd disagrees with the
                rows: a parameter is used outside its layer's forward, or examples are not independent.
        """
        with torch.enable_grad(), self._recording():
            outputs, targets = forward()
            if not isinstance(outputs, Tensor):
                raise ValueError(
                    f"The network returned {type(outputs).__name__}; the evidence needs one tensor of logits or "
                    "means, [N, C] or [N]. Wrap it in a module that returns that tensor."
                )
            check_finite(outputs, "the network's outputs")
            if targets.is_floating_point():
                check_finite(targets, "the targets")
            outputs, targets = likelihood.prepare(outputs, targets)
            unit_loss = likelihood.unit_loss(outputs, targets)
        if not unit_loss.requires_grad:
            raise ValueError(
                "The network's outputs carry no graph back to its parameters: they were detached or computed "
                "under no_grad."
            )
        names = list(self.parameters)
        gradient = torch.autograd.grad(
            unit_loss, list(self.parameters.values()), retain_graph=True, materialize_grads=True
        )
        for name, part in zip(names, gradient, strict=True):
            check_finite(part, f"the gradient of the parameter {name!r}")
        roots = likelihood.sqrt_hessian(outputs)
        uses = self._backward(outputs, roots)
        layers = self._assemble(uses)
        if not self._checked:
            self._check_one_example(outputs, roots, layers)
            self._checked = True
        return RowBlock(
            num_examples=len(outputs),
            num_outputs=outputs.shape[1],
            unit_loss=unit_loss.item(),
            gradient=dict(zip(names, gradient, strict=True)),
            layers=layers,
        )

    @contextmanager
    def _recording(self) -> Iterator[None]:
        self._calls = []
        handles = [module.register_forward_hook(self._record, with_kwargs=True) for module in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not output.requires_grad:  # under no_grad, for a metric
            return None
        inputs = args[0] if args else kwargs["input"]
        self._calls.append((module, inputs.detach(), output))
        # In-place operations behind the layer then change the clone, and `output` keeps its gradient.
        return output.clone()

    def _backward(self, outputs: Tensor, roots: Tensor) -> list[_Use]:
        tensors = [output for _, _, output in self._calls]
        if not tensors:
            return []
        columns = [
            torch.autograd.grad(outputs, tensors, column, retain_graph=True, allow_unused=True)
            for column in roots
        ]
        uses = []
        for (module, inputs, output), grads in zip(self._calls, zip(*columns, strict=True), strict=True):
            if grads[0] is None:  # called, but not on the way to the outputs
                continue
            if len(output) != len(outputs):
                raise ValueError(
                    f"Layer {type(module).__name__} of {sorted(self._layers[module].values())} gives "
                    f"{list(output.shape)} for a batch of {len(outputs)} examples: rows need the examples in "
                    "the first dimension. Layers over flattened sequences are not supported yet; hold their "
                    "parameters fixed (requires_grad=False)."
                )
            derivatives = _derivatives_of(module)
            uses.append(_Use(module, derivatives, inputs, output.detach(), torch.stack(grads)))
        return uses

    def _assemble(self, uses: list[_Use]) -> list[Rows]:
        by_parameter: dict[str, list[tuple[str, _Use]]] = defaultdict(list)
        for use in uses:
            for local_name, name in self._layers[use.module].items():
                by_parameter[name].append((local_name, use))
        layers: list[Rows] = []
        for use in uses:
            local = self._layers[use.module]
            once = all(len(by_parameter.get(name, ())) == 1 for name in local.values())
            if isinstance(use.module, nn.Linear) and use.input.dim() == 2 and once:
                layers.append(OuterRows(local.get("weight"), local.get("bias"), use.input, use.grads))
                for name in local.values():
                    del by_parameter[name]
        for name, its_uses in by_parameter.items():
            layers.append(DenseRows(name, self.parameters[name].shape, tuple(its_uses)))
        return layers

    def _check_one_example(self, outputs: Tensor, roots: Tensor, layers: list[Rows]) -> None:
        """Hold the summed rows of one example against plain autograd, once for each reader.

        This finds what no table of layers can: a weight used by a functional call, a forward that mixes
        examples, a first dimension that is not the batch.
        """
        example = len(outputs) // 2
        seed = torch.zeros_like(outputs)
        seed[example] = roots[:, example].sum(0)
        truths = torch.autograd.grad(
            outputs, list(self.parameters.values()), seed, retain_graph=True, materialize_grads=True
        )
        found = {
            name: rows.sum((0, 1))
            for layer in layers
            for name, rows in layer.of_example(example).dense().items()
        }
        scale = max(truth.abs().max().item() for truth in truths)
        tolerance = 1e3 * torch.finfo(outputs.dtype).eps * scale
        wrong = [
            name
            for name, truth in zip(self.parameters, truths, strict=True)
            if (truth.flatten() - found.get(name, 0.0)).abs().max() > tolerance
        ]
        if wrong:
            raise ValueError(
                f"The per-example gradients of {wrong} do not agree with autograd: the parameter is used "
                "outside its own layer's forward (a functional call, attention), the network mixes the "
                "examples of a batch, or its first dimension is not the batch. This is not supported yet; "
                "hold these parameters fixed (requires_grad=False) or restructure the forward."
            )


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise `EvidenceUnavailableError` unless every entry is finite."""
    finite = tensor.isfinite()
    if not bool(finite.all()):
        raise EvidenceUnavailableError(
            f"{int((~finite).sum())} of {tensor.numel()} entries of {what} are NaN or infinite."
        )
