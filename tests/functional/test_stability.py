"""The edge of stability against the spectral radius of the recursions, and their stationary variance."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_bayes.functional import (
    keskar_sharpness,
    largest_stable_learning_rate,
    stability_edge,
    stability_ratio,
    variance_inflation,
)
from tests.refusals import refuses

curvatures = st.floats(1e-3, 1e3)
momenta = st.floats(0.01, 0.99)


@st.composite
def recursions(draw):
    """Keyword arguments of plain, heavy-ball, dampened and Nesterov's SGD."""
    kind = draw(st.sampled_from(["plain", "heavy ball", "dampened", "nesterov"]))
    if kind == "plain":
        return {}
    settings = {"momentum": draw(momenta)}
    if kind == "dampened":
        settings["dampening"] = draw(st.floats(0.0, 0.99))
    return settings | {"nesterov": True} if kind == "nesterov" else settings


def step_matrix(learning_rate, curvature, momentum=0.0, dampening=0.0, nesterov=False):
    """(x, v) of one step of torch.optim.SGD on h x²/2 to the next, as its documentation writes it."""
    x, v = torch.eye(2, dtype=torch.float64)
    gradient = curvature * x
    v = momentum * v + (1 - dampening) * gradient if momentum else gradient
    direction = gradient + momentum * v if nesterov else v
    return torch.stack([x - learning_rate * direction, v])


def spectral_radius(matrix):
    return torch.linalg.eigvals(matrix).abs().max().item()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
    ],
    ids=str,
)
def test_the_matrix_is_what_torch_does(settings):
    x = torch.nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
    sgd = torch.optim.SGD([x], lr=0.3, **settings)
    decay = settings.pop("weight_decay", 0.0)
    matrix = step_matrix(0.3, 2.0 + decay, **settings)
    state = None
    for _ in range(4):
        if state is not None:
            state = matrix @ state
        x.grad = 2.0 * x.detach()
        sgd.step()
        if state is None:  # torch's first step has no dampening: start behind it
            velocity = sgd.state[x].get("momentum_buffer", None)
            velocity = torch.zeros(1).double() if velocity is None else velocity.clone()
            state = torch.cat([x.detach(), velocity])
        assert x.item() == pytest.approx(state[0].item(), rel=1e-12)


@given(curvatures, recursions(), st.floats(0.0, 3.0))
def test_steps_grow_exactly_above_the_edge(curvature, settings, ratio):
    assume(abs(ratio - 1) > 1e-6 and ratio > 1e-6)
    learning_rate = ratio * stability_edge(**settings) / curvature
    radius = spectral_radius(step_matrix(learning_rate, curvature, **settings))
    assert (radius < 1) == (stability_ratio(learning_rate, curvature, **settings) < 1)


@given(curvatures, recursions())
def test_at_the_edge_a_root_is_at_minus_one(curvature, settings):
    learning_rate = largest_stable_learning_rate(curvature, **settings)
    assert stability_ratio(learning_rate, curvature, **settings) == pytest.approx(1.0, rel=1e-12)
    roots = torch.linalg.eigvals(step_matrix(learning_rate, curvature, **settings))
    assert (roots + 1).abs().min().item() < 1e-6
    assert roots.abs().max().item() < 1 + 1e-6


def stationary_variance(learning_rate, curvature, settings):
    """Of x under unit noise in the gradient, from the Lyapunov equation P = M P Mᵀ + n nᵀ."""
    matrix = step_matrix(learning_rate, curvature, **settings)
    # The gradient is curvature * x + noise: noise enters where curvature * x does.
    noise = (matrix[:, 0] - torch.tensor([1.0, 0.0])) / curvature
    kron = torch.eye(4, dtype=torch.float64) - torch.kron(matrix, matrix)
    return torch.linalg.solve(kron, torch.outer(noise, noise).flatten())[0].item()


@given(curvatures, recursions(), st.floats(0.01, 0.99))
def test_variance_inflation_is_that_of_the_recursion(curvature, settings, ratio):
    assume(settings.get("momentum", 0.0) < 0.95)  # beyond, the equation is ill-conditioned
    learning_rate = ratio * largest_stable_learning_rate(curvature, **settings)
    m, tau = settings.get("momentum", 0.0), settings.get("dampening", 0.0)
    diffusion = learning_rate * (1 - tau) / (2 * curvature * (1 - m))
    expected = stationary_variance(learning_rate, curvature, settings) / diffusion
    assert variance_inflation(learning_rate, curvature, **settings) == pytest.approx(expected, rel=1e-6)


def test_values_by_hand():
    assert stability_edge() == 2
    assert stability_edge(0.9) == pytest.approx(3.8)
    assert stability_edge(0.9, 0.5) == pytest.approx(7.6)
    assert stability_edge(0.9, nesterov=True) == pytest.approx(3.8 / 2.8)
    assert stability_ratio(0.1, 19, 0.9) == pytest.approx(0.5)
    assert largest_stable_learning_rate(19, 0.9) == pytest.approx(0.2)
    assert variance_inflation(0.1, 19, 0.9) == pytest.approx(2)
    assert variance_inflation(0.0, 19, 0.9) == 1
    assert keskar_sharpness(1.0, 1.5) == 25


def test_flat_and_negative_curvature():
    assert largest_stable_learning_rate(0.0) == largest_stable_learning_rate(-3, 0.9) == math.inf
    assert stability_ratio(0.1, -2.0) == pytest.approx(-0.1)
    assert variance_inflation(0.1, 0.0) == 1


def test_beyond_the_edge_there_is_no_stationary_variance():
    assert variance_inflation(1.0, 2.0) == variance_inflation(1.0, 5.0) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stability_edge(1.0), "`momentum` to be a number in [0, 1), but got 1.0"),
        (lambda: stability_edge(-0.1), ("`momentum`", "got -0.1")),
        (lambda: stability_edge(0.9, 1.0), ("`dampening`", "got 1.0")),
        (lambda: stability_edge(0.9, 0.1, nesterov=True), ("`nesterov` to be False", "dampening 0.1")),
        (lambda: stability_edge(nesterov=True), ("`nesterov` to be False without momentum", "momentum 0.0")),
        (lambda: stability_edge(0.9, nesterov=1), "`nesterov` to be a boolean, but got 1"),
        (lambda: stability_ratio(-0.1, 1.0), ("`learning_rate`", "at least 0, but got -0.1")),
        (lambda: stability_ratio(0.1, math.nan), ("`curvature`", "got nan")),
        (lambda: stability_ratio(0.1, None), ("`curvature`", "got None")),
        (lambda: largest_stable_learning_rate(math.inf), ("`curvature`", "got inf")),
        (lambda: variance_inflation(0.1, -1.0), ("`curvature`", "at least 0, but got -1.0")),
        (lambda: keskar_sharpness(-1.0, 0.0), "`loss` to be above -1, but got -1.0"),
        (lambda: keskar_sharpness(0.0, math.nan), ("`largest_loss`", "got nan")),
    ],
)
def test_wrong_arguments(call, message):
    with refuses(message):
        call()
