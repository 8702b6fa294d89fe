"""Laws of a likelihood, against PyTorch's losses, their autograd Hessians, and torch.distributions."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributions
from torch.nn import functional as F

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    resolve_likelihood,
)
from tests.refusals import refuses

F64 = torch.float64
N = 4
logits = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=7)


@dataclass(frozen=True)
class Loss:
    """A likelihood beside the function of PyTorch that it stands for."""

    likelihood: Likelihood
    function: Callable[..., Tensor]
    outputs: Tensor
    targets: Tensor

    def torch_loss(self, outputs: Tensor, reduction: str = "sum") -> Tensor:
        return self.function(outputs, self.targets, reduction=reduction)

    def prepared(self) -> tuple[Tensor, object]:
        return self.likelihood.prepare(self.outputs, self.targets)


def classes(*shape: int, num_classes: int = 3, ignored: int | None = None) -> Tensor:
    targets = torch.randint(num_classes, shape)
    if ignored is not None:
        targets[torch.rand(shape) < 0.3] = ignored
        targets[0] = 0  # never all of them
    return targets


def probabilities(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=F64).softmax(1)


def real(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, dtype=F64)


def binary(*shape: int) -> Tensor:
    return torch.randint(2, shape).double()


def classes_last(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda f, y, **kwargs: function(f.movedim(-1, 1), y, **kwargs)


def classes_last_of_both(f: Tensor, y: Tensor, **kwargs) -> Tensor:
    return F.cross_entropy(f.movedim(-1, 1), y.movedim(-1, 1), **kwargs)


W3 = torch.tensor([0.5, 2.0, 0.0], dtype=F64)


def cross_entropy_case(outputs: Tensor, targets: Tensor, last: bool = False, **arguments) -> Loss:
    function = partial(F.cross_entropy, **arguments)
    likelihood = Categorical(**arguments, class_dim=-1 if last else None)
    return Loss(likelihood, classes_last(function) if last else function, outputs, targets)


def binary_case(outputs: Tensor, targets: Tensor, **arguments) -> Loss:
    return Loss(
        Bernoulli(**arguments), partial(F.binary_cross_entropy_with_logits, **arguments), outputs, targets
    )


LOSSES: dict[str, Callable[[], Loss]] = {
    "classes": lambda: cross_entropy_case(real(N, 3), classes(N)),
    "class weights": lambda: cross_entropy_case(real(N, 3), classes(N), weight=W3),
    "label smoothing": lambda: cross_entropy_case(real(N, 3), classes(N), label_smoothing=0.2),
    "weights and smoothing": lambda: cross_entropy_case(
        real(N, 3), classes(N), weight=W3, label_smoothing=0.2
    ),
    "all smoothed": lambda: cross_entropy_case(real(N, 3), classes(N), label_smoothing=1.0),
    "ignored": lambda: cross_entropy_case(real(N, 3), classes(N, ignored=-100)),
    "ignored class": lambda: cross_entropy_case(
        real(N, 3), classes(N, ignored=1), ignore_index=1, weight=W3, label_smoothing=0.1
    ),
    "probabilities": lambda: cross_entropy_case(real(N, 3), probabilities(N, 3)),
    "weighted probabilities": lambda: cross_entropy_case(
        real(N, 3), probabilities(N, 3), weight=W3, label_smoothing=0.2
    ),
    "sequence": lambda: cross_entropy_case(real(N, 3, 2), classes(N, 2)),
    "sequence, everything": lambda: cross_entropy_case(
        real(N, 3, 5), classes(N, 5, ignored=-1), weight=W3, label_smoothing=0.1, ignore_index=-1
    ),
    "sequence, classes last": lambda: cross_entropy_case(
        real(N, 3, 3), classes(N, 3, ignored=-100), last=True, weight=W3
    ),
    "image": lambda: cross_entropy_case(real(2, 3, 2, 4), classes(2, 2, 4, ignored=-100), weight=W3),
    "probabilities, classes last": lambda: Loss(
        Categorical(), classes_last_of_both, real(N, 3, 3), real(N, 3, 3).softmax(-1)
    ),
    "image of probabilities": lambda: Loss(
        Categorical(), F.cross_entropy, real(2, 3, 2, 2), probabilities(2, 3, 2, 2)
    ),
    "binary": lambda: binary_case(real(N), binary(N)),
    "soft binary": lambda: binary_case(real(N, 2), torch.rand(N, 2, dtype=F64)),
    "labels": lambda: binary_case(real(N, 3), binary(N, 3), pos_weight=W3),
    "weighted labels": lambda: binary_case(real(N, 3), binary(N, 3), pos_weight=W3, weight=W3 + 1),
    "weighted examples": lambda: binary_case(real(N, 3), binary(N, 3), weight=torch.rand(N, 1, dtype=F64)),
    "binary image": lambda: binary_case(
        real(2, 3, 2, 2), binary(2, 3, 2, 2), pos_weight=W3.reshape(3, 1, 1), weight=W3[:2]
    ),
    "means": lambda: Loss(Gaussian(1.0), F.mse_loss, real(N, 3), real(N, 3)),
    "image of means": lambda: Loss(Gaussian(1.0), F.mse_loss, real(2, 2, 3), real(2, 2, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_pytorchs(name):
    loss = LOSSES[name]()
    likelihood, prepared = loss.likelihood, loss.prepared()
    terms, unit_loss = likelihood.num_terms(*prepared), likelihood.unit_loss(*prepared)
    for reduction, batch in (("sum", 1), ("mean", None)):
        # The training loss is s times the mean per-example nll.
        scale = likelihood.loss_scale(reduction, terms / len(loss.outputs), batch, 1.0)
        share = 1 if reduction == "sum" else len(loss.outputs)
        torch.testing.assert_close(
            scale * unit_loss / share, loss.torch_loss(loss.outputs, reduction), rtol=1e-12, atol=0
        )


def dense_hessian_of_root(loss: Loss) -> Tensor:
    """Σ over columns and examples of the root's outer products, in the layout of the raw outputs, [D, D]."""
    raw = loss.outputs.detach().requires_grad_()
    prepared, targets = loss.likelihood.prepare(raw, loss.targets)
    root = loss.likelihood.sqrt_hessian(prepared, targets)
    assert root.shape[1:] == prepared.shape
    assert not root.requires_grad
    rows = []
    for column in root:
        for n in range(len(raw)):
            seed = torch.zeros_like(column)
            seed[n] = column[n]
            (row,) = torch.autograd.grad(prepared, raw, seed, retain_graph=True)
            rows.append(row.flatten())
    return torch.stack(rows).mT @ torch.stack(rows)


