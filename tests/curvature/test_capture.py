"""The loss that counts is found, whatever surrounds it, and held against the value returned."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bayes.curvature.capture import KNOWN, capture_loss
from lightning_bayes.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from lightning_bayes.curvature.loss_arguments import READERS

N = 6


@pytest.fixture
def net():
    return nn.Linear(4, 3)


@pytest.fixture
def x():
    return torch.randn(N, 4)


@pytest.fixture
def y():
    return torch.randint(3, (N,))


FOUND = {
    "cross_entropy": (F.cross_entropy, Categorical, "mean"),
    "keywords": (lambda f, y: F.cross_entropy(target=y, input=f), Categorical, "mean"),
    "sum": (lambda f, y: F.cross_entropy(f, y, reduction="sum"), Categorical, "sum"),
    "none, then sum": (lambda f, y: F.cross_entropy(f, y, reduction="none").sum(), Categorical, "sum"),
    "none, then a mean by hand": (
        lambda f, y: F.cross_entropy(f, y, reduction="none").sum() / len(y),
        Categorical,
        "mean",
    ),
    "nll": (lambda f, y: F.nll_loss(f.log_softmax(1), y), Categorical, "mean"),
    "probabilities": (lambda f, y: F.cross_entropy(f, F.one_hot(y, 3).float()), Categorical, "mean"),
    "bce": (
        lambda f, y: nn.BCEWithLogitsLoss()(f, F.one_hot(y, 3).float()),
        Bernoulli,
        "mean",
    ),
    "mse": (lambda f, y: F.mse_loss(f, F.one_hot(y, 3).float()), Gaussian, "mean"),
    "mse sum": (lambda f, y: nn.MSELoss(reduction="sum")(f, F.one_hot(y, 3).float()), Gaussian, "sum"),
    "in a dict": (lambda f, y: {"loss": F.cross_entropy(f, y), "logits": f}, Categorical, "mean"),
    "one element": (lambda f, y: F.cross_entropy(f, y).reshape(1), Categorical, "mean"),
    "neutral arguments": (
        lambda f, y: F.cross_entropy(f, y, weight=None, label_smoothing=0.0),
        Categorical,
        "mean",
    ),
    "other losses beside": (
        lambda f, y: (F.l1_loss(f, f + 1), F.cross_entropy(f, y), F.mse_loss(f, f + 1))[1],
        Categorical,
        "mean",
    ),
    "added zero": (lambda f, y: F.cross_entropy(f, y) + 0.0 * f.detach().sum(), Categorical, "mean"),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(net, x, y, name):
    step, likelihood, reduction = FOUND[name]
    captured = capture_loss(lambda: step(net(x), y))
    assert type(captured.likelihood) is likelihood
    assert captured.reduction == reduction
    assert captured.outputs.shape == (N, 3) and captured.outputs.requires_grad
    assert len(captured.targets) == N


def test_outputs_keep_their_graph(net, x, y):
    captured = capture_loss(lambda: F.cross_entropy(net(x), y))
    assert torch.equal(captured.outputs, net(x))
    (gradient,) = torch.autograd.grad(captured.outputs.sum(), net.bias)
    assert torch.equal(gradient, torch.full((3,), float(N)))


def test_a_likelihood_of_the_same_kind_overrides(net, x):
    captured = capture_loss(lambda: F.mse_loss(net(x), torch.zeros(N, 3)), Gaussian(sigma=0.5))
    assert captured.likelihood.dispersion == 0.25


def test_one_example_takes_the_reduction_that_was_declared(net, x, y):
    for reduction in ("mean", "sum"):
        captured = capture_loss(
            lambda reduction=reduction: F.cross_entropy(net(x[:1]), y[:1], reduction=reduction)
        )
        assert captured.reduction == reduction


def test_values_that_are_not_finite_are_left_to_the_pass_over_the_data(net, x, y):
    captured = capture_loss(lambda: F.cross_entropy(net(x) * float("nan"), y))
    assert captured.value != captured.value


@pytest.mark.parametrize("logits", [1e-3, 1.0, 60.0, 1e4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rounding_of_log_softmax_is_no_further_term(logits, reduction):
    # An overfitted network: the loss is far smaller than the rounding of the logits.
    outputs = (logits * torch.eye(3).repeat(200, 1)).requires_grad_()
    targets = torch.arange(3).repeat(200)
    captured = capture_loss(lambda: F.nll_loss(outputs.log_softmax(1), targets, reduction=reduction))
    assert captured.reduction == reduction


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
def test_a_small_further_term_is_seen(net, x, y, dtype, share):
    net, x = net.to(dtype), x.to(dtype)
    with pytest.raises(ValueError, match="a further term is in the loss"):
        capture_loss(lambda: F.cross_entropy(net(x), y) * (1 + share))


def test_autocast_inside_a_step(net, x, y):
    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(net(x), y)

    assert isinstance(capture_loss(step).likelihood, Categorical)


@pytest.mark.parametrize("function", [f for f in KNOWN if f not in READERS], ids=lambda f: f.__name__)
def test_losses_that_are_known_but_not_read_are_named(function):
    # Each with arguments that it takes: outputs of shape [N, 3].
    f = torch.rand(N, 3, requires_grad=True)
    one, sign = torch.rand(N, 3), torch.ones(N)
    arguments = {
        "cosine_embedding_loss": (f, one, sign),
        "ctc_loss": (f.unsqueeze(1).log_softmax(2), torch.ones(1, 2, dtype=int), [N], [2]),
        "hinge_embedding_loss": (f, sign[:, None]),
        "margin_ranking_loss": (f, one, sign[:, None]),
        "multi_margin_loss": (f, torch.zeros(N, dtype=int)),
        "multilabel_margin_loss": (f, torch.zeros(N, 3, dtype=int)),
        "triplet_margin_loss": (f, one, -one),
    }.get(function.__name__, (f, one))
    kwargs = {"reduction": "batchmean"} if function is F.kl_div else {}
    with pytest.raises(
        ValueError, match=rf"training_step uses F.{function.__name__}, which is not supported"
    ):
        capture_loss(lambda: function(*arguments, **kwargs))
