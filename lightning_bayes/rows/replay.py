"""Single calls of modules made ready for torch.func: which argument belongs to which example."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_bayes.capture.example_layout import Layout
from lightning_bayes.capture.module_calls import Call, tensors_of
from lightning_bayes.rows.per_example import ModuleUse

MAX_ARGUMENT_LAYOUTS = 64
"""Combinations of layouts that are tried for the arguments of one call."""


class Replays:
    """Finds out how calls are replayed example by example, and remembers it."""

    def __init__(self) -> None:
        self._found: dict[object, tuple[Layout | None, ...] | None] = {}

    def of(
        self,
        call: Call,
        grads: Sequence[Tensor | None],
        layouts: Sequence[Layout | None],
        parameters: Mapping[str, Tensor],
        num_examples: int,
    ) -> ModuleUse | None:
        """One call of a module, None if it cannot be replayed.

        Args:
            call: The call.
            grads: Gradients in its outputs, [C, *shape], None without influence.
            layouts: Of these outputs.
            parameters: Those that are wanted, by their names within the module.
            num_examples: N.
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
        return self._with_argument_layouts(use, [call.outputs[i] for i in chosen])

    def _with_argument_layouts(self, use: ModuleUse, recorded: list[Tensor]) -> ModuleUse | None:
        """Find the layouts of the arguments: those with which each example by itself gives its own output."""
        tensors = tensors_of(use.arguments)
        key = (use.module, tuple(tensor.dim() for tensor in tensors))
        if key not in self._found or use.num_examples == 1:
            candidates = [_candidates(tensor, use.num_examples) for tensor in tensors]
            tried = itertools.islice(itertools.product(*candidates), MAX_ARGUMENT_LAYOUTS)
            right = (layouts for layouts in tried if _replays(use.with_layouts(layouts), recorded))
            layouts = next(right, None)
            if use.num_examples > 1:  # one example does not tell, and a larger batch may follow
                self._found[key] = layouts
        else:
            layouts = self._found[key]
        return None if layouts is None else use.with_layouts(layouts)


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
    args, kwargs = call.arguments
    module = call.module
    if (
        not isinstance(module, nn.RNNBase)
        or len(args) + len(kwargs) != 1
        or not isinstance(call.input, Tensor)
    ):
        return call.arguments
    inputs = call.input
    batched = inputs.shape[0 if module.batch_first else 1 : 1 if module.batch_first else 2]
    layers = module.num_layers * (2 if module.bidirectional else 1)
    hidden = inputs.new_zeros(layers, *batched, getattr(module, "proj_size", 0) or module.hidden_size)
    if not isinstance(module, nn.LSTM):
        return (inputs, hidden), {}
    return (inputs, (hidden, inputs.new_zeros(layers, *batched, module.hidden_size))), {}