def dense_hessian_of_torch(loss: Loss) -> Tensor:
    size = loss.outputs.numel()
    hessian = torch.autograd.functional.hessian(loss.torch_loss, loss.outputs.detach())
    return hessian.reshape(size, size)


@pytest.mark.parametrize("name", LOSSES)
def test_root_is_of_the_autograd_hessian(name):
    """Of PyTorch's own summed loss, every entry: examples and tokens of one example do not mix."""
    loss = LOSSES[name]()
    factor = loss.likelihood.loss_scale("sum", 1.0, 1, 1.0)
    torch.testing.assert_close(
        factor * dense_hessian_of_root(loss), dense_hessian_of_torch(loss), rtol=1e-11, atol=1e-14
    )


def predicted_variances() -> Loss:
    outputs = torch.cat([real(N, 2), torch.rand(N, 2, dtype=F64)], dim=1)
    return Loss(HeteroscedasticGaussian(), gaussian_nll, outputs, real(N, 2))


def sure_of_a_class() -> Loss:
    return cross_entropy_case(40 * real(N, 3), classes(N))


@pytest.mark.parametrize("name", [*LOSSES, "predicted variances", "sure"])
@pytest.mark.parametrize("num_vectors", [1, 5])
def test_products_with_the_hessian_are_those_with_its_root(name, num_vectors):
    loss = (LOSSES | {"predicted variances": predicted_variances, "sure": sure_of_a_class})[name]()
    outputs, targets = loss.prepared()
    outputs, tangents = outputs.requires_grad_(), real(num_vectors, *outputs.shape).requires_grad_()
    root = loss.likelihood.sqrt_hessian(outputs, targets).flatten(2)
    matrices = torch.einsum("rno,rnq->noq", root, root)
    expected = torch.einsum("noq,knq->kno", matrices, tangents.detach().flatten(2)).view_as(tangents)
    for product in (type(loss.likelihood).hessian_product, Likelihood.hessian_product):
        image = product(loss.likelihood, outputs, targets, tangents)
        torch.testing.assert_close(image, expected, rtol=1e-12, atol=1e-14)
        assert not image.requires_grad


