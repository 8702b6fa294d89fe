"""The candidates: who computes the log-evidence, by which structure. Each returns nats, or nats and standard error.

Peers get what helps them: eval mode, BackPACK's graph converter where a network is no Sequential, sums over
the same batches. laplace-torch has no Bernoulli likelihood with one logit z; it gets the softmax of (0, z),
which is the same model.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import Model, Trained
from torch import Tensor, nn

__all__ = ["CANDIDATES", "Candidate", "candidates_of"]

PRIOR_PRECISION = 1.0


@dataclass(frozen=True)
class Candidate:
    """One library with one structure."""

    library: str
    backend: str
    structure: str
    run: Callable[[Trained], float | tuple[float, float] | None]
    note: str = ""

    @property
    def name(self) -> str:
        """Unique among the candidates."""
        return " ".join(part for part in (self.library, self.backend, self.structure) if part)


def _ours(structure: str, tolerance: float | None = None) -> Callable[[Trained], tuple[float, float]]:
    def run(data: Trained) -> tuple[float, float]:
        from lightning_bayes import laplace_evidence  # noqa: PLC0415

        evidence = laplace_evidence(
            data.net,
            (data.x, data.y),
            likelihood="binary" if data.binary else "classification",
            structure=structure,
            prior_precision=PRIOR_PRECISION,
            batch_size=data.batch_size,
            tolerance=tolerance,
        )
        return evidence.log_evidence, evidence.log_evidence_stderr

    return run


def _laplace_torch(structure: str, backend: str) -> Callable[[Trained], float]:
    def run(data: Trained) -> float:
        from laplace import Laplace, curvature  # noqa: PLC0415
        from torch.utils.data import DataLoader, TensorDataset  # noqa: PLC0415

        net = _two_logits(data.net) if data.binary else data.net
        if backend == "BackPackGGN" and not isinstance(net, nn.Sequential):
            from backpack.custom_module.graph_utils import convert_module_to_backpack  # noqa: PLC0415

            net = convert_module_to_backpack(net, debug=False).eval()
        fitted = Laplace(
            net,
            "classification",
            subset_of_weights="all",
            hessian_structure=structure,
            prior_precision=PRIOR_PRECISION,
            backend=getattr(curvature, backend),
        )
        fitted.fit(DataLoader(TensorDataset(data.x, data.y), batch_size=data.batch_size))
        return float(fitted.log_marginal_likelihood())

    return run


def _two_logits(net: nn.Module) -> nn.Module:
    from backpack.custom_module.pad import Pad  # noqa: PLC0415 - a module that each backend can see through

    return nn.Sequential(net, Pad((1, 0), mode="constant", value=0.0)).eval()


def _curvlinops_kron(data: Trained) -> float:
    """Ln det(I + B⊗A/λ) from curvlinops' factors, whose own `logdet` knows no prior."""
    from curvlinops import KFACLinearOperator  # noqa: PLC0415

    parameters = [p for p in data.net.parameters() if p.requires_grad]
    batches = [(x, y.unsqueeze(1).to(x) if data.binary else y) for x, y in data.batches()]
    operator = KFACLinearOperator(
        data.net, _torch_loss(data), parameters, batches, fisher_type="type-2", check_deterministic=False
    )
    operator.compute_kronecker_factors()
    factors = operator.state_dict()
    log_det = torch.zeros(())
    for name, output in factors["gradient_covariances"].items():
        values = torch.linalg.eigvalsh(output).clamp(min=0) / PRIOR_PRECISION
        inputs = torch.linalg.eigvalsh(factors["input_covariances"][name]).clamp(min=0)
        log_det = log_det + torch.log1p(torch.outer(values, inputs)).sum()
        if getattr(data.net.get_submodule(name), "bias", None) is not None:
            log_det = log_det + torch.log1p(values).sum()
    return _evidence(data, log_det)


def _curvlinops_full(data: Trained) -> float:
    """Ln det(I + G/λ) of the operator made dense by its product with the identity."""
    from curvlinops import GGNLinearOperator  # noqa: PLC0415

    parameters = [p for p in data.net.parameters() if p.requires_grad]
    batches = [(x, y.unsqueeze(1).to(x) if data.binary else y) for x, y in data.batches()]
    operator = GGNLinearOperator(data.net, _torch_loss(data), parameters, batches, check_deterministic=False)
    identity = torch.eye(operator.shape[0], dtype=data.x.dtype)
    dense = operator @ identity
    return _evidence(data, torch.linalg.slogdet(identity + dense / PRIOR_PRECISION)[1])


def _torch_loss(data: Trained) -> nn.Module:
    return (nn.BCEWithLogitsLoss if data.binary else nn.CrossEntropyLoss)(reduction="sum")


def _dense(data: Trained) -> float:
    """torch.func Jacobians of all examples, and slogdet on the smaller side."""
    whitened = _dense_rows(data)
    matrix, _ = _smaller_side(whitened)
    return _evidence(data, torch.linalg.slogdet(matrix)[1])


