"""Which way each parameter's rows are read: by its layer's derivatives, by torch.func, or from the graph.

A plan is made on the first batch and proved there: the rows of all examples must be autograd's. That finds what no
table of layers can: a weight that a functional call uses too, a forward of somebody's own, a first dimension that is
not the batch's. What fails goes to the next larger module that is called, and in the end to the graph itself.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import Tensor, nn

from lightning_bayes.capture.example_layout import Layout
from lightning_bayes.capture.module_calls import Call
from lightning_bayes.rows.backward import Batch, Proof, find_layouts, refuse_mixing
from lightning_bayes.rows.layers import AXIS_FREE, Derivatives
from lightning_bayes.rows.per_example import ArgumentLayouts, ModuleUse, replayed_call
from lightning_bayes.rows.proof import Trial
from lightning_bayes.rows.rows import LayerUse, Rows, joined
from lightning_bayes.rows.uses import GraphUse, Use

LAYER, GRAPH = "by the layer's derivatives", "from the graph"
"""Ways that are not the name of a module."""


class PlanMismatch(ValueError):
    """A batch cannot be read by the plan that was made on others."""


@dataclass(frozen=True)
class Plan:
    """The way of each parameter, and where the examples stand in what the modules return."""

    network: nn.Module
    parameters: Mapping[str, nn.Parameter]
    ways: Mapping[str, str]
    layouts: dict[nn.Module, tuple[Layout | None, ...]]
    """Where examples stand in the outputs that carry a gradient, by module; None where they cannot be told."""
    num_examples: int
    """Examples of the batch that it was made for: one example does not tell where those of a batch stand."""
    derivatives: Mapping[nn.Module, Derivatives]
    """Of the layers that may be read by theirs."""
    argument_layouts: ArgumentLayouts = field(default_factory=dict)
    """Where examples stand in the calls that are replayed, as far as they have been found."""

    @cached_property
    def is_of_layers(self) -> bool:
        """Whether nothing is run again, nor gone back through row by row: any kernel will do."""
        return all(way == LAYER for way in self.ways.values())

    @cached_property
    def modules(self) -> list[nn.Module]:
        """Modules whose calls have to be recorded."""
        hosts = {self.network.get_submodule(host) for host in self._hosts}
        return [module for module in self.network.modules() if module in hosts or module in self._layers]

    def layers(self, batch: Batch) -> list[Rows]:
        """The rows of one batch; raises a `PlanMismatch` if it cannot be read by this plan."""
        if not self._fits(batch):
            raise PlanMismatch("The modules are called in another way than in the batch of the plan.")
        if not batch.by_module.keys() <= self.layouts.keys():  # a head, an expert for the first time
            layouts = find_layouts(batch)
            self.layouts.update({new: layouts[new] for new in layouts.keys() - self.layouts.keys()})
        layers, hosts = self._layers, self._hosts
        every = range(batch.num_examples)
        made: list[tuple[dict[str, str], Use]] = []
        for module, names in layers.items():
            calls = batch.by_module.get(module, ())
            made += [(names, self._layer_use(call, grads, len(every))) for call, grads in calls]
        for name, way in self.ways.items():
            if way == GRAPH:
                made.append(({"": name}, GraphUse(self.parameters[name], batch.outputs, batch.roots, every)))
        for host, names in hosts.items():
            for call, grads in batch.by_module.get(self.network.get_submodule(host), ()):
                use = self.module_use(names, call, grads, len(every))
                if use is None:
                    where = f"{host or 'The network'} ({type(call.module).__name__})"
                    raise PlanMismatch(
                        f"{where} cannot be replayed on single examples for the arguments of a later batch. "
                        f"Hold {sorted(names.values())} fixed (requires_grad=False)."
                    )
                made.append((names, use))
        return joined(made, self.parameters)

    def wrong(self, proof: Proof, layers: list[Rows] | None = None) -> list[str]:
        """Parameters whose rows are not autograd's.

        Args:
            proof: What the rows are tried on.
            layers: The rows of all columns where they are at hand; None for those of the one that stands for all.
        """
        if not self._trial.parameters:
            return []
        tried = self.layers(proof.batch) if layers is None else layers
        return self._trial.wrong(proof, tried, of_all_columns=layers is not None)

    def module_use(
        self, names: Mapping[str, str], call: Call, grads: list[Tensor | None], num_examples: int
    ) -> ModuleUse | None:
        """One call for torch.func, of parameters {local name: name}; None if it cannot be replayed."""
        parameters = {local: self.parameters[name].detach() for local, name in names.items()}
        layouts = self.layouts.get(call.module, (None,) * len(grads))
        return replayed_call(call, grads, layouts, parameters, num_examples, self.argument_layouts)

    def summary(self) -> str:
        """How many parameters go which way; one line."""
        layers = {name.rpartition(".")[0] for name, way in self.ways.items() if way == LAYER}
        parts = [f"{len(layers)} layers by their derivatives"] if layers else []
        for host, names in self._hosts.items():
            where = f"{host or 'the network'} ({type(self.network.get_submodule(host)).__name__})"
            parts.append(f"{', '.join(names.values())} by torch.func in {where}")
        slow = [name for name, way in self.ways.items() if way == GRAPH]
        if slow:
            parts.append(f"{', '.join(slow)} by one backward pass for each row")
        return "; ".join(parts)

    @cached_property
    def _layers(self) -> dict[nn.Module, dict[str, str]]:
        """Modules whose derivatives are used, with the parameters that they hold: {local name: name}."""
        wanted = {id(p): name for name, p in self.parameters.items() if self.ways[name] == LAYER}
        layers: dict[nn.Module, dict[str, str]] = {}
        for module in self.network.modules():
            for local, parameter in module.named_parameters(recurse=False):
                if id(parameter) in wanted:
                    layers.setdefault(module, {})[local] = wanted[id(parameter)]
        return layers

    @cached_property
    def _hosts(self) -> dict[str, dict[str, str]]:
        """Names of the modules that are replayed, with the parameters: {local name: name}."""
        hosts: dict[str, dict[str, str]] = {}
        for name, way in self.ways.items():
            if way not in (LAYER, GRAPH):
                hosts.setdefault(way, {})[_local_name(name, way)] = name
        return hosts

    @cached_property
    def _trial(self) -> Trial:
        """Of all rows but those from the graph, which are autograd's by definition."""
        return Trial({n: p for n, p in self.parameters.items() if self.ways[n] != GRAPH and p.numel()})

    def _fits(self, batch: Batch) -> bool:
        """Whether the calls of a batch can be what the plan was made for."""
        if self.num_examples == 1 < batch.num_examples:
            return False
        known = [
            call for call in batch.calls if call.module in self.layouts
        ]  # on the way to the outputs so far
        return all(
            len(self.layouts[call.module]) == len(call.outputs)
            and all(
                layout is None or tensor.numel() == 0 or layout.fits(tensor, batch.num_examples)
                for layout, tensor in zip(self.layouts[call.module], call.outputs, strict=True)
            )
            for call in known
        )

    def _layer_use(self, call: Call, grads: list[Tensor | None], num_examples: int) -> LayerUse:
        layout, output, (grad,) = self.layouts[call.module][0], call.outputs[0], grads
        if layout is None or grad is None:
            raise PlanMismatch(
                f"{type(call.module).__name__} with parameters {sorted(self._layers[call.module].values())} is "
                "used by a later batch in a way that does not tell its examples apart. Hold these parameters fixed "
                "(requires_grad=False), or give batches that take the same way through the network."
            )
        return LayerUse(
            module=call.module,
            derivatives=self.derivatives[call.module],
            inputs=layout.examples_first(call.input, num_examples),
            output=layout.examples_first(output.detach(), num_examples),
            grads=layout.examples_first(grad, num_examples, behind=1),
            entries=layout.entries(output, num_examples),
        )


