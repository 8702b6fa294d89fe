"""Each Fisher information in the table against the scores of draws from the distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions
from torch.nn import functional as F

from lightning_bayes.capture.any_loss.distributions import (
    LOSSES,
    TABLE,
    VECTORS,
    density_of,
    density_of_call,
    noted_log_probs,
)
from lightning_bayes.capture.loss_calls import LossCalls
from lightning_bayes.numerics.expected_values import expected_over_counts

DRAWS, STDERRS = 200_000, 5.0


def parameter(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


FAMILIES = {
    distributions.Normal: lambda: distributions.Normal(parameter(0.3, -2.0), parameter(0.7, 3.0)),
    distributions.Laplace: lambda: distributions.Laplace(parameter(0.3, -2.0), parameter(0.7, 3.0)),
    distributions.StudentT: lambda: distributions.StudentT(
        parameter(2.5, 9.0), parameter(0.3, -2.0), parameter(0.7, 3.0)
    ),
    distributions.Gamma: lambda: distributions.Gamma(parameter(0.6, 4.0), parameter(0.5, 3.0)),
    distributions.Poisson: lambda: distributions.Poisson(parameter(0.4, 7.0)),
    distributions.Exponential: lambda: distributions.Exponential(parameter(0.4, 7.0)),
    distributions.Geometric: lambda: distributions.Geometric(parameter(0.2, 0.7)),
    distributions.Bernoulli: lambda: distributions.Bernoulli(logits=parameter(-1.0, 2.0)),
    distributions.NegativeBinomial: lambda: distributions.NegativeBinomial(
        parameter(0.6, 5.0), logits=parameter(1.0, -0.5)
    ),
    distributions.Categorical: lambda: distributions.Categorical(
        logits=parameter([0.1, 1.0, -1.0], [0.0, 3.0, 1.0])
    ),
    distributions.OneHotCategorical: lambda: distributions.OneHotCategorical(
        logits=parameter([0.1, 1.0, -1.0])
    ),
    distributions.Dirichlet: lambda: distributions.Dirichlet(parameter([0.8, 2.0, 3.0], [4.0, 1.0, 1.0])),
}


def sampled(distribution, density, y):
    """The mean outer product of scores [..., P, P] and its standard error."""
    log_p = distribution.log_prob(y)
    # A parameter is shared by all draws: a copy for each gives each its own score.
    scores = torch.stack(scores_of(distribution, density, y), dim=-1)
    if density.vector:
        scores = scores[..., 0]
    products = scores.unsqueeze(-1) * scores.unsqueeze(-2)
    assert len(products) == len(log_p)
    return products.mean(0), products.std(0) / len(products) ** 0.5


def scores_of(distribution, density, y):
    attributes = (VECTORS[type(distribution)][0],) if density.vector else TABLE[type(distribution)][0]
    copies = {
        name: getattr(distribution, name).detach().expand(len(y), *getattr(distribution, name).shape).clone()
        for name in attributes
    }
    for tensor in copies.values():
        tensor.requires_grad_()
    total = type(distribution)(**copies, validate_args=False).log_prob(y).sum()
    return list(torch.autograd.grad(total, list(copies.values())))


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)
def test_information_is_that_of_the_scores(kind):
    torch.manual_seed(0)
    distribution = FAMILIES[kind]()
    y = distribution.sample((DRAWS,))
    density = density_of(distribution, distribution.log_prob(y[0]))
    mean, stderr = sampled(distribution, density, y)
    assert bool(((density.information - mean).abs() <= STDERRS * stderr + 1e-12).all())


def test_every_family_is_tried():
    assert FAMILIES.keys() == TABLE.keys() | VECTORS.keys()


@settings(deadline=None, max_examples=30)
@given(st.floats(0.05, 50.0), st.floats(-4.0, 2.0))
def test_information_of_a_negative_binomial_is_positive_definite(count, logit):
    distribution = distributions.NegativeBinomial(parameter(count), logits=parameter(logit))
    density = density_of(distribution, distribution.log_prob(torch.tensor([3.0])))
    assert bool((torch.linalg.eigvalsh(density.information) > 0).all())


def test_expected_values_of_counts_are_those_of_a_poisson():
    rate = torch.tensor([0.3, 40.0], dtype=torch.float64)

    def log_density(y):
        return y * rate.log() - rate - torch.lgamma(y + 1)

    # E 1/(y + 1) = (1 - exp(-λ))/λ.
    found = expected_over_counts(log_density, lambda y: 1 / (y + 1 + 0 * rate), rate)
    torch.testing.assert_close(found, (1 - (-rate).exp()) / rate)


def test_a_tail_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="too far to be added up"):
        expected_over_counts(lambda y: -40 + 0 * y, lambda y: y, torch.ones(()))


def test_what_has_no_graph_has_no_share():
    scale = torch.ones(2, dtype=torch.float64)
    distribution = distributions.Normal(parameter(0.3, -2.0), scale)
    density = density_of(distribution, distribution.log_prob(scale))
    assert [tensor.shape for tensor in density.parameters] == [(2,)] and density.information.shape == (
        2,
        1,
        1,
    )
    assert density_of(distributions.Normal(scale, scale), scale) is None
    assert density_of(distributions.Cauchy(parameter(0.3), parameter(1.0)), scale) is None


@pytest.mark.parametrize(
    "kwargs", [{}, {"log_input": False}, {"full": True}, {"log_input": False, "full": True}]
)
def test_a_poisson_loss_leaves_out_what_is_said(kwargs):
    f, y = parameter(0.4, 1.3, 2.2), torch.tensor([0.0, 1.0, 6.0], dtype=torch.float64)
    with LossCalls() as recorder:
        loss = F.poisson_nll_loss(f, y, reduction="sum", **kwargs)
    density = density_of_call(recorder.calls[0])
    rate = f if kwargs.get("log_input") is False else f.exp()
    expected = -distributions.Poisson(rate).log_prob(y).sum()
    torch.testing.assert_close(loss + density.constant.sum(), expected, rtol=1e-7, atol=1e-7)
    assert F.l1_loss in LOSSES


def test_calls_are_noted_only_in_the_block_and_the_classes_are_as_they_were():
    before = {kind: vars(kind)["log_prob"] for kind in FAMILIES}
    distribution = FAMILIES[distributions.Normal]()
    with pytest.raises(RuntimeError, match="user"), noted_log_probs() as calls:
        distribution.log_prob(torch.zeros(2))
        raise RuntimeError("user")
    assert [its for its, _ in calls] == [distribution]
    distribution.log_prob(torch.zeros(2))
    assert len(calls) == 1
    assert before == {kind: vars(kind)["log_prob"] for kind in FAMILIES}
