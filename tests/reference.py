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
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.reference_kronecker import LayerUse, kronecker_ggn, layer_uses

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


class SlowTwin:
    """A network at its weights with its data, and the dense derivatives there, each computed once.

    Args:
        model: float64, any mode; it is put into eval mode.
        inputs: [N, ...].
        targets: [N, ...].
        task: "classification" (classes in the second dimension), "binary", "regression", or a density.
        sigma: Noise of a regression; None for the root mean squared residual.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        task: str | Density,
        sigma: float | None = None,
    ) -> None:
        self.model, self.inputs, self.targets = model.eval(), inputs, targets
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            self.outputs = [model(example.unsqueeze(0)) for example in inputs]
        self.density, self.noise = self._resolve(task, sigma)

    def _resolve(self, task: str | Density, sigma: float | None) -> tuple[Density, float | None]:
        if isinstance(task, Density):
            return task, None
        if task != "regression":
            return {"classification": Density(categorical()), "binary": Density(bernoulli)}[task], None
        pairs = zip(self.outputs, self.targets, strict=True)
        residuals = torch.cat([f.detach().flatten() - y.flatten() for f, y in pairs])
        noise = residuals.square().mean().item() if sigma is None else sigma**2
        return Density(normal(noise), guess=False), noise

    @cached_property
    def loss(self) -> Tensor:
        """−ln P(y | ω, x), one example after the other, with its graph."""
        pairs = zip(self.outputs, self.targets, strict=True)
        return sum(self.density.nll(f, y.unsqueeze(0)) for f, y in pairs)

    @cached_property
    def slope(self) -> Tensor:
        """[p], the gradient of the loss."""
        return self._gradient(self.loss)

    @cached_property
    def jacobians(self) -> list[Tensor]:
        """Jₙ [K, p] of each example by itself."""
        return [torch.stack([self._gradient(f) for f in output.flatten()]) for output in self.outputs]

    @cached_property
    def output_hessians(self) -> list[Tensor]:
        """Λₙ [K, K]: the second derivative of the loss in the outputs, or its expectation."""
        found = []
        for output, y in zip(self.outputs, self.targets, strict=True):
            f, fisher = output.detach(), self.density.targets_of_fisher
            points = [y.unsqueeze(0)] if fisher is None else fisher(f)
            hessians = [
                torch.autograd.functional.hessian(
                    lambda flat, f=f, point=point: self.density.nll(flat.view_as(f), point), f.flatten()
                )
                for point in points
            ]
            found.append(sum(hessians) / len(points))
        return found

    @cached_property
    def ggn(self) -> Tensor:
        """G [p, p]."""
        return sum(j.mT @ h @ j for j, h in zip(self.jacobians, self.output_hessians, strict=True))

    @cached_property
    def hessian(self) -> Tensor:
        """H [p, p] of the loss: a second backward pass for each parameter, all in one."""
        slope = self._gradient(self.loss, create_graph=True)
        parameters = [self.model.get_parameter(name) for name in self.names]
        rows = torch.autograd.grad(
            slope,
            parameters,
            torch.eye(len(slope)).to(slope),
            retain_graph=True,
            is_grads_batched=True,  # or a recurrent network takes ten seconds
            allow_unused=True,
        )
        hessian = torch.cat(
            [
                slope.new_zeros(len(slope), parameter.numel()) if row is None else row.reshape(len(slope), -1)
                for row, parameter in zip(rows, parameters, strict=True)
            ],
            dim=1,
        )
        torch.testing.assert_close(hessian, hessian.mT, rtol=1e-9, atol=1e-11)  # autograd may have it wrong
        return 0.5 * (hessian + hessian.mT)

    @cached_property
    def layer_uses(self) -> list[list[LayerUse]]:
        """Of each example."""
        return [layer_uses(self.model, example) for example in self.inputs]

    def structured(self, structure: str, precision: Mapping[str, float]) -> Tensor:
        """What a structure leaves of G, over the parameters of `precision` in their order."""
        index = self.index(precision)
        ggn = self.ggn[index.unsqueeze(1), index]
        if structure == "full":
            return ggn
        if structure == "diag":
            return torch.diag(ggn.diagonal())
        jacobians = [jacobian[:, index] for jacobian in self.jacobians]
        ways = {"kron": {}, "kron_joint": {"joint": True}, "kron_expand": {"expand": True}}[structure]
        return kronecker_ggn(
            self.model, self.layer_uses, self.output_hessians, jacobians, precision, ggn, **ways
        )

    def log_null(self) -> float | None:
        """Log-evidence of outputs that are all zero: every class, or either value, equally often."""
        if not self.density.guess:
            return None
        pairs = zip(self.outputs, self.targets, strict=True)
        return -sum(self.density.nll(torch.zeros_like(f), y.unsqueeze(0)).item() for f, y in pairs)

    def whitened_hessian_eigenvalues(self, precision: Mapping[str, float]) -> Tensor:
        """Of I + Λ⁻¹ᐟ² H Λ⁻¹ᐟ²: λᵢ/λ of the paper, below 1 where the loss curves down."""
        index, prior = self.index(precision), self._prior(precision)
        return torch.linalg.eigvalsh(_whitened(self.hessian[index.unsqueeze(1), index], prior))

    def evidence(
        self, precision: Mapping[str, float], structure: str = "full", curvature: str = "ggn"
    ) -> Reference:
        """Every term of the evidence; for the arguments see `reference_evidence`."""
        index, prior = self.index(precision), self._prior(precision)
        weights = torch.cat([self.model.get_parameter(name).detach().flatten() for name in precision])
        hessian = curvature == "hessian"
        matrix = self.hessian[index.unsqueeze(1), index] if hessian else self.structured(structure, precision)
        whitened = _whitened(matrix, prior)
        assert torch.linalg.eigvalsh(whitened)[0] > 0
        log_det = torch.linalg.slogdet(whitened).logabsdet.item()
        slope = self.slope[index] + prior * weights
        posterior = matrix + torch.diag(prior)
        penalty = 0.5 * (prior * weights.square()).sum().item()
        value, null = -self.loss.item() - penalty - 0.5 * log_det, self.log_null()
        return Reference(
            log_evidence=value,
            log_evidence_ratio=None if null is None else value - null,
            log_likelihood=-self.loss.item(),
            weight_penalty=penalty,
            log_occam_factor=-0.5 * log_det,
            effective_parameters=torch.trace(torch.linalg.solve(posterior, matrix)).item(),
            newton_decrement=0.5 * (slope @ torch.linalg.solve(posterior, slope)).item(),
            num_examples=len(self.inputs),
            num_parameters=len(prior),
            noise_variance=self.noise,
        )

    def _gradient(self, value: Tensor, *, create_graph: bool = False) -> Tensor:
        parts = torch.autograd.grad(
            value,
            [self.model.get_parameter(name) for name in self.names],
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
        return torch.cat([part.flatten() for part in parts])

    def index(self, precision: Mapping[str, float]) -> Tensor:
        """Places of these parameters in p."""
        sizes = [self.model.get_parameter(name).numel() for name in self.names]
        places = dict(zip(self.names, torch.arange(sum(sizes)).split(sizes), strict=True))
        return torch.cat([places[name] for name in precision])

    def _prior(self, precision: Mapping[str, float]) -> Tensor:
        return torch.cat(
            [torch.full_like(self.model.get_parameter(n).flatten(), v) for n, v in precision.items()]
        ).detach()


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
        structure: "full", "diag", "kron", "kron_joint" or "kron_expand".
        curvature: "ggn", or "hessian" of the summed loss in the parameters, where I + Λ⁻¹ᐟ² H Λ⁻¹ᐟ² is
            positive definite.
    """
    return SlowTwin(model, inputs, targets, task, sigma).evidence(precision, structure, curvature)


def assert_agrees(evidence: object, reference: Reference, rel: float = 1e-8) -> None:
    """Every field that has an equation, to a relative error (absolute below one nat / 1000)."""
    for field in fields(reference):
        expected, got = getattr(reference, field.name), getattr(evidence, field.name)
        if expected is None:
            assert got is None, field.name
        else:
            assert math.isclose(got, expected, rel_tol=rel, abs_tol=rel * 1e-3), (field.name, got, expected)


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


def per_example_jacobians(model: nn.Module, inputs: Tensor, names: list[str]) -> tuple[list[Tensor], Tensor]:
    """Jₙ [K, p] of each example by itself, and the outputs [N, K]."""
    twin = SlowTwin(model, inputs, inputs, "binary")  # whose loss is not asked for
    index = twin.index(dict.fromkeys(names, 1.0))
    outputs = torch.stack([output.flatten() for output in twin.outputs]).detach()
    return [jacobian[:, index] for jacobian in twin.jacobians], outputs


def _whitened(matrix: Tensor, prior: Tensor) -> Tensor:
    return torch.eye(len(prior)).to(matrix) + matrix / prior.sqrt() / prior.sqrt().unsqueeze(1)