def find_ways(plan: Plan, batch: Batch, proof: Proof | None, backend: str, apart: bool) -> Plan:
    """Find a way for each parameter and prove it on all examples.

    Args:
        plan: Without ways.
        batch: With all calls of modules that hold parameters, after the backward pass of a column or more.
        proof: Of that batch, None where it has no rows (saturated, or targets ignored) and every way is right.
        backend: See `RowReader`.
        apart: Whether the examples are known not to influence each other.

    Raises:
        ValueError: If examples depend on each other, or if `backend` does not have the way that is needed.
    """
    next_way = partial(_next_way, plan, batch, backend, apart)
    ways = {
        name: LAYER if _is_readable(plan, name, batch) else next_way(name, LAYER) for name in plan.parameters
    }
    plan = replace(plan, ways=ways)
    if proof is not None:
        while wrong := plan.wrong(proof):
            ways |= {name: next_way(name, ways[name]) for name in wrong}
            plan = replace(plan, ways=dict(ways))
        plan = _gathered(plan, proof)
    slow = [name for name, way in plan.ways.items() if way == GRAPH]
    if slow:
        warnings.warn(
            f"The per-example gradients of {slow} take one backward pass for each row, which is slow: the "
            "parameter is used outside any module's call that can be replayed on one example. Use it in a "
            "submodule's forward, or hold it fixed (requires_grad=False).",
            stacklevel=2,
        )
    return plan


