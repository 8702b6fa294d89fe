"""Sub-networks: some parameters are integrated over, the others are conditioned on."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bayes.capture.autograd_graph import graph_nodes

Subset = str | Sequence[str]
""" "all", "last_layer", or patterns of parameter names."""

PARAMETRIZED = ".parametrizations."


def require_subset(subset_of_weights: object) -> None:
    """Check the argument `subset_of_weights` as far as it can be checked without a model.

    Raises:
        ValueError: If it is neither "all" nor "last_layer" nor a non-empty list of strings.
    """
    if isinstance(subset_of_weights, str) and subset_of_weights in ("all", "last_layer"):
        return
    listed = isinstance(subset_of_weights, list | tuple) and len(subset_of_weights) > 0
    if listed and all(isinstance(pattern, str) for pattern in subset_of_weights):  # type: ignore[attr-defined]
        return
    raise ValueError(
        "Expected argument `subset_of_weights` to be 'all', 'last_layer' or a list of parameter-name patterns such "
        f"as ['head.*'], got {subset_of_weights!r}."
    )


def matching(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    """Names that some pattern of a shell (`head.*`) matches.

    Raises:
        ValueError: If a pattern matches none.
    """
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise ValueError(
            f"The patterns {idle} of subset_of_weights match no trainable parameter; there are {list(names)}. "
            "Name some of these, or leave subset_of_weights out."
        )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def last_layer(network: nn.Module, run: Callable[[], Tensor]) -> list[str]:
    """Parameters of the layer that is called last on the way to the outputs.

    The order is that of the calls in a forward pass, not that of definition, and a layer counts only if the
    outputs depend on its parameters: an auxiliary head that is called later does not.

    Args:
        network: Left as it is.
        run: Runs it on some batch and returns its outputs with their graph.

    Raises:
        ValueError: If the layer is frozen, or no layer with parameters leads to the outputs.
    """
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    for parameter in frozen:  # a frozen head is still the last layer
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), _noted_calls(network) as calls:
            outputs = run()
        reached = set(graph_nodes([outputs]))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    layer = next((module for module, nodes in reversed(calls) if not reached.isdisjoint(nodes)), None)
    if layer is None:
        raise ValueError(
            f'subset_of_weights="last_layer": no layer of {type(network).__name__} with parameters leads to '
            "the outputs. Name its parameters: subset_of_weights=['head.*']."
        )
    names = _whole_layer(network, layer)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not trainable.intersection(names):
        raise ValueError(
            f'subset_of_weights="last_layer": the last layer, {names}, is frozen. Unfreeze it, or name other '
            "parameters: subset_of_weights=['head.*']."
        )
    return [name for name in names if name in trainable]


@contextmanager
def _noted_calls(network: nn.Module) -> Iterator[list[tuple[nn.Module, list[object]]]]:
    """Note calls of modules with parameters, each with the graph nodes that its outputs came from.

    The order is that in which they begin, so that a head comes after the network that holds it.
    """
    calls: list[tuple[nn.Module, list[object]]] = []
    open_calls: list[list[object]] = []

    def begin(module: nn.Module, args: Any) -> None:
        open_calls.append([])
        calls.append((module, open_calls[-1]))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else [output]
        tensors = (part for part in parts if isinstance(part, Tensor) and part.grad_fn is not None)
        open_calls.pop().extend(tensor.grad_fn for tensor in tensors)

    holders = [module for module in network.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [
        handle
        for module in holders
        for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _whole_layer(network: nn.Module, layer: nn.Module) -> list[str]:
    """The layer's names; of a parametrized one (weight_norm), also those its parametrization leaves alone."""
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in own}
    layers = {name.split(PARAMETRIZED)[0] for name in names if PARAMETRIZED in name}
    return [
        name
        for name, _ in network.named_parameters()
        if name in names
        or name.split(PARAMETRIZED)[0] in layers
        or (name.rpartition(".")[0] in layers and PARAMETRIZED not in name)
    ]
