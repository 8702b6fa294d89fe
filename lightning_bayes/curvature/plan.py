"""Which way each parameter's rows are read: by its layer's derivatives, by torch.func, or from the graph.

A plan is made on the first batch and proved there: the rows of one example must be autograd's. That finds
what no table of layers can: a weight that a functional call uses too, a forward of somebody's own, a first
dimension that is not the batch's. What fails goes to the next larger module that is called, and in the end to
the graph itself.
"""

import itertools
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_bayes.curvature.calls import Call
from lightning_bayes.curvature.functional_rows import GraphUse, ModuleUse
from lightning_bayes.curvature.layout import (
    Layout,
    example_weights,
    find_layout,
    mixes_examples,
    tensors_of,
)
from lightning_bayes.curvature.rows import (
    AXIS_FREE,
    DenseRows,
    LayerUse,
    OuterRows,
    Rows,
    Use,
    derivatives_of,
)

__all__ = ["Batch", "Plan", "make_plan"]

LAYER, GRAPH = "by the layer's derivatives", "from the graph"
"""Ways that are not the name of a module."""
MAX_ARGUMENT_LAYOUTS = 64
"""Combinations of layouts that are tried for the arguments of one call."""


@dataclass(frozen=True)
class Batch:
    """One batch after its backward passes, for some columns of the root."""

    calls: list[Call]
    outputs: Tensor  # [N, ...]
    roots: Tensor  # [C, N, ...]
    grads: list[list[Tensor | None]]
    """Of each call, of each of its outputs: [C, *shape], None without influence."""

    @classmethod
    def backward(cls, calls: list[Call], outputs: Tensor, roots: Tensor) -> "Batch":
        """Take each column of the root back to the outputs of the calls."""
        tensors = [tensor for call in calls for tensor in call.outputs]
        columns = [_gradients(outputs, tensors, column) for column in roots]
        stacked = [None if grads[0] is None else torch.stack(grads) for grads in zip(*columns, strict=True)]
        found = iter(stacked)
        return cls(calls, outputs, roots, [[next(found) for _ in call.outputs] for call in calls])

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.outputs)

    def of(self, module: nn.Module) -> list[tuple[Call, list[Tensor | None]]]:
        """The calls of one module that the outputs depend on."""
        return [
            (call, grads)
            for call, grads in zip(self.calls, self.grads, strict=True)
            if call.module is module and _counts(grads)
        ]


