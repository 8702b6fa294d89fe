"""Makes a plan on the first batch, and proves it there: the rows of all examples must be autograd's.

That finds what no table of layers can: a weight that a functional call uses too, a forward of somebody's own,
a first dimension that is not the batch's. What fails goes to the next larger module that is called, and in the
end to the graph itself.
"""

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_bayes.capture.example_layout import mixes_examples
from lightning_bayes.rows.backward import Batch, example_gradients, find_layouts
from lightning_bayes.rows.layers import AXIS_FREE, derivatives_of
from lightning_bayes.rows.proof import Proof, wrong_parameters
from lightning_bayes.rows.routes import GRAPH, LAYER, Plan, local_name


def make_plan(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    backend: str,
    proof: Proof | None,
    apart: bool = False,
) -> Plan:
    """Find a way for each parameter and prove it on all examples.

    Args:
        network: The network.
        parameters: Those whose rows are wanted.
        batch: With all calls of modules that hold parameters.
        backend: See `RowReader`.
        proof: Of this batch; None where no example has a row.
        apart: Whether the examples are known not to influence each other.

    Raises:
        ValueError: If examples depend on each other, or if `backend` does not have the way that is needed.
    """
    plan = Plan(network, parameters, {}, find_layouts(batch), batch.num_examples)
    for name in parameters:
        plan.ways[name] = LAYER if backend != "autograd" and _is_readable(plan, name, batch) else ""
        if plan.ways[name] != LAYER:
            plan.ways[name] = _next_way(plan, name, batch, None, backend, apart)
    while proof is not None and (wrong := wrong_parameters(plan, proof)):
        for name in wrong:
            before = None if plan.ways[name] == LAYER else plan.ways[name]
            plan.ways[name] = _next_way(plan, name, batch, before, backend, apart)
    if proof is not None:
        _gather(plan, proof)
    # Without rows (saturated, or all targets ignored) every plan is right, and this one is not kept.
    plan.proved = proof is not None
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


def _next_way(plan: Plan, name: str, batch: Batch, before: str | None, backend: str, apart: bool) -> str:
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
            plan.module_use(names, call, grads, batch.num_examples) is not None for call, grads in calls
        ):
            return host
    if not apart and any(
        plain is not None and weighted is not None and mixes_examples(plain, weighted, batch.num_examples)
        for plain, weighted in example_gradients(batch)
    ):
        raise ValueError(_mixing([name]))
    return GRAPH


def _gather(plan: Plan, proof: Proof) -> None:
    """Let a module that is replayed within another that is replayed anyway go with it: one replay in place of two."""
    hosts = set(plan.ways.values()) - {LAYER, GRAPH}
    before = dict(plan.ways)
    for name, way in before.items():
        outer = [host for host in _ancestors(name) if host in hosts]
        if way in hosts and outer[-1] != way:
            plan.ways[name] = outer[-1]
    if plan.ways != before and wrong_parameters(plan, proof):
        plan.ways = before


def _ancestors(name: str) -> list[str]:
    """Names of the modules that hold a parameter, from the smallest to the network itself."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _mixing(names: list[str]) -> str:
    return (
        f"The rows of {names} cannot be formed: the network mixes the examples of a batch (batch norm without "
        "running statistics, a mean over the batch), or its first output dimension is not the batch. The "
        "evidence needs the likelihood to factorise over examples. Hold the parameters before the mixing fixed "
        "(requires_grad=False), or use group or layer norm, or batch norm with running statistics."
    )
