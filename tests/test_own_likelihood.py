"""A likelihood of the user's own from one function, against the ones that it stands for."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_bayes import (
    Categorical,
    EvidenceUnavailableError,
    LaplaceEvidence,
    NegativeLogLikelihood,
    evidence_curve,
    laplace_evidence,
)
from tests.refusals import refuses
from tests.scenarios import DECAY, Module, N, cross_entropy, fit, loader, mlp, tensors


def categorical(logits, target):
    return -(logits.log_softmax(-1) * (torch.arange(3) == target)).sum()


def poisson(log_rate, count):
    return (log_rate.exp() - count * log_rate + torch.lgamma(count + 1)).sum()


def normal(outputs, target):
    mean, raw = outputs
    return 0.5 * ((target[0] - mean) ** 2 * raw.exp() - raw + torch.log(2 * torch.tensor(torch.pi)))


def normal_information(outputs):
    _, raw = outputs
    return torch.diag(torch.stack([raw.exp(), 0.5 + 0 * raw]))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return mlp().double()


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_it_is_the_likelihood_that_it_says(net, structure):
    own, known = (
        laplace_evidence(net, tensors(), likelihood=likelihood, structure=structure)
        for likelihood in (NegativeLogLikelihood(categorical), "classification")
    )
    for name in ("log_evidence", "log_likelihood", "newton_decrement", "effective_parameters"):
        assert getattr(own, name) == pytest.approx(getattr(known, name), rel=1e-9)
    assert own.log_evidence_ratio is None and own.note is None


def test_the_true_hessian(net):
    own, known = (
        laplace_evidence(net, tensors(), likelihood=likelihood, curvature="hessian", prior_precision=50.0)
        for likelihood in (NegativeLogLikelihood(categorical), Categorical())
    )
    assert own.log_evidence == pytest.approx(known.log_evidence, rel=1e-9)


def test_in_a_trainer(tmp_path):
    module = Module(mlp(), cross_entropy)
    callback = LaplaceEvidence(
        likelihood=NegativeLogLikelihood(categorical),
        network=lambda module, batch: (module(batch[0]), batch[1]),
    )
    fit(tmp_path, module, loader(), callback)
    expected = laplace_evidence(module.network.eval(), tensors(), prior_precision=DECAY * N)
    assert callback.history[0][1].log_evidence == pytest.approx(expected.log_evidence, rel=1e-9)


def test_curves_and_batches(net):
    own = NegativeLogLikelihood(categorical)
    whole, parts = (laplace_evidence(net, tensors(), likelihood=own, batch_size=size) for size in (N, 4))
    assert whole.log_evidence == pytest.approx(parts.log_evidence, rel=1e-9)
    curve = evidence_curve(net, tensors(), likelihood=own)
    known = evidence_curve(net, tensors())
    assert curve.log_evidence == pytest.approx(known.log_evidence, rel=1e-9)


def test_one_that_is_not_convex_needs_its_fisher_information():
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(4, 2).double(), tensors("regression")
    with refuses(
        ("is not convex in the outputs", "eigenvalue -"),
        remedy="fisher_information=",
        error=EvidenceUnavailableError,
    ):
        laplace_evidence(net, (x, y), likelihood=NegativeLogLikelihood(normal))
    own = NegativeLogLikelihood(normal, fisher_information=normal_information)
    evidence = laplace_evidence(net, (x, y), likelihood=own)

    class Variances(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            mean, raw = self.net(x).chunk(2, dim=1)
            return torch.cat([mean, (-raw).exp()], dim=1)

    known = laplace_evidence(Variances(), (x, y), likelihood="gaussian_nll")
    assert evidence.log_evidence == pytest.approx(known.log_evidence, rel=1e-7)


def test_the_example_of_the_page():
    """Its Fisher information is that of a sample, and its outputs' evidence is finite."""
    page = (Path(__file__).parent.parent / "docs" / "likelihoods.md").read_text(encoding="utf-8")
    names = {}
    torch.manual_seed(0)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    assert math.isfinite(names["evidence"].log_evidence) and names["evidence"].log_evidence_ratio is None
    outputs = torch.tensor([0.4, -0.3], dtype=torch.float64)
    zero = torch.rand(100_000) < torch.sigmoid(outputs[1])
    counts = torch.poisson(outputs[0].exp().expand(100_000)).masked_fill(zero, 0.0)
    scores = torch.func.vmap(torch.func.grad(names["zero_inflated_poisson"]), (None, 0))(outputs, counts)
    products = scores.unsqueeze(2) * scores.unsqueeze(1)
    mean, stderr = products.mean(0), products.std(0) / len(products) ** 0.5
    assert bool(((names["information"](outputs) - mean).abs() < 5 * stderr).all())


def test_a_generalised_one_says_so(net):
    evidence = laplace_evidence(
        net, tensors(), likelihood=NegativeLogLikelihood(categorical, normalised=False)
    )
    assert "generalised evidence of exp(-loss)" in str(evidence)


def test_what_it_does_not_take(net):
    with refuses("`function`", 3):
        NegativeLogLikelihood(3)
    with refuses("`fisher_information`", 3):
        NegativeLogLikelihood(poisson, 3)
    with refuses("`function` to return one number", remedy="add up its terms"):
        laplace_evidence(net, tensors(), likelihood=NegativeLogLikelihood(lambda f, y: f.square()))
    with refuses("up to 512 outputs"):
        wide = nn.Linear(4, 600).double()
        laplace_evidence(wide, tensors(), likelihood=NegativeLogLikelihood(categorical))
    with refuses("as many examples"):
        x, y = tensors()
        NegativeLogLikelihood(categorical).prepare(net(x), y[:3])
    assert repr(NegativeLogLikelihood(poisson, normalised=False)).startswith(
        "NegativeLogLikelihood(function="
    )
