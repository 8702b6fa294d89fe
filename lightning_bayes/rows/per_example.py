"""Per-example gradients of modules whose derivatives nobody has written down: attention, LSTM, bare parameters.

The smallest module whose call holds every use of a parameter is run again on each example by itself, under
`torch.func.vmap`, and pulled back.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from typing_extensions import override

from lightning_bayes.capture.example_layout import Layout
from lightning_bayes.capture.module_calls import Call, mapped, plain_kernels, tensors_of
from lightning_bayes.rows.backward import BATCHED_BYTES, one_column, vectorised
from lightning_bayes.rows.layers import MAX_TEMPORARY
from lightning_bayes.rows.uses import Use

MAX_ARGUMENT_LAYOUTS = 64
"""Combinations of layouts that are tried for the arguments of one call."""
ArgumentLayouts = dict[tuple[nn.Module, tuple[int, ...]], tuple[Layout | None, ...] | None]
"""Where examples stand in the arguments of a module's calls, by their dimensions; None where none is right."""

_ONE_BY_ONE: "WeakSet[nn.Module]" = WeakSet()
"""Modules whose backward pass cannot be vmapped over columns as well as over examples."""


@dataclass(frozen=True, eq=False)
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
    _last: dict[object, dict[str, Tensor]] = field(default_factory=dict, init=False)
    """What was asked for last, of all parameters: whoever asks for one of them asks for the others next."""
    _examples: dict[int, "ModuleUse"] = field(default_factory=dict, init=False)

    @property
    @override
    def num_columns(self) -> int:
        return len(self.grads[0])

    @override
    def example(self, index: int) -> "ModuleUse":
        if index not in self._examples:  # one use for all parameters
            self._examples[index] = replace(self, weights={index: 1.0})
        return self._examples[index]

    @cached_property
    @override
    def kept_when_formed(self) -> bool:
        # Where they are few, and cost little more than those of one column.
        numbers = self.num_columns * self.num_examples * self._size
        return self.weights is None and self._are_together(slice(None)) and numbers <= MAX_TEMPORARY

    @override
    def rows(self, local_name: str, columns: slice) -> Tensor:
        key = (columns.start, columns.stop)
        return self._of_all(key, lambda: self._pull_back(columns))[local_name]

    @override
    def sum_squares(self, local_name: str) -> Tensor:
        if (None, None) in self._last:  # for the proof
            return self._last[None, None][local_name].square().sum((0, 1))
        return self._of_all("squares", self._squares)[local_name]

    @override
    def one_column(self, columns: Tensor) -> "ModuleUse":
        return replace(self, grads=tuple(one_column(columns, grad) for grad in self.grads))

    @override
    def weighted_total(self, local_name: str, weights: Tensor) -> Tensor:
        return self._of_all(weights, lambda: self._weighted_totals(weights))[local_name]

    def _of_all(self, key: object, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if key not in self._last:
            self._last.clear()
            self._last[key] = make()
        return self._last[key]

    def _squares(self) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        for column in range(self.num_columns):
            for name, rows in self._pull_back(slice(column, column + 1)).items():
                sums[name] += rows.square().sum((0, 1))
        return sums

    def _weighted_totals(self, weights: Tensor) -> dict[str, Tensor]:
        """Σₙ wₙ v₍ₙ,₀₎ of each parameter, some examples at a time."""
        sums = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        for some in torch.arange(self.num_examples).split(max(1, 4 * MAX_TEMPORARY // max(self._size, 1))):
            chosen = dict(zip(some.tolist(), weights[some.to(weights.device)].tolist(), strict=True))
            for name, rows in replace(self, weights=chosen)._pull_back(slice(0, 1)).items():
                sums[name] += rows.sum((0, 1))
        return sums

    @property
    def _size(self) -> int:
        """Numbers in one row of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

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

        with plain_kernels(), vectorised():
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

        chunk = max(1, 4 * MAX_TEMPORARY // max(len(grads[0][0]) * self._size, 1))
        # All columns in one pass where they are small, as in `ColumnPasses`.
        together = self._are_together(columns)
        with plain_kernels(), vectorised():
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
        pairs = zip(tensors_of(self.arguments), self.layouts, strict=True)
        return [(t if layout is None else self._of_chosen(t, layout), layout) for t, layout in pairs]

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


def replayed_call(
    call: Call,
    grads: Sequence[Tensor | None],
    layouts: Sequence[Layout | None],
    parameters: Mapping[str, Tensor],
    num_examples: int,
    known: ArgumentLayouts,
) -> ModuleUse | None:
    """One call of a module, None if it cannot be replayed.

    Args:
        call: The call.
        grads: Gradients in its outputs, [C, *shape], None without influence.
        layouts: Of these outputs.
        parameters: Those that are wanted, by their names within the module.
        num_examples: N.
        known: Layouts of arguments, to which those of this call are added: those with which each example by itself
            gives its own output.
    """
    chosen = [i for i, grad in enumerate(grads) if grad is not None]
    if any(layouts[i] is None for i in chosen):
        return None
    use = ModuleUse(
        module=call.module,
        parameters=parameters,
        arguments=_with_state(call),
        layouts=(),
        outputs=tuple(call.places[i] for i in chosen),
        output_layouts=tuple(layouts[i] for i in chosen),  # type: ignore[misc]
        grads=tuple(grads[i] for i in chosen),  # type: ignore[misc]
        num_examples=num_examples,
    )
    tensors = tensors_of(use.arguments)
    key = (use.module, tuple(tensor.dim() for tensor in tensors))
    if key in known and num_examples > 1:
        its = known[key]
    else:
        candidates = itertools.product(*(_candidates(tensor, num_examples) for tensor in tensors))
        recorded = [call.outputs[i] for i in chosen]
        tried = itertools.islice(candidates, MAX_ARGUMENT_LAYOUTS)
        its = next((its for its in tried if _replays(replace(use, layouts=its), recorded)), None)
        if num_examples > 1:  # one example does not tell, and a larger batch may follow
            known[key] = its
    return None if its is None else replace(use, layouts=its)


def _candidates(tensor: Tensor, num_examples: int) -> list[Layout | None]:
    layouts: list[Layout | None] = [
        Layout(axis) for axis in range(tensor.dim()) if tensor.shape[axis] == num_examples
    ]
    layouts.append(None)
    if tensor.dim() > 0 and tensor.shape[0] % num_examples == 0 and tensor.shape[0] != num_examples:
        layouts += [Layout(0, True), Layout(0, False)]
    return layouts


def _replays(use: ModuleUse, recorded: list[Tensor]) -> bool:
    """Whether each example by itself gives what it gave in the batch."""
    try:
        made = use.replayed()
    except Exception:
        # Somebody's module was given other shapes than it expects, or does what vmap cannot: anything may come.
        return False
    for layout, again, tensor in zip(use.output_layouts, made, recorded, strict=True):
        expected = layout.apart(tensor.detach(), use.num_examples)
        if again.shape != expected.shape:
            return False
        tolerance = 1e3 * torch.finfo(tensor.dtype).eps * expected.abs().max()
        if not bool(((again - expected).abs() <= tolerance).all()):
            return False
    return True


def _with_state(call: Call) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of a call; recurrent layers get the zero state that they would make themselves.

    One that they make under vmap belongs to no example, and their in-place sums then fail.
    """
    module, inputs = call.module, call.input
    without_state = sum(map(len, call.arguments)) == 1 and isinstance(inputs, Tensor)
    if not isinstance(module, nn.RNNBase) or not without_state:
        return call.arguments
    batched = inputs.shape[0 if module.batch_first else 1 : 1 if module.batch_first else 2]
    layers = module.num_layers * (2 if module.bidirectional else 1)
    hidden = inputs.new_zeros(layers, *batched, getattr(module, "proj_size", 0) or module.hidden_size)
    if not isinstance(module, nn.LSTM):
        return (inputs, hidden), {}
    return (inputs, (hidden, inputs.new_zeros(layers, *batched, module.hidden_size))), {}
