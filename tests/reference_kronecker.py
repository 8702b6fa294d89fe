"""The Kronecker structure as a dense matrix, from its definition alone.

A weight that linear or ungrouped convolutional layers apply at T places of an example (positions, repeated
calls, layers that share it) has Jₙ = Σₜ gₙₜ aₙₜᵀ. Its block is B ⊗ A with

    A = (1/N) Σₙ Σₜ aₙₜ aₙₜᵀ        B = Σₙ Ḡₙᵀ Λₙ Ḡₙ,  Ḡₙ = Σₜ gₙₜ [K, out]

as BackPACK's KFLR and laplace-torch have it. Expanded, each place is an example of its own:

    A = (1/Σₙ Tₙ) Σₙ Σₜ aₙₜ aₙₜᵀ        B = Σₙ Σₜ gₙₜᵀ Λₙ gₙₜ

Biases are blocks of their own, exact. Whether these uses are all
there are is not looked up but tried: they must add up to the Jacobian. All else keeps its exact block, or its
diagonal where that is large.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_EXACT_BLOCK = 1024
CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass(frozen=True)
class LayerUse:
    """One call of one layer for one example: its inputs a [T, in] and ∂f/∂(its output), [K, T, out]."""

    layer: nn.Module
    inputs: Tensor
    grads: Tensor


def kronecker_ggn(
    model: nn.Module,
    uses: list[list[LayerUse]],
    hessians: list[Tensor],
    jacobians: list[Tensor],
    precision: Mapping[str, float],
    ggn: Tensor,
    *,
    joint: bool = False,
    expand: bool = False,
) -> Tensor:
    """KFLR as a dense [p, p] matrix.

    Args:
        model: That holds the parameters.
        uses: `layer_uses` of each example.
        hessians: Λₙ [K, K].
        jacobians: Jₙ [K, p].
        precision: λ of each parameter, in the order of p.
        ggn: The exact matrix.
        joint: Whether weight and bias of one layer make one block, with a 1 after each a.
        expand: Whether each place counts as an example.
    """
    places, start = {}, 0
    for name in precision:
        places[name] = slice(start, start + model.get_parameter(name).numel())
        start = places[name].stop
    result = torch.zeros_like(ggn)
    done: set[str] = set()
    for name, place in places.items():
        factors = _factors(model, name, uses, hessians, [j[:, place] for j in jacobians], expand)
        if factors is None:
            continue
        index = torch.arange(place.start, place.stop)
        bias = _partner(model, name, precision) if joint else None
        if bias is not None:
            extended = [[_with_one(use) for use in of_example] for of_example in uses]
            out = len(model.get_parameter(bias))
            index = torch.cat([index.view(out, -1), torch.arange(start)[places[bias]].view(out, 1)], dim=1)
            factors = _factors(model, name, extended, hessians, [j[:, index.flatten()] for j in jacobians])
            assert factors is not None
            done.add(bias)
        result[index.flatten().unsqueeze(1), index.flatten()] = torch.kron(*factors)
        done.add(name)
    for name in places.keys() - done:
        block = ggn[places[name], places[name]]
        exact = len(block) <= MAX_EXACT_BLOCK or _is_bias(model, name)
        result[places[name], places[name]] = block if exact else torch.diag(block.diagonal())
    return result


def _factors(
    model: nn.Module,
    name: str,
    uses: list[list[LayerUse]],
    hessians: list[Tensor],
    jacobians: list[Tensor],
    expand: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """B and A, None where the uses of the weight do not add up to its Jacobian."""
    weight = model.get_parameter(name)
    factor_a, factor_b, count = 0.0, 0.0, 0
    for of_example, hessian, jacobian in zip(uses, hessians, jacobians, strict=True):
        own = [use for use in of_example if use.layer._parameters["weight"] is weight]
        if not own:
            return None
        a = torch.cat([use.inputs for use in own])
        g = torch.cat([use.grads for use in own], dim=1)
        total = torch.einsum("kto,ti->koi", g, a).flatten(1)
        if not torch.allclose(total, jacobian, rtol=1e-9, atol=1e-12):
            return None
        factor_a = factor_a + a.mT @ a
        count += len(a) if expand else 1
        for part in g.unbind(1) if expand else [g.sum(1)]:
            factor_b = factor_b + part.mT @ hessian @ part
    return factor_b, factor_a / count


def layer_uses(model: nn.Module, example: Tensor) -> list[LayerUse]:
    """Calls of linear and ungrouped convolutional layers on the way to the outputs of one example.

    A call whose input does not grow with the batch, over a parameter say, sees no example: it is none.
    """
    _, twice = _layer_calls(model, torch.stack([example, example]))
    output, calls = _layer_calls(model, example.unsqueeze(0))
    calls = [call for call, (_, a, _) in zip(calls, twice, strict=True) if a.numel() > call[1].numel()]
    uses = []
    for layer, a, out in calls:
        grads = [torch.autograd.grad(f, out, retain_graph=True, allow_unused=True)[0] for f in output]
        if all(grad is None for grad in grads):
            continue
        g = torch.stack([torch.zeros_like(out) if grad is None else grad for grad in grads])
        if _kind(layer) is nn.Linear:
            uses.append(LayerUse(layer, a.reshape(-1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])))
        else:
            uses.append(LayerUse(layer, patches(layer, a), g.movedim(2, -1).flatten(1, -2)))
    return uses


def _layer_calls(model: nn.Module, batch: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor, Tensor]]]:
    """The outputs, flat, and of each call the layer, its input and its output."""
    calls = []

    def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor:
        calls.append((layer, (args[0] if args else kwargs["input"]).detach(), out))
        return out.clone()  # which in-place operations may have

    layers = [module for module in model.modules() if _kind(module) is not None]
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        return model(batch).reshape(-1), calls
    finally:
        for handle in handles:
            handle.remove()


def patches(layer: nn.Module, image: Tensor) -> Tensor:
    """What a convolution multiplies its weight with: [positions, in · kernel] of images [k, in, ...].

    As the layer's own convolution with weights that pick one entry of the patch each.
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    image = F.pad(image, layer._reversed_padding_repeated_twice, mode=mode)
    size = layer.weight[0].numel()
    pick = torch.eye(size).to(image).view(size, *layer.weight.shape[1:])
    found = CONVOLUTIONS[_kind(layer)](image, pick, None, layer.stride, 0, layer.dilation)
    return found.movedim(1, -1).flatten(0, -2)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The layer whose forward, and own weight, the module has."""
    if module._parameters.get("weight") is None or getattr(module, "groups", 1) != 1:
        return None
    kinds = (nn.Linear, *CONVOLUTIONS)
    return next((k for k in kinds if isinstance(module, k) and type(module).forward is k.forward), None)


def _holders(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    parameter = model.get_parameter(name)
    return [
        (module, local)
        for module in model.modules()
        for local, own in module.named_parameters(recurse=False, remove_duplicate=False)
        if own is parameter
    ]


def _is_bias(model: nn.Module, name: str) -> bool:
    return any(local == "bias" and _kind(module) is not None for module, local in _holders(model, name))


def _partner(model: nn.Module, name: str, precision: Mapping[str, float]) -> str | None:
    """The bias that one layer, and no other, has together with this weight."""
    holders = _holders(model, name)
    for other in precision:
        if other != name and len(holders) == 1:
            found = _holders(model, other)
            if len(found) == 1 and found[0][1] == "bias" and found[0][0] is holders[0][0]:
                return other
    return None


def _with_one(use: LayerUse) -> LayerUse:
    return LayerUse(use.layer, F.pad(use.inputs, (0, 1), value=1.0), use.grads)
