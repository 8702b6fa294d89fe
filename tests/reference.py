"""Slow, literal, float64 twins of the evidence engine, written from the equations alone.

Nothing here knows a closed form or a batch: the Jacobian of every single example comes from one backward pass
for each of its outputs, the Hessian of the loss in the outputs from autograd, log-densities from
`torch.distributions` or PyTorch's own losses, determinants from `slogdet` of a dense [p, p] matrix.

    G = Σₙ JₙᵀΛₙJₙ
    ln P(y|x; M) = ln P(y|ω, x) − ½ Σ λω² − ½ ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²)    (Smith & Le 2018, eq. 9)

An example may have any number of outputs: all K = T·C of a sequence belong to one Jₙ [K, p].
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

from tests.reference_kronecker import kronecker_ggn

Nll = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Density:
    """−ln p(target | output) of one example.

    Attributes:
        nll: From the network's output for a batch of one, and its targets, to a scalar.
        guess: Whether outputs of zero are the null model.
        targets_of_fisher: From outputs to targets over which the mean of the Hessian is its expectation under
            the model; None where the Hessian at the targets themselves is meant.
    """

    nll: Nll
    guess: bool = True
    targets_of_fisher: Callable[[Tensor], list[Tensor]] | None = None


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
    task: str | Density,
    precision: Mapping[str, float],
    *,
    sigma: float | None = None,
    structure: str = "full",
    curvature: str = "ggn",
) -> Reference:
    """Every term of the evidence, with a dense matrix for the curvature.

    Args:
        model: float64, any mode; it is put into eval mode.
        inputs: [N, ...].
        targets: [N, ...].
        task: "classification" (classes in the second dimension), "binary", "regression", or a density.
        precision: λ > 0 of each parameter tensor that is integrated over; the others are conditioned on.
        sigma: Noise of a regression; None for the root mean squared residual.
        structure: "full", "diag", "kron" or "kron_joint".
        curvature: "ggn", or "hessian" of the summed loss in the parameters, where I + Λ⁻¹ᐟ² H Λ⁻¹ᐟ² is
            positive definite.
    """
    density, noise = resolve_density(model, inputs, targets, task, sigma)
    names = list(precision)
    weights = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
    prior = torch.cat([torch.full_like(model.get_parameter(n).flatten(), v) for n, v in precision.items()])
    if curvature == "hessian":
        matrix = loss_hessian(model, inputs, targets, density, names)
    else:
        matrix = structured_ggn(model, inputs, targets, density, precision, structure)
    whitened = torch.eye(len(prior)).to(matrix) + matrix / prior.sqrt() / prior.sqrt().unsqueeze(1)
    assert torch.linalg.eigvalsh(whitened)[0] > 0
    log_det = torch.linalg.slogdet(whitened).logabsdet.item()

    loss = summed_loss(model, inputs, targets, density)
    slope = torch.cat([part.flatten() for part in gradients(loss, model, names)]) + prior * weights
    posterior = matrix + torch.diag(prior)
    log_likelihood = -loss.item()
    penalty = 0.5 * (prior * weights.square()).sum().item()
    value = log_likelihood - penalty - 0.5 * log_det
    null = log_null(model, inputs, targets, density)
    return Reference(
        log_evidence=value,
        log_evidence_ratio=None if null is None else value - null,
        log_likelihood=log_likelihood,
        weight_penalty=penalty,
        log_occam_factor=-0.5 * log_det,
        effective_parameters=torch.trace(torch.linalg.solve(posterior, matrix)).item(),
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


def resolve_density(
    model: nn.Module, inputs: Tensor, targets: Tensor, task: str | Density, sigma: float | None = None
) -> tuple[Density, float | None]:
    """What a task stands for, and the variance of its noise, of all residuals unless it is given."""
    model.eval()
    if isinstance(task, Density):
        return task, None
    if task != "regression":
        return {"classification": Density(categorical()), "binary": Density(bernoulli)}[task], None
    if sigma is not None:
        return Density(normal(sigma**2), guess=False), sigma**2
    pairs = zip(single_outputs(model, inputs), targets, strict=True)
    residuals = torch.cat([f.detach().flatten() - y.flatten() for f, y in pairs])
    noise = residuals.square().mean().item()
    return Density(normal(noise), guess=False), noise


def categorical(class_dim: int = 1) -> Nll:
    """Minus the log-probability of class indices, or its mean under class probabilities."""

    def nll(f: Tensor, y: Tensor) -> Tensor:
        classes = Categorical(logits=f.movedim(class_dim, -1), validate_args=False)
        if not y.is_floating_point():
            return -classes.log_prob(y).sum()
        shares = y.movedim(class_dim, -1)
        return -sum(
            (shares[..., c] * classes.log_prob(torch.tensor(c))).sum() for c in range(shares.shape[-1])
        )

    return nll


def bernoulli(f: Tensor, y: Tensor) -> Tensor:
    """Minus the log-probability of independent binary targets."""
    return -Bernoulli(logits=f, validate_args=False).log_prob(y.reshape(f.shape).to(f)).sum()


def normal(variance: float) -> Nll:
    """Minus the log-density of real targets."""

    def nll(f: Tensor, y: Tensor) -> Tensor:
        return -Normal(f, math.sqrt(variance), validate_args=False).log_prob(y.reshape(f.shape)).sum()

    return nll


def single_outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Outputs [1, ...] of each example by itself, with their graph."""
    model.eval()
    return [model(example.unsqueeze(0)) for example in inputs]


