"""Runs a network over batches and reads the rows of its layers.

Why not `backpack.extend`: its hooks make each layer's output a view that no in-place operation may touch,
form weight gradients that nobody asked for, and keep one call per module. The hook here notes (input, output)
and hands a clone on, so `x += y`, `relu_` and modules called twice are ordinary graph. The network must be a
throw-away copy all the same: BackPACK reads `input0` and `output` off the module.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bayes.curvature.errors import check_finite
from lightning_bayes.curvature.likelihoods import Likelihood
from lightning_bayes.curvature.rows import (
    CONVOLUTIONS,
    DenseRows,
    LayerUse,
    OuterRows,
    RowBlock,
    Rows,
    derivatives_of,
    pad_beforehand,
)

__all__ = ["BatchRows", "RowReader", "forward_of"]

CHUNK_BYTES = 5e8
"""Gradients in layer outputs that are held at one time, one column of the root at least."""


@dataclass(frozen=True)
class BatchRows:
    """Everything that one batch says about the evidence; sums over its examples."""

    num_examples: int
    num_terms: float
    """What PyTorch's mean-reduced loss divides by."""
    unit_loss: float
    """In units of the dispersion."""
    null_loss: float | None
    """Of guessing."""
    gradient: dict[str, Tensor]
    """Of `unit_loss`, per parameter, in its shape."""
    blocks: Iterator[RowBlock]
    """To be consumed once, before the next batch is read."""


class RowReader:
    """Reads the rows of some parameters of a network, one batch at a time.

    Args:
        network: A throw-away copy in eval mode; it is left with hooks and attributes of its own.
        parameters: Names, as in `network.named_parameters()`, of the parameters that carry a prior.

    Raises:
        ValueError: If a parameter belongs to a layer whose rows cannot be formed.
    """

    def __init__(
        self, network: nn.Module, parameters: Collection[str], num_samples: int | None = None
    ) -> None:
        named = dict(network.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in parameters}
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._checked = False
        self._num_samples = num_samples
        self._generator: torch.Generator | None = None
        self._layers: dict[nn.Module, dict[str, str]] = {}
        for module in network.modules():
            local = {
                local_name: self._names[id(parameter)]
                for local_name, parameter in module.named_parameters(recurse=False)
                if id(parameter) in self._names
            }
            if local:
                self._layers[module] = local
                if isinstance(module, CONVOLUTIONS):
                    pad_beforehand(module)

    def read(self, forward: Callable[[], tuple[Tensor, Tensor]], likelihood: Likelihood) -> BatchRows:
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
            outputs, targets, unit_loss = forward_of(forward, likelihood)
        names = list(self.parameters)
        gradient = torch.autograd.grad(
            unit_loss, list(self.parameters.values()), retain_graph=True, materialize_grads=True
        )
        for name, part in zip(names, gradient, strict=True):
            check_finite(part, f"the gradient of the parameter {name!r}")
        return BatchRows(
            num_examples=len(outputs),
            num_terms=likelihood.num_terms(outputs, targets),
            unit_loss=unit_loss.item(),
            null_loss=likelihood.null_loss(outputs, targets),
            gradient=dict(zip(names, gradient, strict=True)),
            blocks=self._blocks(outputs, self._roots(outputs, targets, likelihood)),
        )

    def _roots(self, outputs: Tensor, targets: Tensor, likelihood: Likelihood) -> Tensor:
        if self._num_samples is None:
            return likelihood.sqrt_hessian(outputs, targets)
        if self._generator is None:  # one stream for all batches of a pass
            self._generator = torch.Generator(device=outputs.device).manual_seed(0)
        return likelihood.sample_columns(outputs, targets, self._num_samples, self._generator)

    def _blocks(self, outputs: Tensor, roots: Tensor) -> Iterator[RowBlock]:
        """The rows, as many columns at a time as `CHUNK_BYTES` hold gradients of."""
        calls = self._calls
        width = sum(output.numel() * output.element_size() for _, _, output in calls)
        step = max(1, int(CHUNK_BYTES // max(width, 1)))
        for start in range(0, len(roots), step):
            columns = slice(start, min(start + step, len(roots)))
            layers = self._assemble(self._backward(calls, outputs, roots[columns]))
            if not self._checked:
                self._check_one_example(outputs, roots[columns], layers)
                self._checked = True
            yield RowBlock(len(outputs), columns, len(roots), layers)

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

    def _backward(
        self, calls: list[tuple[nn.Module, Tensor, Tensor]], outputs: Tensor, roots: Tensor
    ) -> list[LayerUse]:
        tensors = [output for _, _, output in calls]
        if not tensors:
            return []
        columns = [
            torch.autograd.grad(outputs, tensors, column, retain_graph=True, allow_unused=True)
            for column in roots
        ]
        uses = []
        for (module, inputs, output), grads in zip(calls, zip(*columns, strict=True), strict=True):
            if grads[0] is None:  # called, but not on the way to the outputs
                continue
            if len(output) != len(outputs):
                raise ValueError(
                    f"Layer {type(module).__name__} of {sorted(self._layers[module].values())} gives "
                    f"{list(output.shape)} for a batch of {len(outputs)} examples: rows need the examples in "
                    "the first dimension. Layers over flattened sequences are not supported yet; hold their "
                    "parameters fixed (requires_grad=False)."
                )
            derivatives = derivatives_of(module)
            if derivatives is not None:
                uses.append(LayerUse(module, derivatives, inputs, output.detach(), torch.stack(grads)))
        return uses

    def _assemble(self, uses: list[LayerUse]) -> list[Rows]:
        by_parameter: dict[str, list[tuple[str, LayerUse]]] = defaultdict(list)
        for use in uses:
            for local_name, name in self._layers[use.module].items():
                by_parameter[name].append((local_name, use))
        layers: list[Rows] = []
        for name, its_uses in by_parameter.items():
            local_names = {local_name for local_name, _ in its_uses}
            if len(local_names) > 1 or not all(use.is_linear for _, use in its_uses):
                layers.append(DenseRows(name, self.parameters[name].shape, tuple(its_uses)))
        outer: dict[tuple[int, ...], dict[str, str]] = defaultdict(dict)
        done = {layer.name for layer in layers if isinstance(layer, DenseRows)}
        for name, its_uses in by_parameter.items():
            if name not in done:
                outer[tuple(id(use) for _, use in its_uses)][its_uses[0][0]] = name
        found = {id(use): use for use in uses}
        for key, local in outer.items():
            its = tuple(found[i] for i in key)
            layers.append(OuterRows(local.get("weight"), local.get("bias"), its))
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


def forward_of(
    forward: Callable[[], tuple[Tensor, Tensor]], likelihood: Likelihood
) -> tuple[Tensor, Tensor, Tensor]:
    """Prepared outputs, with their graph, targets, and the summed unit loss of one batch.

    Raises:
        EvidenceUnavailableError: If outputs or targets are not finite.
        ValueError: If they do not fit the likelihood, or carry no graph.
    """
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
    return outputs, targets, unit_loss
