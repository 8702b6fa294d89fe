"""Logistic regression: the draw, the fit, the evidence and the chains, against formulas written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special
from sklearn.linear_model import LogisticRegression

from examples.smith_le_2018 import langevin, logistic
from examples.smith_le_2018.data import Digits, load_digits
from examples.smith_le_2018.langevin import LangevinSettings, sample
from examples.smith_le_2018.logistic import (
    CONVERGED,
    LogisticSettings,
    cost_and_derivatives,
    design_of,
    fit,
    two_digits,
)

SETTINGS = LogisticSettings(num_examples=60, labels="true", prior_precision=2.0, fit_by="newton", seed=1)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_sets_are_balanced_and_disjoint_and_drawn_by_the_seed(digits):
    data = two_digits(digits, 800, "true", 0)
    assert data.train_inputs.shape == (800, 784) and data.test_inputs.shape == (200, 784)
    assert data.train_labels.mean() == data.test_labels.mean() == 0.5
    train, test = ({row.numpy().tobytes() for row in part} for part in (data.train_inputs, data.test_inputs))
    assert not train & test
    again, other = two_digits(digits, 800, "true", 0), two_digits(digits, 800, "true", 1)
    assert torch.equal(again.train_inputs, data.train_inputs)
    assert not torch.equal(other.train_inputs, data.train_inputs)


def test_labels_are_those_of_the_images(digits):
    images = torch.cat([digits.train_images, digits.test_images])
    known = {
        row.numpy().tobytes(): int(label)
        for row, label in zip(images, torch.cat([digits.train_labels, digits.test_labels]), strict=True)
    }
    data = two_digits(digits, 20, "true", 3)
    for row, label in zip((data.train_inputs * 255).round().byte(), data.train_labels, strict=True):
        assert known[row.numpy().tobytes()] == label


def test_random_labels_are_coins_on_the_same_images(digits):
    true, random = (two_digits(digits, 400, labels, 0) for labels in ("true", "random"))
    assert torch.equal(true.train_inputs, random.train_inputs)
    agreement = (true.test_labels == random.test_labels).double().mean()
    assert abs(agreement - 0.5) < 4 * 0.5 / math.sqrt(len(true.test_labels))


def test_wrong_settings_are_refused(digits):
    with pytest.raises(ValueError, match='"true" or "random", but got \'all\''):
        two_digits(digits, 10, "all", 0)
    with pytest.raises(ValueError, match="from 2 to 998"):
        two_digits(digits, 1000, "true", 0)


@pytest.mark.parametrize("precision", [1e-3, 1.0, 1e3])
def test_the_fit_is_scikit_learns(digits, precision):
    data = two_digits(digits, 100, "random", 0)
    design = design_of(data.train_inputs)
    reference = LogisticRegression(
        C=1 / precision, fit_intercept=False, tol=1e-10, max_iter=1000, solver="newton-cholesky"
    ).fit(design, data.train_labels.numpy())
    found = fit(data.train_inputs, data.train_labels, precision).numpy()
    np.testing.assert_allclose(found, reference.coef_[0], atol=1e-6 * np.abs(found).max())


@pytest.mark.parametrize("labels", ["true", "random"])
@pytest.mark.parametrize("precision", [1e-2, 2.0, 1e3])
def test_the_evidence_is_that_of_the_dense_hessian(digits, labels, precision):
    """ln P(y|ω) - ½ λ|ω|² - ½ ln det(H/λ) + N ln 2, the Hessian by autograd."""
    measured = logistic.measure(digits, replace(SETTINGS, labels=labels, prior_precision=precision))
    data = two_digits(digits, SETTINGS.num_examples, labels, SETTINGS.seed)
    design = torch.from_numpy(design_of(data.train_inputs))
    weights = fit(data.train_inputs, data.train_labels, precision)

    def cost(w):
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            design @ w, data.train_labels, reduction="sum"
        )
        return losses + precision / 2 * w @ w

    hessian = torch.autograd.functional.hessian(cost, weights)
    log_det = torch.linalg.slogdet(hessian / precision).logabsdet
    expected = -cost(weights) - log_det / 2 + SETTINGS.num_examples * math.log(2)
    assert measured.log_evidence_ratio == pytest.approx(expected.item(), rel=1e-8, abs=1e-7)
    gradient = torch.func.grad(cost)(weights)
    assert gradient @ torch.linalg.solve(hessian, gradient) / 2 < CONVERGED
    assert measured.newton_decrement < CONVERGED


def test_gradient_and_hessian_are_autograds():
    generator = np.random.default_rng(0)
    design, labels, weights = generator.random((9, 4)), generator.integers(2, size=9), generator.random(4)
    gradient, hessian = cost_and_derivatives(weights, design, labels, 0.7)

    def cost(w):
        logits = torch.from_numpy(design) @ w
        return (torch.nn.functional.softplus(logits) - torch.from_numpy(labels) * logits).sum() + 0.35 * w @ w

    point = torch.from_numpy(weights)
    np.testing.assert_allclose(gradient, torch.func.grad(cost)(point).numpy(), rtol=1e-12)
    np.testing.assert_allclose(hessian, torch.autograd.functional.hessian(cost, point).numpy(), rtol=1e-12)


@pytest.mark.slow
def test_a_lightning_run_gives_the_same_number(digits):
    newton, lightning = (
        logistic.measure(digits, replace(SETTINGS, prior_precision=10.0, fit_by=by))
        for by in ("newton", "lightning")
    )
    assert lightning.log_evidence_ratio == pytest.approx(newton.log_evidence_ratio, abs=1e-6)
    assert lightning.newton_decrement < CONVERGED
    assert lightning.test_loss == pytest.approx(newton.test_loss, rel=1e-5)


def test_chains_of_one_weight_sample_the_posterior():
    """One weight, whose posterior is summed over a grid: not Gaussian, and the chains must say so."""
    design, labels, precision = np.array([[1.0], [2.0], [0.5]]), np.array([1, 1, 1]), 1.0
    grid = np.linspace(-6, 10, 4001)
    losses = -special.log_expit(grid[:, None] * design[:, 0]).sum(1)
    weight = np.exp(-losses - grid**2 / 2)
    weight /= weight.sum()
    mean = weight @ grid
    minimum = np.array([grid[weight.argmax()]])
    settings = LangevinSettings(num_examples=3, prior_precision=precision, chains=400, times=40.0, seed=0)
    found = sample(design, labels, minimum, precision, settings)
    variance = weight @ (grid - mean) ** 2
    # 8,000 independent draws or more: 2 % in a variance; the step size adds 2.5 %.
    assert np.abs(found.means[0]) == pytest.approx(np.abs(mean - minimum[0]), abs=0.05)
    assert found.variances[0] == pytest.approx(variance, rel=0.07)
    assert found.loss == pytest.approx(weight @ losses, rel=0.05)


def test_chains_on_a_gaussian_have_its_variance():
    """Without data the posterior is the prior, and the discrete chain's variance is known: 1/(λ (1 - ηλ/2))."""
    design, labels = np.zeros((2, 3)), np.array([0, 1])
    settings = LangevinSettings(num_examples=2, prior_precision=4.0, chains=500, times=40.0, seed=0)
    found = sample(design, labels, np.zeros(3), 4.0, settings)
    expected = 1 / (4.0 * (1 - langevin.STEP / 2))
    np.testing.assert_allclose(found.variances, expected, rtol=0.06)
    assert found.loss == pytest.approx(2 * math.log(2))
    assert found.laplace_loss == pytest.approx(2 * math.log(2))


def test_few_digits_are_refused():
    images, labels = torch.zeros(4, 784, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="from 2 to 2"):
        two_digits(Digits("four", images, labels, images[:0], labels[:0]), 4, "true", 0)
