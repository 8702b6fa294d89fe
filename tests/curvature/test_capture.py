"""The loss that counts is found, whatever surrounds it, and held against the value returned."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_bayes.capture.loss import capture_loss
from lightning_bayes.capture.pytorch_losses import KNOWN, OF_NO_LIKELIHOOD, READERS
from lightning_bayes.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
)
from lightning_bayes.likelihoods.expansion import LocalExpansion
from tests.refusals import refuses

N = 6
WEIGHT = torch.tensor([1.0, 2.0, 0.5])


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
    "weights and smoothing": (
        lambda f, y: F.cross_entropy(f, y, weight=WEIGHT, label_smoothing=0.1),
        Categorical,
        "mean",
    ),
    "ignored": (lambda f, y: F.cross_entropy(f, y, ignore_index=int(y[0])), Categorical, "mean"),
    "weighted, none, then sum": (
        lambda f, y: F.cross_entropy(f, y, weight=WEIGHT, reduction="none").sum(),
        Categorical,
        "sum",
    ),
    "weighted nll": (lambda f, y: nn.NLLLoss(weight=WEIGHT)(f.log_softmax(1), y), Categorical, "mean"),
    "weighted bce": (
        lambda f, y: F.binary_cross_entropy_with_logits(
            f, F.one_hot(y, 3).float(), pos_weight=WEIGHT, weight=torch.arange(N).unsqueeze(1)
        ),
        Bernoulli,
        "mean",
    ),
    "gaussian_nll": (
        lambda f, y: F.gaussian_nll_loss(f, F.one_hot(y, 3).float(), f.exp()),
        HeteroscedasticGaussian,
        "mean",
    ),
    "gaussian_nll in full": (
        lambda f, y: nn.GaussianNLLLoss(full=True, reduction="sum")(f, F.one_hot(y, 3).float(), f.exp()),
        HeteroscedasticGaussian,
        "sum",
    ),
    "gaussian_nll with one variance an example": (
        lambda f, y: F.gaussian_nll_loss(f, F.one_hot(y, 3).float(), f[:, 0].exp(), eps=0.9),
        HeteroscedasticGaussian,
        "mean",
    ),
    "bce of a sigmoid": (
        lambda f, y: F.binary_cross_entropy(f.sigmoid(), F.one_hot(y, 3).float()),
        Bernoulli,
        "mean",
    ),
    "weighted bce of a reshaped sigmoid": (
        lambda f, y: nn.BCELoss(weight=WEIGHT, reduction="sum")(
            nn.Sigmoid()(f.unsqueeze(2)).squeeze(2), F.one_hot(y, 3).float()
        ),
        Bernoulli,
        "sum",
    ),
    "bce of a sigmoid kept from 0 and 1": (
        lambda f, y: F.binary_cross_entropy(f.sigmoid().clamp(1e-6, 1 - 1e-6), F.one_hot(y, 3).float()),
        Bernoulli,
        "mean",
    ),
    "other losses beside": (
        lambda f, y: (F.l1_loss(f, f + 1), F.cross_entropy(f, y), F.mse_loss(f, f + 1))[1],
        Categorical,
        "mean",
    ),
    "added zero": (lambda f, y: F.cross_entropy(f, y) + 0.0 * f.detach().sum(), Categorical, "mean"),
}

if "float" in str(inspect.signature(F.gaussian_nll_loss).parameters["var"].annotation):  # newer PyTorch's
    FOUND["gaussian_nll with known noise"] = (
        lambda f, y: F.gaussian_nll_loss(f, F.one_hot(y, 3).float(), 0.3),
        HeteroscedasticGaussian,
        "mean",
    )


@pytest.mark.parametrize("name", FOUND)
def test_found(net, x, y, name):
    step, likelihood, reduction = FOUND[name]
    captured = capture_loss(lambda: step(net(x), y))
    assert type(captured.likelihood) is likelihood
    assert captured.reduction == reduction
    width = 6 if likelihood is HeteroscedasticGaussian else 3
    assert captured.outputs.shape == (N, width) and captured.outputs.requires_grad
    # The likelihood's own mean nll, scaled, falls as fast as the loss returned.
    found = captured.likelihood
    unit_loss, terms = (
        method(captured.outputs, captured.targets) for method in (found.unit_loss, found.num_terms)
    )
    dispersion = found.dispersion or 1.0
    scale = found.loss_scale(reduction, terms / N, N, dispersion)
    loss = step(net(x), y)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    (theirs,) = torch.autograd.grad(loss.sum(), net.weight)
    (ours,) = torch.autograd.grad(scale / N / dispersion * unit_loss, net.weight)
    torch.testing.assert_close(ours, theirs)


def test_outputs_keep_their_graph(net, x, y):
    captured = capture_loss(lambda: F.cross_entropy(net(x), y))
    assert torch.equal(captured.outputs, net(x))
    (gradient,) = torch.autograd.grad(captured.outputs.sum(), net.bias)
    assert torch.equal(gradient, torch.full((3,), float(N)))


def test_classes_are_in_dimension_one_whatever_the_sizes():
    f, y = torch.randn(N, 3, 3, requires_grad=True), torch.randint(3, (N, 3))
    for likelihood in (None, Categorical(), Categorical(class_dim=-1)):
        captured = capture_loss(lambda: F.cross_entropy(f, y), likelihood)
        assert torch.equal(captured.outputs, f.mT)


def test_rows_that_are_tokens():
    """Flattened, [N·T, C], with weights that go with the flat rows."""
    f, y = torch.randn(N, 2, 3, requires_grad=True), torch.randint(3, (N, 2))

    def rows_of(num_examples, outputs):
        assert len(outputs) == 2 * N
        return lambda tensor: tensor.unflatten(0, (N, 2))

    captured = capture_loss(lambda: F.cross_entropy(f.flatten(0, 1), y.flatten()), None, rows_of)
    assert torch.equal(captured.outputs, f)
    captured = capture_loss(lambda: F.mse_loss(f.flatten(0, 1)[:, 0], y.flatten().float()), None, rows_of)
    assert torch.equal(captured.outputs, f[..., 0])
    weight = torch.arange(2.0 * N)
    captured = capture_loss(
        lambda: F.binary_cross_entropy_with_logits(
            f.flatten(0, 1)[:, 0], y.flatten() / 2, weight=weight, pos_weight=torch.tensor(1.0)
        ),
        None,
        rows_of,
    )
    assert torch.equal(captured.targets.positive + captured.targets.negative, weight.unflatten(0, (N, 2)))
    both = f.flatten(0, 1)
    captured = capture_loss(
        lambda: F.gaussian_nll_loss(both[:, 0], y.flatten(), both[:, 1].exp()), None, rows_of
    )
    assert torch.equal(captured.outputs, torch.cat([f[..., 0], f[..., 1].exp()], dim=1))


def test_parameters_of_a_likelihood_that_is_given_win(net, x, y):
    def step():
        return F.cross_entropy(net(x), y, weight=WEIGHT)

    plain = capture_loss(step, Categorical())
    assert plain.likelihood.weight is None
    assert plain.likelihood.num_terms(plain.outputs, plain.targets) == N
    own = Categorical(label_smoothing=0.2)
    captured = capture_loss(step, own)
    expected = F.cross_entropy(net(x), y, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(own.unit_loss(captured.outputs, captured.targets).float(), expected)


def test_all_tokens_ignored(net, x):
    captured = capture_loss(lambda: F.cross_entropy(net(x), torch.full((N,), -100)))
    assert captured.value != captured.value and captured.reduction == "mean"
    assert captured.likelihood.unit_loss(captured.outputs, captured.targets) == 0.0


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


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-3), (torch.float64, 1e-7)])
def test_a_small_further_term_is_seen(net, x, y, dtype, share):
    net, x = net.to(dtype), x.to(dtype)

    def step():
        outputs = net(x)
        return F.cross_entropy(outputs, y) + share * outputs.square().mean()

    captured = capture_loss(step)
    assert isinstance(captured.likelihood, LocalExpansion) and "generalised" in captured.likelihood.note
    torch.testing.assert_close(captured.scale * captured.unit_loss.to(dtype), step())


@pytest.mark.parametrize("factor", [1 + 1e-4, 0.5])
def test_a_factor_is_part_of_the_scale(net, x, y, factor):
    captured = capture_loss(lambda: factor * F.cross_entropy(net(x), y))
    assert isinstance(captured.likelihood, Categorical)
    assert captured.scale == pytest.approx(factor / N)
    torch.testing.assert_close(captured.unit_loss.float(), F.cross_entropy(net(x), y, reduction="sum"))


def test_autocast_inside_a_step(net, x, y):
    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(net(x), y)

    assert isinstance(capture_loss(step).likelihood, Categorical)


@pytest.mark.parametrize("logit", [12.0, 30.0])
def test_probabilities_that_have_lost_their_digits(net, logit):
    """1 - p in float32 is a few units of the last place, or 0, when the logits still tell."""
    f = (logit * torch.ones(N, 3)).requires_grad_()
    captured = capture_loss(lambda: F.binary_cross_entropy(f.sigmoid(), torch.zeros(N, 3)))
    unit_loss = captured.likelihood.unit_loss(captured.outputs, captured.targets)
    torch.testing.assert_close(unit_loss.item() / (3 * N), math.log1p(math.exp(logit)))


MISUSED = {
    "legacy reduction": (
        lambda f, y: F.mse_loss(f, F.one_hot(y, 3).float(), size_average=False),
        r"F.mse_loss with size_average=, which PyTorch has deprecated. Give reduction=",
    ),
    "negative class weight": (lambda f, y: F.cross_entropy(f, y, weight=-WEIGHT), r"`weight` to be finite"),
    "broadcast targets": (
        lambda f, y: F.gaussian_nll_loss(f, y.float().unsqueeze(1), f.exp()),
        r"outputs \[6, 3\] and targets \[6, 1\].*broadcasts them",
    ),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("name", MISUSED)
def test_calls_that_no_likelihood_expresses(net, x, y, name):
    step, message = MISUSED[name]
    with pytest.raises(ValueError, match=message):
        capture_loss(lambda: step(net(x), y))


NO_DENSITY = {
    "cosine_embedding_loss": lambda f, one, sign: (f, one, sign),
    "hinge_embedding_loss": lambda f, one, sign: (f, sign[:, None]),
    "margin_ranking_loss": lambda f, one, sign: (f, one, sign[:, None]),
    "multi_margin_loss": lambda f, one, sign: (f, torch.zeros(N, dtype=int)),
    "multilabel_margin_loss": lambda f, one, sign: (f, torch.zeros(N, 3, dtype=int)),
    "triplet_margin_loss": lambda f, one, sign: (f, one, -one),
}
"""Arguments of losses, for outputs of shape [N, 3]."""


@pytest.mark.parametrize("function", OF_NO_LIKELIHOOD, ids=lambda f: f.__name__)
def test_losses_of_no_density_are_named(function):
    f = torch.rand(N, 3, requires_grad=True)
    arguments = NO_DENSITY[function.__name__](f, torch.rand(N, 3), torch.ones(N))
    with refuses(
        f"training_step uses F.{function.__name__}, which is not the negative log-likelihood of anything"
    ):
        capture_loss(lambda: function(*arguments))


@pytest.mark.parametrize(
    "function", [f for f in KNOWN if f not in READERS and f not in OF_NO_LIKELIHOOD], ids=lambda f: f.__name__
)
def test_losses_of_no_reader_are_read_by_their_graph(net, x, function):
    targets = {
        "ctc_loss": lambda f: (f.unsqueeze(1).log_softmax(2), torch.ones(1, 2, dtype=int), [N], [2]),
        "soft_margin_loss": lambda f: (f, torch.ones(N, 3)),
    }.get(function.__name__, lambda f: (f, torch.ones(N, 3)))
    if function is F.ctc_loss:
        with refuses(("F.ctc_loss, which is not read as it is written", "no derivative")):
            capture_loss(lambda: function(*targets(net(x))), num_examples=1)
        return
    captured = capture_loss(lambda: function(*targets(net(x))))
    (theirs,) = torch.autograd.grad(function(*targets(net(x))), net.weight)
    (ours,) = torch.autograd.grad(captured.scale * captured.unit_loss, net.weight)
    torch.testing.assert_close(ours.float(), theirs)


TERMS = {
    "cross-entropy": lambda f, y: F.cross_entropy(f, y, reduction="none"),
    "cross-entropy by hand": lambda f, y: -f.log_softmax(1).gather(1, y[:, None])[:, 0],
    "squares": lambda f, y: F.mse_loss(f, F.one_hot(y, 3).to(f), reduction="none").sum(1),
    "squares by hand": lambda f, y: (f - F.one_hot(y, 3)).square().sum(1),
    "binary": lambda f, y: F.binary_cross_entropy_with_logits(f[:, 0], (y > 0).to(f), reduction="none"),
    "huber": lambda f, y: F.huber_loss(f, F.one_hot(y, 3).to(f), reduction="none").sum(1),
    "counts": lambda f, y: f[:, 0].exp() - y * f[:, 0],
    "log-density": lambda f, y: -torch.distributions.Poisson(f[:, 0].exp()).log_prob(y.to(f)),
    "two": lambda f, y: F.cross_entropy(f, y, reduction="none") + f.square().sum(1),
}
REDUCED = {
    "mean": lambda t, w: (w * t).mean(),
    "sum": lambda t, w: (w * t).sum(),
    "weighted mean": lambda t, w: (w * t).sum() / w.sum(),
    "normalised weights": lambda t, w: (w / w.sum()) @ t,
}


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(TERMS)),
    st.sampled_from(sorted(REDUCED)),
    st.floats(0.1, 10.0),
    st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=N, max_size=N).filter(lambda w: sum(w[:2]) > 0),
    st.integers(0, 2**16),
)
def test_what_is_read_is_the_loss_and_its_gauss_newton_matrix(terms, reduction, factor, weights, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, 4, generator=generator).double(), torch.randint(3, (N,), generator=generator)
    weight = torch.randn(3, 4, generator=generator).double().requires_grad_()
    w = torch.tensor(weights, dtype=torch.float64)

    def step(number=N):
        return factor * REDUCED[reduction](TERMS[terms](x[:number] @ weight.T, y[:number]), w[:number])

    captured = capture_loss(step, num_examples=N, again=lambda few: lambda: step(few or N))
    outputs, targets = captured.outputs, captured.targets
    scaled = captured.scale * captured.unit_loss
    for ours, theirs in zip(
        *(torch.autograd.grad(e, weight, retain_graph=True) for e in (scaled, step())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    # The outputs are linear in the weights, so that the Gauss-Newton matrix is the loss's Hessian.
    root = captured.likelihood.sqrt_hessian(outputs, targets)
    rows = torch.stack(
        [torch.autograd.grad(outputs, weight, r, retain_graph=True)[0] for r in one_each(root)]
    )
    matrix = captured.scale * rows.flatten(1).mT @ rows.flatten(1)
    hessian = torch.autograd.functional.hessian(
        lambda v: factor * REDUCED[reduction](TERMS[terms](x @ v.T, y), w), weight.detach()
    )
    torch.testing.assert_close(matrix, hessian.reshape(12, 12), rtol=1e-6, atol=1e-9)


def one_each(root):
    """Columns [C·N, N, ...] of which each is that of one example alone."""
    apart = torch.zeros(len(root), *root.shape[1:2], *root.shape[1:], dtype=root.dtype)
    for example in range(root.shape[1]):
        apart[:, example, example] = root[:, example]
    return apart.flatten(0, 1)
