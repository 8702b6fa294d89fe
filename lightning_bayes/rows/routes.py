"""Which way each parameter's rows are read: by its layer's derivatives, by torch.func, or from the graph."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_bayes.capture.example_layout import Layout
from lightning_bayes.capture.module_calls import Call
from lightning_bayes.rows.backward import Batch, counts, find_layouts
from lightning_bayes.rows.layers import derivatives_of
from lightning_bayes.rows.per_example import GraphUse, ModuleUse
from lightning_bayes.rows.replay import Replays
from lightning_bayes.rows.rows import DenseRows, OuterRows, Rows
from lightning_bayes.rows.uses import LayerUse, Use

LAYER, GRAPH = "by the layer's derivatives", "from the graph"
"""Ways that are not the name of a module."""


class PlanMismatch(ValueError):
    """A batch cannot be read by the plan that was made on others."""


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
    proved: bool = False
    """Whether that batch had an example with rows, on which the plan could be tried."""
    replays: Replays = field(default_factory=Replays)
    cache: dict[str, Any] = field(default_factory=dict, repr=False)
    """What whoever tries the plan keeps from batch to batch."""
    _found: tuple[object, dict[nn.Module, dict[str, str]], list[nn.Module]] = field(
        default=(None, {}, []), repr=False
    )
    """The layers and modules of some ways: they are asked for at every batch."""

    @property
    def is_of_layers(self) -> bool:
        """Whether nothing is run again, nor gone back through row by row: any kernel will do."""
        return all(way == LAYER for way in self.ways.values())

    @property
    def modules(self) -> list[nn.Module]:
        """Modules whose calls have to be recorded."""
        return self._known()[1]

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

    def layers(self, batch: Batch) -> list[Rows]:
        """The rows of one batch."""
        self._learn(batch)
        uses: dict[str, list[tuple[str, Use]]] = defaultdict(list)
        for module, local in self._layers().items():
            for call, grads in batch.of(module):
                use = self._layer_use(call, grads, batch.num_examples)
                for local_name, name in local.items():
                    uses[name].append((local_name, use))
        linear = _joined_linear(uses)
        taken = {name for rows in linear for name in rows.names}
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
        return [*linear, *dense]

    def _learn(self, batch: Batch) -> None:
        """Find the layouts of modules that the outputs depend on for the first time: experts, heads."""
        new = {
            call.module
            for call, grads in zip(batch.calls, batch.grads, strict=True)
            if call.module not in self.layouts and counts(grads)
        }
        if new:
            layouts = find_layouts(batch)
            self.layouts |= {module: layouts[module] for module in new}

    def module_use(
        self,
        names: Mapping[str, str],
        call: Call,
        grads: list[Tensor | None],
        num_examples: int,
    ) -> ModuleUse | None:
        """One call for torch.func, of parameters {local name: name}; None if it cannot be replayed."""
        parameters = {local: self.parameters[name].detach() for local, name in names.items()}
        layouts = self.layouts.get(call.module, (None,) * len(grads))
        return self.replays.of(call, grads, layouts, parameters, num_examples)

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
        return self._known()[0]

    def _known(self) -> tuple[dict[nn.Module, dict[str, str]], list[nn.Module]]:
        ways = tuple(self.ways.items())
        if self._found[0] != ways:
            layers = self._find_layers()
            hosts = {
                self.network.get_submodule(way) for way in self.ways.values() if way not in (LAYER, GRAPH)
            }
            modules = [module for module in self.network.modules() if module in hosts or layers.get(module)]
            self._found = ways, layers, modules
        return self._found[1:]

    def _find_layers(self) -> dict[nn.Module, dict[str, str]]:
        wanted = {id(p): name for name, p in self.parameters.items() if self.ways[name] == LAYER}
        layers = {}
        for module in self.network.modules():
            local = {
                local_name: wanted[id(p)]
                for local_name, p in module.named_parameters(recurse=False)
                if id(p) in wanted
            }
            if local:
                layers[module] = local
        return layers

    def _layer_use(self, call: Call, grads: list[Tensor | None], num_examples: int) -> LayerUse:
        layout, output, (grad,) = self.layouts[call.module][0], call.outputs[0], grads
        derivatives = derivatives_of(call.module)
        if layout is None or grad is None or derivatives is None:
            raise PlanMismatch(
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
        uses: list[tuple[str, str, Use]] = []
        for call, grads in batch.of(module):
            use = self.module_use(names, call, grads, batch.num_examples)
            if use is None:
                raise PlanMismatch(
                    f"{host or 'The network'} ({type(module).__name__}) cannot be replayed on single examples for "
                    f"the arguments of a later batch. Hold {sorted(names.values())} fixed (requires_grad=False)."
                )
            uses += [(local, name, use) for local, name in names.items()]
        return uses


def local_name(name: str, host: str) -> str:
    """A parameter's name as seen from a module that holds it."""
    return name[len(host) + 1 :] if host else name


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