def _dense_all_fields(data: Trained) -> float:
    """The same with what this package answers besides: effective parameters and the Newton decrement."""
    whitened = _dense_rows(data)
    matrix, wide = _smaller_side(whitened)
    factor = torch.linalg.cholesky(matrix)
    inverse = torch.cholesky_inverse(factor)
    effective = len(matrix) - inverse.diagonal().sum()
    data.net.zero_grad()
    for x, y in data.batches():
        data.loss(data.net(x), y).backward()
    slope = [p.grad + PRIOR_PRECISION * p.detach() for p in data.net.parameters() if p.grad is not None]
    slope = torch.cat([part.flatten() for part in slope]) / PRIOR_PRECISION**0.5
    seen = whitened @ slope
    quadratic = slope @ slope - seen @ (inverse @ seen) if wide else slope @ (inverse @ slope)
    if not bool(torch.isfinite(effective + quadratic)):
        raise RuntimeError("effective parameters or Newton decrement are not finite")
    return _evidence(data, 2 * factor.diagonal().log().sum())


def _smaller_side(whitened: Tensor) -> tuple[Tensor, bool]:
    """I + VVᵀ/λ or I + VᵀV/λ, and whether it is the former."""
    wide = whitened.shape[0] < whitened.shape[1]
    matrix = whitened @ whitened.mT if wide else whitened.mT @ whitened
    matrix.diagonal().add_(1.0)
    return matrix, wide


def _dense_rows(data: Trained) -> Tensor:
    """V/√λ by torch.func."""
    from torch.func import functional_call, jacrev, vmap  # noqa: PLC0415

    torch.backends.mha.set_fastpath_enabled(False)  # it has no batching rule
    parameters = {name: p.detach() for name, p in data.net.named_parameters()}

    def output(values: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(data.net, values, (example.unsqueeze(0),)).squeeze(0)

    rows = []
    for x, _ in data.batches():
        with torch.no_grad():
            outputs = data.net(x)
        parts = vmap(jacrev(output), (None, 0))(parameters, x)
        jacobian = torch.cat([part.flatten(2) for part in parts.values()], dim=2)  # [N, C, p]
        if data.binary:
            probability = outputs.sigmoid()
            root = (probability * (1 - probability)).sqrt().unsqueeze(2)
        else:
            root = _softmax_root(outputs)
        rows.append((root.mT @ jacobian).flatten(0, 1))
    return torch.cat(rows) / PRIOR_PRECISION**0.5


def _softmax_root(logits: Tensor) -> Tensor:
    """R [N, C, C] with RRᵀ = diag(p) − ppᵀ."""
    p = logits.softmax(1)
    return torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)


def _evidence(data: Trained, log_det: Tensor) -> float:
    with torch.no_grad():
        loss = sum(data.loss(data.net(x), y).item() for x, y in data.batches())
    penalty = sum(PRIOR_PRECISION * p.detach().square().sum().item() / 2 for p in data.net.parameters())
    return -loss - penalty - log_det.item() / 2


def _floor(data: Trained) -> None:
    """The product and the factorisation that the exact evidence of 784-800-10 cannot avoid."""
    rows = 9 * len(data.x)
    factors = torch.randn(rows, 800, dtype=data.x.dtype)
    matrix = factors @ factors.mT
    matrix.div_(800).diagonal().add_(1.0)
    torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, torch.empty((), dtype=torch.int32)))


CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        *(
            Candidate("lightning-bayes", "", structure, _ours(structure))
            for structure in ("full", "kron", "kron_joint", "kron_expand", "diag")
        ),
        Candidate("lightning-bayes", "", "tolerance 1", _ours("full", 1.0), "bracket of 1 nat"),
        Candidate("lightning-bayes", "", "tolerance 10", _ours("full", 10.0), "bracket of 10 nats"),
        Candidate("lightning-bayes", "", "lanczos", _ours("lanczos"), "8 random vectors"),
        Candidate("lightning-bayes", "", "blocks", _ours("blocks"), "the estimate between its bounds"),
        Candidate("lightning-bayes", "", "auto", _ours("auto"), "what a call without arguments does"),
        *(
            Candidate("laplace-torch", backend, structure, _laplace_torch(structure, backend))
            for backend in ("BackPackGGN", "CurvlinopsGGN", "AsdlGGN")
            for structure in ("full", "kron", "diag")
        ),
        Candidate("curvlinops", "", "kron", _curvlinops_kron, "KFAC factors, eigenvalues by torch"),
        Candidate("curvlinops", "", "full", _curvlinops_full, "GGN operator made dense, slogdet"),
        Candidate("torch", "", "full", _dense, "torch.func Jacobians, slogdet of the smaller side"),
        Candidate(
            "torch", "", "full, all fields", _dense_all_fields, "and effective parameters, Newton decrement"
        ),
        Candidate("torch", "", "GEMM + Cholesky", _floor, "the arithmetic of exact, no evidence"),
    )
}


def candidates_of(model: Model) -> list[Candidate]:
    """Those that make sense: the arithmetic floor is that of one network."""
    return [
        candidate
        for candidate in CANDIDATES.values()
        if candidate.structure != "GEMM + Cholesky" or model.name == "mlp-1000"
    ]


# One of laplace-torch's dependencies is compiled with torch.jit, which newer versions of torch lament.
warnings.filterwarnings("ignore", category=FutureWarning)