def summed_loss(model: nn.Module, inputs: Tensor, targets: Tensor, density: Density) -> Tensor:
    """−ln P(y | ω, x), one example after the other."""
    singly = single_outputs(model, inputs)
    return sum(density.nll(f, y.unsqueeze(0)) for f, y in zip(singly, targets, strict=True))


def gradients(
    value: Tensor, model: nn.Module, names: list[str], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Of a scalar, for each of the named parameters."""
    return torch.autograd.grad(
        value,
        [model.get_parameter(name) for name in names],
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )


def per_example_jacobians(model: nn.Module, inputs: Tensor, names: list[str]) -> tuple[list[Tensor], Tensor]:
    """Jₙ [K, p] of each example by itself, and the outputs [N, K]."""
    singly = [output.reshape(-1) for output in single_outputs(model, inputs)]
    jacobians = [
        torch.stack([torch.cat([g.flatten() for g in gradients(value, model, names)]) for value in output])
        for output in singly
    ]
    return jacobians, torch.stack(singly).detach()


def output_hessians(model: nn.Module, inputs: Tensor, targets: Tensor, density: Density) -> list[Tensor]:
    """Λₙ [K, K]: the second derivative of the loss in the outputs, or its expectation."""
    found = []
    for output, y in zip(single_outputs(model, inputs), targets, strict=True):
        f = output.detach()
        points = density.targets_of_fisher(f) if density.targets_of_fisher else [y.unsqueeze(0)]
        found.append(
            sum(
                torch.autograd.functional.hessian(
                    lambda flat, f=f, point=point: density.nll(flat.view_as(f), point), f.flatten()
                )
                for point in points
            )
            / len(points)
        )
    return found


def structured_ggn(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    density: Density,
    precision: Mapping[str, float],
    structure: str,
) -> Tensor:
    """G [p, p], with what the structure leaves of it."""
    names = list(precision)
    jacobians, _ = per_example_jacobians(model, inputs, names)
    hessians = output_hessians(model, inputs, targets, density)
    ggn = sum(j.mT @ h @ j for j, h in zip(jacobians, hessians, strict=True))
    if structure == "full":
        return ggn
    if structure == "diag":
        return torch.diag(ggn.diagonal())
    joint = {"kron": False, "kron_joint": True}[structure]
    return kronecker_ggn(model, inputs, hessians, jacobians, precision, ggn, joint=joint)


def loss_hessian(
    model: nn.Module, inputs: Tensor, targets: Tensor, density: Density, names: list[str]
) -> Tensor:
    """H [p, p] of the summed loss, a second backward pass for each parameter."""
    loss = summed_loss(model, inputs, targets, density)
    slope = torch.cat([part.flatten() for part in gradients(loss, model, names, create_graph=True)])
    hessian = torch.stack(
        [torch.cat([part.flatten() for part in gradients(value, model, names)]) for value in slope]
    )
    return 0.5 * (hessian + hessian.mT)


def whitened_hessian_eigenvalues(
    model: nn.Module, inputs: Tensor, targets: Tensor, task: str | Density, precision: Mapping[str, float]
) -> Tensor:
    """Of I + Λ⁻¹ᐟ² H Λ⁻¹ᐟ²: λᵢ/λ of the paper, below 1 where the loss curves down."""
    density, _ = resolve_density(model, inputs, targets, task)
    hessian = loss_hessian(model, inputs, targets, density, list(precision))
    scale = torch.cat([torch.full_like(model.get_parameter(n).flatten(), v) for n, v in precision.items()])
    whitened = torch.eye(len(scale)).to(hessian) + hessian / scale.sqrt() / scale.sqrt().unsqueeze(1)
    return torch.linalg.eigvalsh(whitened.detach())


def log_null(model: nn.Module, inputs: Tensor, targets: Tensor, density: Density) -> float | None:
    """Log-evidence of outputs that are all zero: every class, or either value, equally often."""
    if not density.guess:
        return None
    pairs = zip(single_outputs(model, inputs), targets, strict=True)
    return -sum(density.nll(torch.zeros_like(f), y.unsqueeze(0)).item() for f, y in pairs)
