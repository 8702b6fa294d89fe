"""Slow, literal, float64 twins of the evidence engine, written from the equations alone.

Nothing here knows a closed form: the Jacobian of every single example comes from `torch.func.jacrev`, the
Hessian of the loss in the output from autograd, log-densities from `torch.distributions`, determinants from
`slogdet` of a dense [p, p] matrix.

    G = Σₙ JₙᵀΛₙJₙ
    ln P(y|x; M) = ln P(y|ω, x) − ½ Σ λω² − ½ ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²)    (Smith & Le 2018, eq. 9)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.func import functional_call, jacrev
from torch.nn import functional as F

LogDensity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """The fields of `Evidence` that have an equation."""

    log_evidence: float
    log_evidence_ratio: float | None
    log_likelihood: float
    weight_penalty: float
    log_occam_factor: float
    effective_parameters: float
    newton_decrement: float
    num_examples: int
    num_parameters: int
    noise_variance: float | None


def reference_evidence(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    task: str,
    precision: Mapping[str, float],
    *,
    sigma: float | None = None,
    structure: str = "full",
) -> Reference:
    """Every term of the evidence, with a dense matrix for the curvature.

    Args:
        model: float64, any mode; it is put into eval mode.
        inputs: [N, ...].
        targets: [N] or [N, K].
        task: "classification", "binary" or "regression".
        precision: λ > 0 of each parameter tensor that is integrated over; the others are conditioned on.
        sigma: Noise of a regression; None for the root mean squared residual.
        structure: "full", "diag" or "kron".
    """
    model.eval()
    jacobians, outputs = per_example_jacobians(model, inputs, list(precision))
    noise = None
    if task == "regression":
        residuals = outputs - targets.reshape(outputs.shape)
        noise = residuals.square().mean().item() if sigma is None else sigma**2
    log_density = log_density_of(task, noise)
    hessians = output_hessians(outputs, targets, log_density)
    ggn = sum(j.mT @ h @ j for j, h in zip(jacobians, hessians, strict=True))
    if structure == "diag":
        ggn = torch.diag(ggn.diagonal())
    elif structure == "kron":
        ggn = kronecker_ggn(model, inputs, hessians, list(precision), ggn)

    parameters = dict(model.named_parameters())
    weights = torch.cat([parameters[name].detach().flatten() for name in precision])
    prior = torch.cat(
        [torch.full_like(parameters[name].detach().flatten(), v) for name, v in precision.items()]
    )
    whitened = torch.eye(len(prior)).to(ggn) + ggn / prior.sqrt() / prior.sqrt().unsqueeze(1)
    sign, log_det = torch.linalg.slogdet(whitened)
    assert sign == 1

    def cost(flat: Tensor) -> Tensor:
        pieces = flat.split([parameters[name].numel() for name in precision])
        changed = {n: piece.view_as(parameters[n]) for n, piece in zip(precision, pieces, strict=True)}
        singly = [functional_call(model, changed, (x.unsqueeze(0),)).reshape(-1) for x in inputs]
        fit = sum(log_density(f, y) for f, y in zip(singly, targets, strict=True))
        return 0.5 * (prior * flat.square()).sum() - fit

    flat = weights.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost(flat), flat)
    posterior = ggn + torch.diag(prior)
    log_likelihood = sum(log_density(f, y).item() for f, y in zip(outputs, targets, strict=True))
    penalty = 0.5 * (prior * weights.square()).sum().item()
    value = log_likelihood - penalty - 0.5 * log_det.item()
    null = log_null(task, *outputs.shape)
    return Reference(
        log_evidence=value,
        log_evidence_ratio=None if null is None else value - null,
        log_likelihood=log_likelihood,
        weight_penalty=penalty,
        log_occam_factor=-0.5 * log_det.item(),
        effective_parameters=torch.trace(torch.linalg.solve(posterior, ggn)).item(),
        newton_decrement=0.5 * (slope @ torch.linalg.solve(posterior, slope)).item(),
        num_examples=len(inputs),
        num_parameters=len(prior),
        noise_variance=noise,
    )


def assert_agrees(evidence: object, reference: Reference, rel: float = 1e-8) -> None:
    """Every field that has an equation, to a relative error (absolute below one nat / 1000)."""
    for field in fields(reference):
        expected, got = getattr(reference, field.name), getattr(evidence, field.name)
        if expected is None:
            assert got is None, field.name
        else:
            assert math.isclose(got, expected, rel_tol=rel, abs_tol=rel * 1e-3), (field.name, got, expected)


def per_example_jacobians(model: nn.Module, inputs: Tensor, names: list[str]) -> tuple[list[Tensor], Tensor]:
    """Jₙ [K, p] of each example by itself, and the outputs [N, K]."""
    model.eval()
    chosen = {name: p.detach() for name, p in model.named_parameters() if name in names}

    def output(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, parameters, (example.unsqueeze(0),)).reshape(-1)

    jacobians, outputs = [], []
    for example in inputs:
        parts = jacrev(output)(chosen, example)
        jacobians.append(torch.cat([parts[name].flatten(1) for name in names], dim=1))
        outputs.append(output(chosen, example).detach())
    return jacobians, torch.stack(outputs)


def log_density_of(task: str, noise: float | None) -> LogDensity:
    """ln p(y | f) of one example."""

    def classification(f: Tensor, y: Tensor) -> Tensor:
        classes = Categorical(logits=f, validate_args=False)
        if y.dim() == 0:
            return classes.log_prob(y)
        return sum(share * classes.log_prob(torch.tensor(c)) for c, share in enumerate(y))

    def binary(f: Tensor, y: Tensor) -> Tensor:
        return Bernoulli(logits=f, validate_args=False).log_prob(y.reshape(f.shape).to(f)).sum()

    def regression(f: Tensor, y: Tensor) -> Tensor:
        return Normal(f, math.sqrt(noise), validate_args=False).log_prob(y.reshape(f.shape)).sum()

    return {"classification": classification, "binary": binary, "regression": regression}[task]


def output_hessians(outputs: Tensor, targets: Tensor, log_density: LogDensity) -> list[Tensor]:
    """Λₙ [K, K]: minus the second derivative of the log-density in the outputs."""
    return [
        torch.autograd.functional.hessian(lambda f, y=y: -log_density(f, y), f)
        for f, y in zip(outputs, targets, strict=True)
    ]


def log_null(task: str, num_examples: int, num_outputs: int) -> float | None:
    """Log-evidence of guessing: every class, or either value of every output, equally often."""
    if task == "classification":
        return num_examples * math.log(1 / num_outputs)
    return num_examples * num_outputs * math.log(1 / 2) if task == "binary" else None


def kronecker_ggn(
    model: nn.Module, inputs: Tensor, hessians: list[Tensor], names: list[str], ggn: Tensor
) -> Tensor:
    """KFLR as a dense matrix: B ⊗ A for weights of linear and ungrouped convolutional layers.

    A = (1/N) Σ aaᵀ over the inputs of the layer, at every position where it has several; B = Σ ggᵀ with g
    the columns of Jᵀ√Λ in the layer's output, summed over positions. All else, and a weight that is used
    other than once, keeps its exact block.
    """
    parameters = dict(model.named_parameters())
    blocks, start = [], 0
    for name in names:
        size = parameters[name].numel()
        holders = [m for m in model.modules() if getattr(m, "weight", None) is parameters[name]]
        factors = None
        if len(holders) == 1 and getattr(holders[0], "groups", 1) == 1:
            factors = _kronecker_factors(model, holders[0], inputs, hessians)
        blocks.append(
            ggn[start : start + size, start : start + size] if factors is None else torch.kron(*factors)
        )
        start += size
    return torch.block_diag(*blocks)


def _kronecker_factors(
    model: nn.Module, layer: nn.Module, inputs: Tensor, hessians: list[Tensor]
) -> tuple[Tensor, Tensor] | None:
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return None
    calls: list[tuple[Tensor, Tensor]] = []

    def output(probe: Tensor | None, example: Tensor) -> Tensor:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            calls.append((args[0], out.clone()))
            return out.clone() if probe is None else out + probe

        calls.clear()
        handle = layer.register_forward_hook(hook)
        try:
            return model(example.unsqueeze(0)).reshape(-1)
        finally:
            handle.remove()

    factor_a, factor_b = torch.zeros(()), torch.zeros(())
    for example, hessian in zip(inputs, hessians, strict=True):
        output(None, example)
        if len(calls) != 1:
            return None
        a, made = calls[0]
        jacobian = jacrev(output)(torch.zeros_like(made), example).detach()
        if isinstance(layer, nn.Linear):
            a = a.reshape(-1, a.shape[-1])
            jacobian = jacobian.reshape(len(jacobian), -1, jacobian.shape[-1]).sum(1)
        else:
            a = patches(layer, a.detach())
            jacobian = jacobian.squeeze(1).flatten(2).sum(2)
        factor_a = factor_a + a.detach().mT @ a.detach() / len(inputs)
        factor_b = factor_b + jacobian.mT @ hessian @ jacobian
    return factor_b, factor_a


def patches(layer: nn.Conv1d | nn.Conv2d, image: Tensor) -> Tensor:
    """What a convolution multiplies its weight with: [positions, in · kernel] of one image [1, in, ...]."""
    pad = layer._reversed_padding_repeated_twice
    image = F.pad(image, pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        image, kernel, dilation, stride = image.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(image, kernel, dilation, 0, stride)[0].mT
