"""Per-example gradients of modules whose derivatives nobody has written down: attention, LSTM, bare parameters.

The smallest module whose call holds every use of a parameter is run again on each example by itself, under
`torch.func.vmap`, and pulled back. Where no module call does, autograd goes back from each output of each
example in turn.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from typing_extensions import override

from lightning_bayes.capture.example_layout import Layout
from lightning_bayes.capture.module_calls import mapped, plain_kernels, tensors_of
from lightning_bayes.rows.backward import BATCHED_BYTES, one_column, quiet_loops
from lightning_bayes.rows.uses import CHUNK, Use

_ONE_BY_ONE: "WeakSet[nn.Module]" = WeakSet()
"""Modules whose backward pass cannot be vmapped over columns as well as over examples."""


@dataclass(frozen=True)
class ModuleUse(Use):
    """One call of a module, replayed example by example.

    Attributes:
        module: The module; its own parameters serve as constants, except for `parameters`.
        parameters: Names within the module whose gradients are wanted.
        arguments: (args, kwargs) of the call.
        layouts: Of each tensor among the arguments; None for one that all examples share.
        outputs: Places, among the tensors of what it returns, of those that carry a gradient.
        output_layouts: Of these.
        grads: Gradients in these, [C, *shape].
        num_examples: N.
        weights: Of the examples that are asked for, None for all with weight 1.
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    layouts: tuple[Layout | None, ...]
    outputs: tuple[int, ...]
    output_layouts: tuple[Layout, ...]
    grads: tuple[Tensor, ...]
    num_examples: int
    weights: Mapping[int, float] | None = None
    _cache: dict[object, dict[str, Tensor]] = field(default_factory=dict, compare=False)
    _combined: dict[object, "ModuleUse"] = field(default_factory=dict, compare=False)

    @property
    @override
    def num_columns(self) -> int:
        return len(self.grads[0])

    @override
    def combined(self, weights: Mapping[int, float]) -> "ModuleUse":
        key = tuple(weights.items())
        if key not in self._combined:  # one use for all parameters, which share its cache
            grads = tuple(grad.sum(0, keepdim=True) for grad in self.grads)
            self._combined[key] = replace(self, grads=grads, weights=weights, _cache={}, _combined={})
        return self._combined[key]

    @cached_property
    def kept_when_formed(self) -> bool:
        """See `Use`: where they are few, and cost little more than those of one column."""
        numbers = self.num_columns * self.num_examples * sum(p.numel() for p in self.parameters.values())
        return self.weights is None and self._are_together(slice(None)) and numbers <= CHUNK

    def rows(self, local_name: str, columns: slice) -> Tensor:
        """See `Use`. All parameters are done in one go, and kept for those that are asked for next."""
        key = (columns.start, columns.stop)
        if key not in self._cache:
            self._cache.clear()
            self._cache[key] = self._pull_back(columns)
        return self._cache[key][local_name]

    @override
    def sum_squares(self, local_name: str) -> Tensor:
        if (None, None) in self._cache:  # for the proof
            return self._cache[None, None][local_name].square().sum((0, 1))
        if "squares" not in self._cache:
            sums: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
            for column in range(self.num_columns):
                for name, rows in self._pull_back(slice(column, column + 1)).items():
                    sums[name] += rows.square().sum((0, 1))
            self._cache["squares"] = sums
        return self._cache["squares"][local_name]

    @override
    def one_column(self, columns: Tensor) -> "ModuleUse":
        grads = tuple(one_column(columns, grad) for grad in self.grads)
        return replace(self, grads=grads, _cache={}, _combined={})

    def weighted_total(self, local_name: str, weights: Tensor) -> Tensor:
        """See `Use`. All parameters are done in one go, some examples at a time."""
        if "total" not in self._cache:
            size = sum(p.numel() for p in self.parameters.values())
            sums: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
            for some in torch.arange(self.num_examples).split(max(1, 4 * CHUNK // max(size, 1))):
                chosen = dict(zip(some.tolist(), weights[some.to(weights.device)].tolist(), strict=True))
                part = replace(self, weights=chosen, _cache={}, _combined={})
                for name, rows in part._pull_back(slice(0, 1)).items():
                    sums[name] += rows.sum((0, 1))
            self._cache["total"] = sums
        return self._cache["total"][local_name]

    def with_layouts(self, layouts: Sequence[Layout | None]) -> "ModuleUse":
        """The same call with these layouts of its arguments."""
        return replace(self, layouts=tuple(layouts), _cache={}, _combined={})

    def replayed(self) -> list[Tensor]:
        """The outputs again, each example by itself, as [N, ...]: to be held against the recorded ones."""
        tensors = [tensor for tensor, layout in self._apart() if layout is not None]
        if not tensors:
            raise ValueError("no argument that belongs to the examples")

        def of_one(*tensors: Tensor) -> list[Tensor]:
            # Under vjp as in `_pull_back`: vmap alone does not take recurrent layers apart.
            made: list[Tensor] = vjp(
                lambda parameters: self._outputs(parameters)(*tensors), dict(self.parameters)
            )[0]
            return made

        with plain_kernels(), _vectorised():
            made: list[Tensor] = vmap(of_one, randomness="same")(*tensors)
        return [tensor.detach() for tensor in made]

    def _pull_back(self, columns: slice) -> dict[str, Tensor]:
        """Rows [columns, N, *shape] of each parameter."""
        tensors = [tensor for tensor, layout in self._apart() if layout is not None]
        grads = [
            torch.stack([self._of_chosen(grad, layout) for grad in all_grads[columns]], 1)
            for layout, all_grads in zip(self.output_layouts, self.grads, strict=True)
        ]  # each [N, columns, ...]
        if self.weights is not None:
            scale = grads[0].new_tensor(list(self.weights.values()))
            grads = [scale.reshape(-1, *[1] * (grad.dim() - 1)) * grad for grad in grads]

        def of_one(grads: list[Tensor], *tensors: Tensor) -> dict[str, Tensor]:
            pull = vjp(lambda parameters: self._outputs(parameters)(*tensors), dict(self.parameters))[1]
            if together:
                every: dict[str, Tensor] = vmap(lambda *column: pull(list(column))[0], randomness="same")(
                    *grads
                )
                return every
            rows = [pull([grad[column] for grad in grads])[0] for column in range(len(grads[0]))]
            return {name: torch.stack([row[name] for row in rows]) for name in self.parameters}

        width = len(grads[0][0]) * sum(p.numel() for p in self.parameters.values())
        chunk = max(1, 4 * CHUNK // max(width, 1))
        # All columns in one pass where they are small, as in `ColumnPasses`.
        together = self._are_together(columns)
        with plain_kernels(), _vectorised():
            try:
                rows = vmap(of_one, randomness="same", chunk_size=chunk)(grads, *tensors)
            except RuntimeError:
                if not together:
                    raise
                _ONE_BY_ONE.add(self.module)  # not every operation's backward pass can be vmapped twice
                return self._pull_back(columns)
        return {name: value.transpose(0, 1).detach() for name, value in rows.items()}

    def _are_together(self, columns: slice) -> bool:
        """Whether some columns are pulled back in one pass."""
        size = max(grad[0].numel() * grad.element_size() for grad in self.grads)
        several = len(self.grads[0][columns]) > 1
        return several and size <= BATCHED_BYTES and self.module not in _ONE_BY_ONE

    def _apart(self) -> list[tuple[Tensor, Layout | None]]:
        pairs = []
        for tensor, layout in zip(tensors_of(self.arguments), self.layouts, strict=True):
            pairs.append((tensor if layout is None else self._of_chosen(tensor, layout), layout))
        return pairs

    def _of_chosen(self, tensor: Tensor, layout: Layout) -> Tensor:
        apart = layout.apart(tensor, self.num_examples)
        return apart if self.weights is None else apart[list(self.weights)]

    def _outputs(self, parameters: Mapping[str, Tensor]) -> Any:
        """The function of one example's tensors to the outputs that carry a gradient."""

        def outputs(*tensors: Tensor) -> list[Tensor]:
            own = iter(tensors)
            shared = iter(self._apart())

            def fill(_: Tensor) -> Tensor:
                tensor, layout = next(shared)
                return tensor if layout is None else next(own)

            args, kwargs = mapped(fill, self.arguments)
            made = tensors_of(functional_call(self.module, dict(parameters), args, kwargs))
            return [made[place] for place in self.outputs]

        return outputs


@contextmanager
def _vectorised() -> Iterator[None]:
    """Recurrent layers by operations that vmap knows, and loops inside vmap without its remark on them."""
    onednn: Any = torch.backends.mkldnn
    enabled = onednn.enabled
    onednn.enabled = False  # `onednn.flags` sets TF32 along with it, on which torch remarks
    try:
        with quiet_loops():
            yield
    finally:
        onednn.enabled = enabled


@dataclass(frozen=True)
class GraphUse(Use):
    """A parameter's whole way to the outputs, by one backward pass for each row: right for anything, and slow."""

    parameter: Tensor
    outputs: Tensor
    roots: Tensor  # [C, N, ...]
    chosen: Sequence[int]

    @property
    @override
    def num_columns(self) -> int:
        return len(self.roots)

    @override
    def combined(self, weights: Mapping[int, float]) -> "GraphUse":
        roots = self.roots.sum(0, keepdim=True)
        for example, weight in weights.items():
            roots[:, example] *= weight
        return replace(self, roots=roots, chosen=list(weights))

    @override
    def rows(self, local_name: str, columns: slice) -> Tensor:
        return torch.stack(
            [torch.stack([self._row(root, n) for n in self.chosen]) for root in self.roots[columns]]
        )

    @override
    def one_column(self, columns: Tensor) -> "GraphUse":
        return replace(self, roots=one_column(columns, self.roots))

    @override
    def weighted_total(self, local_name: str, weights: Tensor) -> Tensor:
        seed = weights.reshape(-1, *[1] * (self.roots.dim() - 2)).to(self.roots) * self.roots[0]
        (total,) = torch.autograd.grad(
            self.outputs, self.parameter, seed, retain_graph=True, materialize_grads=True
        )
        return total

    def _row(self, root: Tensor, example: int) -> Tensor:
        seed = torch.zeros_like(self.outputs)
        seed[example] = root[example]
        (row,) = torch.autograd.grad(
            self.outputs, self.parameter, seed, retain_graph=True, materialize_grads=True
        )
        return row