@given(logits, st.integers(0, 10**6))
def test_products_with_the_hessian_in_float32(values, seed):
    """⟨t, Λt⟩ to a relative error, also where the likeliest class has all but a rounding of the probability."""
    outputs = torch.tensor([values]).clamp(-30, 30)
    tangents = torch.randn(3, 1, len(values), generator=torch.Generator().manual_seed(seed))
    likelihood = Categorical()
    prepared = likelihood.prepare(outputs, torch.zeros(1, dtype=torch.long))
    forms = (tangents * likelihood.hessian_product(*prepared, tangents)).sum((1, 2))
    root = likelihood.sqrt_hessian(outputs.double(), prepared[1])
    expected = torch.einsum("rno,kno->krn", root, tangents.double()).square().sum((1, 2))
    torch.testing.assert_close(forms.double(), expected, rtol=1e-3, atol=0)


def test_products_with_the_hessian_of_a_large_vocabulary():
    """Its root would take 80 GB."""
    outputs, tangents = torch.randn(2, 2, 50_000), torch.randn(2, 2, 2, 50_000)
    prepared = Categorical(class_dim=-1).prepare(outputs, torch.tensor([[7, -100], [3, 4]]))
    image = Categorical().hessian_product(*prepared, tangents)
    p = outputs.double().softmax(-1)
    expected = p * (tangents - (p * tangents).sum(-1, keepdim=True))
    expected[:, 0, 1] = 0.0
    torch.testing.assert_close(image.double(), expected, rtol=1e-4, atol=1e-10)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    weight=st.none() | st.lists(st.floats(0, 100), min_size=4, max_size=4).filter(any),
    smoothing=st.floats(0, 1),
    ignored=st.sampled_from([-100, 0, 3, 7]),
    tokens=st.integers(1, 3),
)
def test_any_cross_entropy(seed, weight, smoothing, ignored, tokens):
    torch.manual_seed(seed)
    targets = classes(N, tokens, num_classes=4)
    if not 0 <= ignored < 4:
        targets[torch.rand(N, tokens) < 0.3] = ignored
    weight = None if weight is None else torch.tensor(weight, dtype=F64)
    loss = cross_entropy_case(
        real(N, 4, tokens), targets, weight=weight, label_smoothing=smoothing, ignore_index=ignored
    )
    loss = Loss(
        Categorical(weight, smoothing, ignored, class_dim=1), loss.function, loss.outputs, loss.targets
    )
    prepared = loss.prepared()
    total, terms = loss.likelihood.unit_loss(*prepared), loss.likelihood.num_terms(*prepared)
    torch.testing.assert_close(total, loss.torch_loss(loss.outputs), rtol=1e-11, atol=1e-300)
    mean = loss.torch_loss(loss.outputs, "mean")
    if terms == 0:  # 0/0, or the smoothed part alone over 0
        assert not mean.isfinite()
    else:
        torch.testing.assert_close(total / terms, mean, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(
        dense_hessian_of_root(loss), dense_hessian_of_torch(loss), rtol=1e-9, atol=1e-12
    )


@given(
    seed=st.integers(0, 10**6),
    pos_weight=st.lists(st.floats(0, 100), min_size=3, max_size=3),
    weight=st.lists(st.floats(0, 100), min_size=N, max_size=N),
)
def test_any_weighted_labels(seed, pos_weight, weight):
    torch.manual_seed(seed)
    loss = binary_case(
        real(N, 3),
        torch.rand(N, 3, dtype=F64),
        pos_weight=torch.tensor(pos_weight, dtype=F64),
        weight=torch.tensor(weight, dtype=F64).unsqueeze(1),
    )
    prepared = loss.prepared()
    mean = loss.likelihood.unit_loss(*prepared) / loss.likelihood.num_terms(*prepared)
    torch.testing.assert_close(mean, loss.torch_loss(loss.outputs, "mean"), rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(
        dense_hessian_of_root(loss), dense_hessian_of_torch(loss), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("name", LOSSES)
def test_preparing_twice_is_preparing_once(name):
    loss = LOSSES[name]()
    once = loss.prepared()
    again = loss.likelihood.prepare(*once)
    assert torch.equal(once[0], again[0])
    assert loss.likelihood.unit_loss(*again) == loss.likelihood.unit_loss(*once)
    assert loss.likelihood.num_terms(*again) == loss.likelihood.num_terms(*once)


@pytest.mark.parametrize(
    ("likelihood", "shape", "columns"),
    [
        (Categorical(class_dim=-1), (8, 128, 1000), "127,872 columns an example and takes 524 GB"),
        (Gaussian(), (32, 3, 64, 64), "12,288 columns an example and takes 19.3 GB"),
    ],
)
def test_roots_that_would_not_fit(likelihood, shape, columns):
    outputs = torch.zeros(1).expand(shape)
    is_classes = isinstance(likelihood, Categorical)
    targets = torch.zeros(shape[:2], dtype=torch.long) if is_classes else outputs
    prepared = likelihood.prepare(outputs, targets)
    with refuses(columns, remedy=("batch_size=", "num_samples=64")):
        likelihood.sqrt_hessian(*prepared)
    assert likelihood.sample_columns(*prepared, 2, torch.Generator()).shape == (2, *prepared[0].shape)


def test_preparing_predicted_variances_twice():
    """Those below `eps` are raised once."""
    likelihood, targets = HeteroscedasticGaussian(eps=0.1), real(N, 2)
    outputs = torch.cat([real(N, 2), torch.rand(N, 2, dtype=F64).square()], dim=1)
    once = likelihood.prepare(outputs, targets)
    again = likelihood.prepare(*once)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert once[0][:, 2:].min() == 0.1


@pytest.mark.parametrize(
    "name", ["classes", "sequence, everything", "weighted probabilities", "weighted labels", "means"]
)
def test_sampled_columns_have_the_hessian_as_their_mean(name):
    """To five standard errors in every entry, those between two tokens of an example among them."""
    loss = LOSSES[name]()
    loss = replace(loss, outputs=loss.outputs / 5)  # no class so rare that it is not drawn
    prepared = loss.prepared()
    root = loss.likelihood.sqrt_hessian(*prepared).flatten(2)
    exact = torch.einsum("rni,rnj->nij", root, root)
    num_columns = 20_000
    generator = torch.Generator().manual_seed(0)
    columns = loss.likelihood.sample_columns(*prepared, num_columns, generator)
    assert columns.shape == (num_columns, *prepared[0].shape)
    products = num_columns * torch.einsum("sni,snj->snij", columns.flatten(2), columns.flatten(2))
    error = products.std(0) / math.sqrt(num_columns)
    assert ((products.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    repeated = loss.likelihood.sample_columns(*prepared, num_columns, torch.Generator().manual_seed(0))
    assert torch.equal(columns, repeated)


def test_sampled_columns_of_a_predicted_variance():
    likelihood = HeteroscedasticGaussian()
    prepared = likelihood.prepare(
        torch.cat([real(N, 2), 0.1 + torch.rand(N, 2, dtype=F64)], dim=1), real(N, 2)
    )
    columns = likelihood.sample_columns(*prepared, 10_000, torch.Generator().manual_seed(0))
    found = torch.einsum("sni,snj->nij", columns, columns)
    root = likelihood.sqrt_hessian(*prepared)
    exact = torch.einsum("rni,rnj->nij", root, root)
    # Random signs: the diagonal has no variance; off it, the product of two roots times ±1.
    diagonal = exact.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), diagonal, rtol=1e-10, atol=0)
    scale = (diagonal.unsqueeze(1) * diagonal.unsqueeze(2)).sqrt()
    assert ((found - exact).abs() <= 5 * scale / math.sqrt(10_000)).all()


def test_sampled_columns_of_examples_do_not_correlate():
    loss = LOSSES["sequence"]()
    columns = loss.likelihood.sample_columns(*loss.prepared(), 20_000, torch.Generator().manual_seed(0))
    columns = columns.flatten(2) * math.sqrt(20_000)
    products = columns[:, 0, :, None] * columns[:, 1, None, :]
    assert (products.mean(0).abs() <= 5 * products.std(0) / math.sqrt(20_000)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_null_loss_is_that_of_outputs_of_zero(name):
    """Equal odds for every class and label."""
    loss = LOSSES[name]()
    prepared = loss.prepared()
    if loss.likelihood.name == "regression":
        assert loss.likelihood.null_loss(*prepared) is None
        return
    expected = loss.torch_loss(torch.zeros_like(loss.outputs)).item()
    assert loss.likelihood.null_loss(*prepared) == pytest.approx(expected, rel=1e-12)


def gram_of_root(likelihood, outputs, targets=None):
    """Σᵣ R[r, n, :] R[r, n, :]ᵀ, [N, C, C]."""
    targets = torch.zeros(len(outputs), dtype=torch.long) if targets is None else targets
    root = likelihood.sqrt_hessian(*likelihood.prepare(outputs, targets))
    return torch.einsum("rnc,rnd->ncd", root, root)


@given(logits)
def test_root_of_the_multinomial_covariance(values):
    """RRᵀ = diag(p) - ppᵀ, however extreme the logits."""
    outputs = torch.tensor([values], dtype=F64)
    p = outputs.softmax(1)[0]
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(gram_of_root(Categorical(), outputs)[0], expected, rtol=1e-12, atol=1e-15)


@given(logits, st.sampled_from([torch.float32, torch.float64]))
def test_root_keeps_relative_precision_where_probabilities_vanish(values, dtype):
    """Diagonal of the covariance, p(1 - p), to a relative error: p itself may be as small as e⁻⁷⁰⁰."""
    outputs = torch.tensor([values], dtype=dtype)
    found = gram_of_root(Categorical(), outputs)[0].diagonal().double()
    log_p = outputs.double().log_softmax(1)[0]
    others = torch.stack([torch.cat([log_p[:i], log_p[i + 1 :]]).logsumexp(0) for i in range(len(values))])
    log_expected = log_p + others
    resolved = log_expected > math.log(torch.finfo(dtype).tiny) + 20
    rounding = 40 * torch.finfo(dtype).eps * max(1.0, outputs.abs().max().item())
    torch.testing.assert_close(
        found[resolved].log(), log_expected[resolved], rtol=0, atol=rounding + 40 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("constant", [1e4, 1e30, -1e30])
def test_root_survives_logits_that_float32_can_hold(constant):
    outputs = torch.tensor([[0.0, constant, 1.0], [0.0, 0.0, 0.0]])
    assert gram_of_root(Categorical(), outputs).isfinite().all()


@given(st.floats(-1e3, 1e3))
def test_binary_root_keeps_relative_precision(logit):
    """√(p(1 - p)) = e^{-|f|/2} / (1 + e^{-|f|})."""
    outputs = torch.tensor([[logit]], dtype=F64)
    found = Bernoulli().sqrt_hessian(*Bernoulli().prepare(outputs, torch.ones(1, 1))).item()
    assert found == pytest.approx(math.exp(-abs(logit) / 2) / (1 + math.exp(-abs(logit))), rel=1e-12, abs=0)


def test_log_likelihood_is_the_log_density():
    f, y = real(N, 3), real(N, 3)
    cases = [
        (Categorical(), classes(N), distributions.Categorical(logits=f), 1.0),
        (Bernoulli(), binary(N, 3), distributions.Bernoulli(logits=f), 1.0),
        (Gaussian(0.3), y, distributions.Normal(f, 0.3), 0.09),
    ]
    for likelihood, targets, density, unit in cases:
        prepared = likelihood.prepare(f, targets)
        loss, terms = likelihood.unit_loss(*prepared).item(), likelihood.num_terms(*prepared)
        assert likelihood.estimate_dispersion(loss, terms) == pytest.approx(unit)
        expected = density.log_prob(targets).sum().item()
        assert likelihood.log_likelihood(loss, unit, terms) == pytest.approx(expected, rel=1e-12)


def test_estimated_noise_is_the_mean_squared_residual():
    outputs, targets = torch.randn(5, 2, dtype=F64), torch.randn(5, 2, dtype=F64)
    likelihood = Gaussian()
    loss = likelihood.unit_loss(outputs, targets).item()
    expected = (outputs - targets).square().mean().item()
    assert likelihood.estimate_dispersion(loss, 10) == pytest.approx(expected, rel=1e-14)
    with refuses("residuals are all zero", remedy="Gaussian(sigma=", error=EvidenceUnavailableError):
        likelihood.estimate_dispersion(0.0, 10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_loss_scale_is_the_ratio_of_pytorchs_loss_to_the_mean_nll(name, reduction):
    """λ = N · weight_decay / s; constants of the density do not count."""
    batch, num_outputs, sigma = 8, 3, 0.4
    likelihood = Gaussian(sigma) if name == "regression" else LIKELIHOODS[name]()
    outputs = torch.randn(batch, num_outputs, dtype=F64, requires_grad=True)
    targets = torch.rand(batch, num_outputs, dtype=F64)
    if name == "classification":
        targets = torch.randint(num_outputs, (batch,))
    if name == "gaussian_nll":
        outputs = torch.rand(batch, 2 * num_outputs, dtype=F64, requires_grad=True)
    functional = {
        "classification": F.cross_entropy,
        "binary": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
        "gaussian_nll": lambda f, y, **kwargs: F.gaussian_nll_loss(f[:, :3], y, f[:, 3:], **kwargs),
    }[name]
    dispersion = likelihood.dispersion
    (theirs,) = torch.autograd.grad(functional(outputs, targets, reduction=reduction), outputs)
    prepared = likelihood.prepare(outputs, targets)
    (ours,) = torch.autograd.grad(likelihood.unit_loss(*prepared) / dispersion / batch, outputs)
    scale = likelihood.loss_scale(reduction, likelihood.num_terms(*prepared) / batch, batch, dispersion)
    torch.testing.assert_close(theirs, scale * ours, rtol=1e-12, atol=0)


def gaussian_nll(outputs: Tensor, targets: Tensor, **kwargs) -> Tensor:
    mean, variance = outputs.chunk(2, dim=1)
    return F.gaussian_nll_loss(mean, targets, variance, reduction="sum", **kwargs)


@given(st.integers(0, 10**6), st.floats(1e-3, 1.0))
def test_predicted_variance(seed, eps):
    torch.manual_seed(seed)
    outputs = torch.cat([real(N, 2), torch.rand(N, 2, dtype=F64)], dim=1)
    targets = real(N, 2)
    likelihood = HeteroscedasticGaussian(eps)
    raw = outputs.clone().requires_grad_()
    prepared = likelihood.prepare(raw, targets)
    unit_loss = likelihood.unit_loss(*prepared)
    torch.testing.assert_close(unit_loss, gaussian_nll(outputs, targets, eps=eps), rtol=1e-12, atol=1e-12)
    # The gradient passes through the clamp, as in PyTorch.
    (ours,) = torch.autograd.grad(unit_loss, raw)
    theirs = torch.autograd.grad(
        gaussian_nll(again := raw.detach().requires_grad_(), targets, eps=eps), again
    )
    torch.testing.assert_close(ours, theirs[0], rtol=1e-12, atol=1e-12)
    noise = outputs[:, 2:].clamp(min=eps).sqrt()
    density = distributions.Normal(outputs[:, :2], noise).log_prob(targets).sum().item()
    assert likelihood.log_likelihood(unit_loss.item(), 1.0, likelihood.num_terms(*prepared)) == pytest.approx(
        density, rel=1e-12, abs=1e-12
    )


@given(st.integers(0, 10**6))
def test_predicted_variance_has_the_fisher_information(seed):
    """E[Hessian] over targets from the model: three Gauss-Hermite nodes are exact for a quadratic in y."""
    torch.manual_seed(seed)
    outputs = torch.cat([real(N, 2), 0.05 + torch.rand(N, 2, dtype=F64)], dim=1)
    mean, variance = outputs.chunk(2, dim=1)
    expected = torch.zeros(outputs.numel(), outputs.numel(), dtype=F64)
    for node, weight in ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6)):
        targets = mean + node * variance.sqrt()
        hessian = torch.autograd.functional.hessian(partial(gaussian_nll, targets=targets), outputs)
        expected += weight * hessian.reshape(expected.shape)
    loss = Loss(HeteroscedasticGaussian(), gaussian_nll, outputs, real(N, 2))
    torch.testing.assert_close(dense_hessian_of_root(loss), expected, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "message"),
    [
        ("classification", (4,), torch.zeros(4).long(), ("shape [N, C]", "got [4]", "binary")),
        ("classification", (4, 1), torch.zeros(4).long(), "C >= 2, got [4, 1]"),
        (
            "classification",
            (4, 3, 3),
            torch.zeros(4, 3).long(),
            "class_dim=1) or Categorical(class_dim=-1",
        ),
        (
            "classification",
            (4, 2, 2),
            torch.full((4, 2, 2), 0.5),
            ("in dimension 1 or in the last", "class_dim"),
        ),
        ("classification", (4, 3, 2), torch.zeros(4, 4).long(), "logits [4, 3, 2]; got [4, 4]"),
        ("classification", (4, 3), torch.tensor([0, 1, 2, 3]), ("0 .. 2", "got 0 .. 3")),
        ("classification", (4, 3), torch.tensor([0, 1, 2, -1]), ("got -1 .. 2", "ignore_index=-100")),
        ("classification", (4, 3), torch.full((4,), 0.5), ("float32", "regression")),
        ("classification", (4, 3), torch.zeros(3).long(), "[3] of torch.int64"),
        ("classification", (4, 3), torch.full((4, 3), 0.5), "sum to 1 in each row"),
        ("classification", (4, 3), torch.tensor([[2.0, -1.0, 0.0]] * 4), "must not be negative"),
        ("binary", (4,), torch.tensor([0.0, 1.0, 2.0, 0.0]), "[0, 1], got 0 .. 2"),
        ("binary", (4, 3), torch.zeros(4), "outputs [4, 3] and targets [4]"),
        ("binary", (4, 3), torch.zeros(3, 4), "outputs [4, 3] and targets [3, 4]"),
        ("regression", (4, 2), torch.zeros(4), "outputs [4, 2] and targets [4]"),
        ("regression", (4, 2, 3), torch.zeros(4, 3, 2), "targets [4, 3, 2]"),
        ("regression", (), torch.zeros(()), "outputs [] and targets []"),
        ("gaussian_nll", (4, 3), torch.zeros(4, 3), ("[N, 2K]", "got outputs [4, 3] and targets [4, 3]")),
        ("gaussian_nll", (4, 2), torch.zeros(4, 2), "got outputs [4, 2] and targets [4, 2]"),
        ("gaussian_nll", (4, 4), torch.zeros(2, 4), "outputs [4, 2] and targets [2, 4]"),
    ],
)
def test_targets_that_do_not_fit(name, outputs, targets, message):
    with refuses(message):
        LIKELIHOODS[name]().prepare(torch.zeros(outputs), targets)


def test_variances_below_zero():
    with refuses("variances to be at least 0, got -0.5", remedy="end in exp"):
        HeteroscedasticGaussian().prepare(torch.tensor([[1.0, -0.5]]), torch.zeros(1))


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (Categorical(weight=torch.ones(2)), ("`weight` to hold one number for each of 3 classes", "[2]")),
        (Bernoulli(weight=torch.ones(2)), "`weight` to broadcast against the outputs [4, 3], got [2]"),
        (Bernoulli(pos_weight=torch.ones(8, 3)), ("`pos_weight` to broadcast", "Weights of single examples")),
    ],
)
def test_weights_that_do_not_fit(likelihood, message):
    targets = classes(4) if isinstance(likelihood, Categorical) else binary(4, 3)
    with refuses(message):
        likelihood.prepare(torch.zeros(4, 3), targets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(weight=[1.0, -1.0]), "`weight` to be finite and at least 0, got -1 .. 1"),
        (lambda: Bernoulli(pos_weight=[math.nan]), "`pos_weight` to be finite"),
        (lambda: Bernoulli(weight=math.inf), "`weight` to be finite"),
        (lambda: Categorical(label_smoothing=1.5), "`label_smoothing` to be in [0, 1], got 1.5"),
        (lambda: Categorical(label_smoothing=True), "`label_smoothing` to be a number"),
        (lambda: Categorical(class_dim=2), "`class_dim` to be 1, -1 or None, got 2"),
        (lambda: HeteroscedasticGaussian(eps=0.0), ("argument `eps`", "above 0")),
    ],
)
def test_arguments_out_of_range(make, message):
    with refuses(message):
        make()


