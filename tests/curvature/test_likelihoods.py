"""Laws of a likelihood: square roots against autograd, log-densities against torch.distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions

from lightning_bayes.curvature.errors import EvidenceUnavailableError
from lightning_bayes.curvature.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Gaussian,
    resolve_likelihood,
)

F64 = torch.float64
logits = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=7)


def gram_of_root(likelihood, outputs):
    """Σᵣ R[r, n, :] R[r, n, :]ᵀ, [N, C, C]."""
    root = likelihood.sqrt_hessian(outputs)
    assert root.shape == (likelihood.rank(outputs.shape[1]), *outputs.shape)
    assert not root.requires_grad
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


@pytest.mark.parametrize(
    ("likelihood", "num_outputs", "unit"),
    [(Categorical(), 5, 1.0), (Bernoulli(), 3, 1.0), (Bernoulli(), 1, 1.0), (Gaussian(0.3), 2, 0.09)],
)
def test_root_is_of_the_autograd_hessian_and_loss_is_the_log_density(likelihood, num_outputs, unit):
    outputs = 3 * torch.randn(6, num_outputs, dtype=F64)
    if likelihood.name == "classification":
        targets = torch.randint(num_outputs, (6,))
        density = distributions.Categorical(logits=outputs).log_prob(targets)
    elif likelihood.name == "binary":
        targets = torch.randint(2, (6, num_outputs)).double()
        density = distributions.Bernoulli(logits=outputs).log_prob(targets)
    else:
        targets = torch.randn(6, num_outputs, dtype=F64)
        density = distributions.Normal(outputs, 0.3).log_prob(targets)
    for n, gram in enumerate(gram_of_root(likelihood, outputs)):
        one = targets[n : n + 1]
        hessian = torch.autograd.functional.hessian(
            lambda f, one=one: likelihood.unit_loss(f.unsqueeze(0), one), outputs[n]
        )
        torch.testing.assert_close(gram, hessian, rtol=1e-12, atol=1e-15)
    loss = likelihood.unit_loss(outputs, targets).item()
    assert likelihood.estimate_dispersion(loss, 6, num_outputs) == pytest.approx(unit)
    total = likelihood.log_likelihood(loss, unit, 6, num_outputs)
    assert total == pytest.approx(density.sum().item(), rel=1e-12)


@given(st.floats(-1e3, 1e3))
def test_binary_root_keeps_relative_precision(logit):
    """√(p(1 - p)) = e^{-|f|/2} / (1 + e^{-|f|})."""
    found = Bernoulli().sqrt_hessian(torch.tensor([[logit]], dtype=F64)).item()
    assert found == pytest.approx(math.exp(-abs(logit) / 2) / (1 + math.exp(-abs(logit))), rel=1e-12, abs=0)


def test_estimated_noise_is_the_mean_squared_residual():
    outputs, targets = torch.randn(5, 2, dtype=F64), torch.randn(5, 2, dtype=F64)
    likelihood = Gaussian()
    loss = likelihood.unit_loss(outputs, targets).item()
    expected = (outputs - targets).square().mean().item()
    assert likelihood.estimate_dispersion(loss, 5, 2) == pytest.approx(expected, rel=1e-14)
    with pytest.raises(EvidenceUnavailableError, match=r"residuals are all zero.*Gaussian\(sigma="):
        likelihood.estimate_dispersion(0.0, 5, 2)


def test_null_models():
    assert Categorical().log_null_evidence(7, 10) == pytest.approx(-7 * math.log(10))
    assert Bernoulli().log_null_evidence(7, 3) == pytest.approx(-21 * math.log(2))
    assert Gaussian().log_null_evidence(7, 3) is None


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
    functional = {
        "classification": torch.nn.functional.cross_entropy,
        "binary": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[name]
    dispersion = likelihood.dispersion
    (theirs,) = torch.autograd.grad(functional(outputs, targets, reduction=reduction), outputs)
    (ours,) = torch.autograd.grad(likelihood.unit_loss(outputs, targets) / dispersion / batch, outputs)
    scale = likelihood.loss_scale(reduction, num_outputs, batch, dispersion)
    torch.testing.assert_close(theirs, scale * ours, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "message"),
    [
        ("classification", (4,), torch.zeros(4).long(), r"shape \[N, C\].*got \[4\].*binary"),
        ("classification", (4, 1), torch.zeros(4).long(), r"C >= 2, got \[4, 1\]"),
        ("classification", (4, 3, 2), torch.zeros(4, 2).long(), "per-pixel outputs are not supported"),
        ("classification", (4, 3), torch.tensor([0, 1, 2, 3]), r"0 \.\. 2.*got 0 \.\. 3"),
        ("classification", (4, 3), torch.tensor([0, 1, 2, -100]), "ignore_index"),
        ("classification", (4, 3), torch.zeros(4), r"float32.*regression"),
        ("classification", (4, 3), torch.zeros(3).long(), r"\[3\] of torch.int64"),
        ("classification", (4, 3), torch.full((4, 3), 0.5), "sum to 1 in each row"),
        ("classification", (4, 3), torch.tensor([[2.0, -1.0, 0.0]] * 4), "must not be negative"),
        ("binary", (4,), torch.tensor([0.0, 1.0, 2.0, 0.0]), r"\[0, 1\], got 0 \.\. 2"),
        ("binary", (4, 3), torch.zeros(4), r"outputs \[4, 3\] and targets \[4\]"),
        ("binary", (4, 3), torch.zeros(3, 4), r"outputs \[4, 3\] and targets \[3, 4\]"),
        ("regression", (4, 2), torch.zeros(4), r"outputs \[4, 2\] and targets \[4\]"),
        ("regression", (4, 2, 3), torch.zeros(4, 3, 2), r"targets \[4, 3, 2\]"),
        ("regression", (), torch.zeros(()), r"outputs \[\] and targets \[\]"),
    ],
)
def test_targets_that_do_not_fit(name, outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        LIKELIHOODS[name]().prepare(torch.zeros(outputs), targets)


@pytest.mark.parametrize(("outputs", "targets"), [((4,), (4, 1)), ((4, 1), (4,)), ((4, 1, 2), (4, 2))])
def test_trailing_ones_are_immaterial(outputs, targets):
    f, y = Gaussian().prepare(torch.arange(math.prod(outputs)).float().reshape(outputs), torch.zeros(targets))
    assert f.shape == y.shape
    assert f.flatten().tolist() == list(range(math.prod(outputs)))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, True, "1"])
def test_sigma_that_is_no_noise(sigma):
    with pytest.raises(ValueError, match=r"argument `sigma`.*above 0"):
        Gaussian(sigma)


@pytest.mark.parametrize("likelihood", ["poisson", None, 3, Categorical])
def test_unknown_likelihood(likelihood):
    with pytest.raises(ValueError, match=r"argument `likelihood`.*'binary', 'classification', 'regression'"):
        resolve_likelihood(likelihood)


def test_names_and_objects_resolve():
    given_noise = Gaussian(0.5)
    assert resolve_likelihood(given_noise) is given_noise
    assert repr(given_noise) == "Gaussian(sigma=0.5)"
    assert repr(resolve_likelihood("binary")) == "Bernoulli()"