def _is_readable(plan: Plan, name: str, batch: Batch) -> bool:
    """Whether all modules that hold a parameter are called as layers whose derivatives are known."""
    for module in plan.network.modules():
        local = {key for key, p in module.named_parameters(recurse=False) if p is plan.parameters[name]}
        if not local:
            continue
        if module not in plan.derivatives or not local <= {"weight", "bias"}:
            return False
        for call, _ in batch.by_module.get(module, ()):
            layout = plan.layouts[module][0]
            if len(call.outputs) != 1 or layout is None or not isinstance(call.input, Tensor):
                return False
            any_axis = layout.axis == 0 or isinstance(module, AXIS_FREE)
            if not any_axis or not layout.fits(call.input, batch.num_examples):
                return False
    return True


def _next_way(plan: Plan, batch: Batch, backend: str, apart: bool, name: str, before: str) -> str:
    """The next larger module that can be replayed, beginning with the one that holds the parameter."""
    if backend == "backpack":
        raise ValueError(
            f'backend="backpack" has no derivatives for the parameter {name!r}: its layer is unknown, or it is '
            'used outside its layer\'s forward. Use backend="auto", or hold it fixed (requires_grad=False).'
        )
    chain = _ancestors(name)
    start = 0 if before == LAYER else chain.index(before) + 1
    for host in chain[start:]:
        module = plan.network.get_submodule(host)
        calls = batch.by_module.get(module)
        names = {_local_name(name, host): name}
        if calls and all(
            plan.module_use(names, call, grads, batch.num_examples) is not None for call, grads in calls
        ):
            return host
    if not apart:
        refuse_mixing(batch, name)
    return GRAPH


def _gathered(plan: Plan, proof: Proof) -> Plan:
    """Let a module that is replayed within another that is replayed anyway go with it: one replay in place of two."""
    hosts = set(plan.ways.values()) - {LAYER, GRAPH}
    ways = {
        name: [host for host in _ancestors(name) if host in hosts][-1] if way in hosts else way
        for name, way in plan.ways.items()
    }
    if ways == plan.ways:
        return plan
    gathered = replace(plan, ways=ways)
    return plan if gathered.wrong(proof) else gathered


def _ancestors(name: str) -> list[str]:
    """Names of the modules that hold a parameter, from the smallest to the network itself."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _local_name(name: str, host: str) -> str:
    """A parameter's name as seen from a module that holds it."""
    return name[len(host) + 1 :] if host else name