@pytest.mark.parametrize(("outputs", "targets"), [((4,), (4, 1)), ((4, 1), (4,)), ((4, 1, 2), (4, 2))])
def test_trailing_ones_are_immaterial(outputs, targets):
    f, y = Gaussian().prepare(torch.arange(math.prod(outputs)).float().reshape(outputs), torch.zeros(targets))
    assert f.shape == y.shape
    assert f.flatten().tolist() == list(range(math.prod(outputs)))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, True, "1"])
def test_sigma_that_is_no_noise(sigma):
    with refuses("argument `sigma`", remedy="above 0"):
        Gaussian(sigma)


@pytest.mark.parametrize("likelihood", ["poisson", None, 3, Categorical])
def test_unknown_likelihood(likelihood):
    names = "'binary', 'classification', 'gaussian_nll', 'regression'"
    with refuses("argument `likelihood`", remedy=names):
        resolve_likelihood(likelihood)


def test_names_and_objects_resolve():
    given_noise = Gaussian(0.5)
    assert resolve_likelihood(given_noise) is given_noise
    assert repr(given_noise) == "Gaussian(sigma=0.5)"
    assert repr(resolve_likelihood("binary")) == "Bernoulli()"
    assert repr(resolve_likelihood("classification")) == "Categorical()"
    assert repr(resolve_likelihood("gaussian_nll")) == "HeteroscedasticGaussian()"
    weighted = Categorical(weight=[1, 2], label_smoothing=0.1, class_dim=-1)
    assert repr(weighted) == "Categorical(weight=[1.0, 2.0], label_smoothing=0.1, class_dim=-1)"
    assert repr(Bernoulli(pos_weight=torch.tensor(3.0))) == "Bernoulli(pos_weight=3.0)"