@dataclass
class Plan:
    """The way of each parameter, and where the examples stand in what the modules return."""

    network: nn.Module
    parameters: Mapping[str, nn.Parameter]
    ways: dict[str, str]
    layouts: dict[nn.Module, tuple[Layout | None, ...]]
    """Of the outputs that carry a gradient, by module; None where calls differ, or examples cannot be told."""
    num_examples: int
    """Of the batch that it was made for: one example does not tell where those of a batch stand."""
    argument_layouts: dict[object, tuple[Layout | None, ...] | None] = field(default_factory=dict)

    @property
    def modules(self) -> list[nn.Module]:
        """Modules whose calls have to be recorded."""
        hosts = {self.network.get_submodule(way) for way in self.ways.values() if way not in (LAYER, GRAPH)}
        layers = {module for module, local in self._layers().items() if local}
        return [module for module in self.network.modules() if module in hosts or module in layers]

    def fits(self, calls: list[Call], num_examples: int) -> bool:
        """Whether the calls of a batch can be what the plan was made for."""
        if self.num_examples == 1 < num_examples:
            return False
        for call in calls:
            if call.module not in self.layouts:  # not on the way to the outputs so far
                continue
            layouts = self.layouts[call.module]
            if len(layouts) != len(call.outputs):
                return False
            for layout, tensor in zip(layouts, call.outputs, strict=True):
                if layout is not None and tensor.numel() > 0 and not layout.fits(tensor, num_examples):
                    return False
        return True

    def is_right(self, layers: Sequence[Rows], batch: Batch) -> bool:
        """Whether the rows of some examples of a batch are autograd's, tried on the smaller parameters.

        Whoever moves examples about moves them for a layer's bias as for its weight, which costs more.
        """
        small = sorted(self.parameters, key=lambda name: self.parameters[name].numel())
        tried = set(small[: (len(small) + 1) // 2])
        return not _wrong_parameters(
            self, [layer for layer in layers if tried & set(layer.names)], batch, tried
        )

    def layers(self, batch: Batch) -> list[Rows]:
        """The rows of one batch."""
        self._learn(batch)
        uses: dict[str, list[tuple[str, Use]]] = defaultdict(list)
        for module, local in self._layers().items():
            for call, grads in batch.of(module):
                use = self._layer_use(call, grads, batch.num_examples)
                for local_name, name in local.items():
                    uses[name].append((local_name, use))
        found = _joined_linear(uses)
        taken = {name for rows in found for name in rows.names}
        for name in self.parameters:
            if self.ways[name] == GRAPH:
                rows = GraphUse(self.parameters[name], batch.outputs, batch.roots, range(batch.num_examples))
                uses[name].append(("", rows))
        for host in dict.fromkeys(way for way in self.ways.values() if way not in (LAYER, GRAPH)):
            for local_name, name, its in self._module_uses(host, batch):
                uses[name].append((local_name, its))
        dense = [
            DenseRows(name, self.parameters[name].shape, tuple(its))
            for name, its in uses.items()
            if name not in taken
        ]
        return [*found, *dense]

    def _learn(self, batch: Batch) -> None:
        """Find the layouts of modules that the outputs depend on for the first time: experts, heads."""
        new = {
            call.module
            for call, grads in zip(batch.calls, batch.grads, strict=True)
            if call.module not in self.layouts and _counts(grads)
        }
        if new:
            found = _find_layouts(batch)
            self.layouts |= {module: found[module] for module in new}

    def module_use(self, module: nn.Module, names: Mapping[str, str], call: Call, grads: list[Tensor | None],
                   num_examples: int) -> ModuleUse | None:  # fmt: skip
        """One call of a module for torch.func, None if it cannot be replayed example by example."""
        chosen = [i for i, grad in enumerate(grads) if grad is not None]
        layouts = [self.layouts.get(module, (None,) * len(grads))[i] for i in chosen]
        if any(layout is None for layout in layouts):
            return None
        use = ModuleUse(
            module=module,
            parameters={local: self.parameters[name].detach() for local, name in names.items()},
            arguments=_with_state(call),
            layouts=(),
            outputs=tuple(call.places[i] for i in chosen),
            output_layouts=tuple(layouts),  # type: ignore[arg-type]
            grads=tuple(grads[i] for i in chosen),  # type: ignore[misc]
            num_examples=num_examples,
        )
        return self._with_argument_layouts(use, [call.outputs[i] for i in chosen])

    def summary(self) -> str:
        """How many parameters go which way; one line."""
        ways: dict[str, list[str]] = defaultdict(list)
        for name, way in self.ways.items():
            ways[way].append(name)
        layers = {name.rpartition(".")[0] for name in ways.pop(LAYER, [])}
        parts = [f"{len(layers)} layers by their derivatives"] if layers else []
        graph = ways.pop(GRAPH, [])
        for host, names in ways.items():
            kind = type(self.network.get_submodule(host)).__name__
            parts.append(f"{', '.join(names)} by torch.func in {host or 'the network'} ({kind})")
        if graph:
            parts.append(f"{', '.join(graph)} by one backward pass for each row")
        return "; ".join(parts)

    def _layers(self) -> dict[nn.Module, dict[str, str]]:
        """Modules whose derivatives are used, with the parameters that they hold: {local name: name}."""
        wanted = {id(p): name for name, p in self.parameters.items() if self.ways[name] == LAYER}
        found = {}
        for module in self.network.modules():
            local = {
                local_name: wanted[id(p)]
                for local_name, p in module.named_parameters(recurse=False)
                if id(p) in wanted
            }
            if local:
                found[module] = local
        return found

    def _layer_use(self, call: Call, grads: list[Tensor | None], num_examples: int) -> LayerUse:
        layout, output, (grad,) = self.layouts[call.module][0], call.outputs[0], grads
        derivatives = derivatives_of(call.module)
        if layout is None or grad is None or derivatives is None:
            raise ValueError(
                f"{type(call.module).__name__} with parameters {sorted(self._layers()[call.module].values())} is "
                "used by a later batch in a way that does not tell its examples apart. Hold these parameters fixed "
                "(requires_grad=False), or give batches that take the same way through the network."
            )
        return LayerUse(
            module=call.module,
            derivatives=derivatives,
            inputs=layout.examples_first(call.input, num_examples),
            output=layout.examples_first(output.detach(), num_examples),
            grads=layout.columns_first(grad, num_examples),
            entries=layout.entries(output, num_examples),
        )

    def _module_uses(self, host: str, batch: Batch) -> list[tuple[str, str, Use]]:
        module = self.network.get_submodule(host)
        names = {local_name(name, host): name for name, way in self.ways.items() if way == host}
        found: list[tuple[str, str, Use]] = []
        for call, grads in batch.of(module):
            use = self.module_use(module, names, call, grads, batch.num_examples)
            if use is None:
                raise ValueError(
                    f"{host or 'The network'} ({type(module).__name__}) cannot be replayed on single examples for "
                    f"the arguments of a later batch. Hold {sorted(names.values())} fixed (requires_grad=False)."
                )
            found += [(local, name, use) for local, name in names.items()]
        return found

    def _with_argument_layouts(self, use: ModuleUse, recorded: list[Tensor]) -> ModuleUse | None:
        """Find the layouts of the arguments: those with which each example by itself gives its own output."""
        tensors = tensors_of(use.arguments)
        key = (use.module, tuple(tensor.dim() for tensor in tensors))
        if key not in self.argument_layouts or use.num_examples == 1:
            candidates = [_candidates(tensor, use.num_examples) for tensor in tensors]
            tried = itertools.islice(itertools.product(*candidates), MAX_ARGUMENT_LAYOUTS)
            right = (layouts for layouts in tried if _replays(use.with_layouts(layouts), recorded))
            self.argument_layouts[key] = next(right, None)
        layouts = self.argument_layouts[key]
        return None if layouts is None else use.with_layouts(layouts)


def make_plan(network: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, backend: str) -> Plan:
    """Find a way for each parameter and prove it on two examples.

    Raises:
        ValueError: If examples depend on each other, or if `backend` does not have the way that is needed.
    """
    plan = Plan(network, parameters, {}, _find_layouts(batch), batch.num_examples)
    for name in parameters:
        plan.ways[name] = LAYER if backend != "autograd" and _is_readable(plan, name, batch) else ""
        if plan.ways[name] != LAYER:
            plan.ways[name] = _next_way(plan, name, batch, None, backend)
    while wrong := _wrong_parameters(plan, plan.layers(batch), batch):
        for name in wrong:
            if plan.ways[name] == GRAPH:
                raise ValueError(_mixing(wrong))
            before = None if plan.ways[name] == LAYER else plan.ways[name]
            plan.ways[name] = _next_way(plan, name, batch, before, backend)
    slow = [name for name, way in plan.ways.items() if way == GRAPH]
    if slow:
        warnings.warn(
            f"The per-example gradients of {slow} take one backward pass for each row, which is slow: the "
            "parameter is used outside any module's call that can be replayed on one example. Use it in a "
            "submodule's forward, or hold it fixed (requires_grad=False).",
            stacklevel=2,
        )
    return plan


def _counts(grads: Sequence[Tensor | None]) -> bool:
    """Whether the outputs depend on what a call returned."""
    return any(grad is not None and grad.numel() > 0 for grad in grads)


def local_name(name: str, host: str) -> str:
    """A parameter's name as seen from a module that holds it."""
    return name[len(host) + 1 :] if host else name


def _find_layouts(batch: Batch) -> dict[nn.Module, tuple[Layout | None, ...]]:
    pairs = iter(_example_gradients(batch))
    layouts: dict[nn.Module, tuple[Layout | None, ...]] = {}
    for call, grads in zip(batch.calls, batch.grads, strict=True):
        its_pairs = itertools.islice(pairs, len(call.outputs))
        found = tuple(
            None if plain is None or weighted is None else find_layout(plain, weighted, batch.num_examples)
            for plain, weighted in its_pairs
        )
        if not _counts(grads):  # called for a metric, not on the way to the outputs, or on no example
            continue
        before = layouts.get(call.module, found)
        layouts[call.module] = found if before == found else (None,) * len(found)
    return layouts


def _is_readable(plan: Plan, name: str, batch: Batch) -> bool:
    """Whether all modules that hold a parameter are called as layers whose derivatives are known."""
    parameter = plan.parameters[name]
    for module in plan.network.modules():
        local = [key for key, p in module.named_parameters(recurse=False) if p is parameter]
        if not local:
            continue
        if derivatives_of(module) is None or not set(local) <= {"weight", "bias"}:
            return False
        for call, _ in batch.of(module):
            layout = plan.layouts[module][0]
            if len(call.outputs) != 1 or layout is None or not isinstance(call.input, Tensor):
                return False
            if layout.axis != 0 and not isinstance(module, AXIS_FREE):
                return False
            if not layout.fits(call.input, batch.num_examples):
                return False
    return True


def _next_way(plan: Plan, name: str, batch: Batch, before: str | None, backend: str) -> str:
    """The next larger module that can be replayed, beginning with the one that holds the parameter."""
    if backend == "backpack":
        raise ValueError(
            f'backend="backpack" has no derivatives for the parameter {name!r}: its layer is unknown, or it is '
            'used outside its layer\'s forward. Use backend="auto", or hold it fixed (requires_grad=False).'
        )
    chain = _ancestors(name)
    start = 0 if before is None else chain.index(before) + 1
    for host in chain[start:]:
        module = plan.network.get_submodule(host)
        calls = batch.of(module)
        names = {local_name(name, host): name}
        if calls and all(
            plan.module_use(module, names, call, grads, batch.num_examples) is not None
            for call, grads in calls
        ):
            return host
    if any(
        plain is not None and weighted is not None and mixes_examples(plain, weighted, batch.num_examples)
        for plain, weighted in _example_gradients(batch)
    ):
        raise ValueError(_mixing([name]))
    return GRAPH


def _example_gradients(batch: Batch) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each output of each call the plain and the weighted gradient of `find_layout`."""
    tensors = [tensor for call in batch.calls for tensor in call.outputs]
    like = batch.outputs.detach()
    generator = torch.Generator(device=like.device).manual_seed(0)
    seed = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    weights = example_weights(len(seed), seed).reshape(-1, *[1] * (seed.dim() - 1))
    plain = _gradients(batch.outputs, tensors, seed)
    return list(zip(plain, _gradients(batch.outputs, tensors, weights * seed), strict=True))


def _ancestors(name: str) -> list[str]:
    """Names of the modules that hold a parameter, from the smallest to the network itself."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _wrong_parameters(
    plan: Plan, layers: Sequence[Rows], batch: Batch, tried: Collection[str] | None = None
) -> list[str]:
    """Parameters whose rows, added up over the columns of two examples, are not autograd's."""
    parameters = {name: p for name, p in plan.parameters.items() if tried is None or name in tried}
    weights = {0: 1.0, batch.num_examples // 2: -0.7}  # a network may leave an example in its place by chance
    seed = torch.zeros_like(batch.outputs)
    found: dict[str, Tensor] = {}
    for example, weight in weights.items():
        seed[example] = weight * batch.roots[:, example].sum(0)
        for layer in layers:
            for name, rows in layer.of_example(example).summed().dense().items():
                found[name] = found.get(name, 0.0) + weight * rows.sum((0, 1))
    truths = dict(zip(parameters, _gradients(batch.outputs, list(parameters.values()), seed), strict=True))
    scale = max((truth.abs().max().item() for truth in truths.values() if truth is not None), default=0.0)
    tolerance = 1e3 * torch.finfo(batch.outputs.dtype).eps * scale
    wrong = []
    for name, truth in truths.items():
        difference = found.get(name, 0.0) - (0.0 if truth is None else truth.flatten())
        if isinstance(difference, Tensor) and not bool((difference.abs() <= tolerance).all()):
            wrong.append(name)
    return wrong


def _joined_linear(uses: Mapping[str, list[tuple[str, Use]]]) -> list[Rows]:
    """Weights and biases of linear maps; the two together where they are always used together."""
    groups: dict[tuple[int, ...], dict[str, str]] = defaultdict(dict)
    its_uses: dict[tuple[int, ...], tuple[LayerUse, ...]] = {}
    for name, pairs in uses.items():
        linear = [use for _, use in pairs if isinstance(use, LayerUse) and use.is_linear]
        if len(linear) == len(pairs) and len({local for local, _ in pairs}) == 1:
            key = tuple(id(use) for use in linear)
            groups[key][pairs[0][0]] = name
            its_uses[key] = tuple(linear)
    return [OuterRows(local.get("weight"), local.get("bias"), its_uses[key]) for key, local in groups.items()]


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


def _gradients(outputs: Tensor, tensors: list[Tensor], seed: Tensor) -> tuple[Tensor | None, ...]:
    if not tensors:
        return ()
    return torch.autograd.grad(outputs, tensors, seed, retain_graph=True, allow_unused=True)


def _mixing(names: list[str]) -> str:
    return (
        f"The rows of {names} cannot be formed: the network mixes the examples of a batch (batch norm without "
        "running statistics, a mean over the batch), or its first output dimension is not the batch. The "
        "evidence needs the likelihood to factorise over examples. Hold the parameters before the mixing fixed "
        "(requires_grad=False), or use group or layer norm."
    )
