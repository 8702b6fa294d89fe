"""The reading of several parameter groups against the recursion of all of them at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_bayes.functional import stability_ratio, variance_inflation
from lightning_bayes.loss_curvature.largest_loss_in_box import largest_loss_in_box
from lightning_bayes.loss_curvature.mean_loss import BatchLoss, MeanLoss
from lightning_bayes.loss_curvature.stability_reading import SGDStep, StabilityReading, measure_stability


class Quadratic(nn.Module):
    """½ (x − minimum)ᵀ H (x − minimum) in three parameter tensors."""

    def __init__(self, hessian, point=None, minimum=None):
        super().__init__()
        size = len(hessian)
        point = torch.zeros(size).double() if point is None else point
        self.hessian, self.minimum = hessian, torch.zeros(size).double() if minimum is None else minimum
        self.parts = nn.ParameterList(point[i::3].clone() for i in range(3))
        self.order = torch.cat([torch.arange(i, size, 3) for i in range(3)])

    def forward(self):
        shift = torch.cat(list(self.parts)) - self.minimum[self.order]
        return 0.5 * shift @ self.matrix() @ shift

    def matrix(self):
        """Of the parts put end to end."""
        return self.hessian[self.order][:, self.order]

    def function(self):
        names = [name for name, _ in self.named_parameters()]
        return MeanLoss(self, names, [BatchLoss(self.forward, None, 1.0)])


def definite(size, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, rank or size, generator=generator, dtype=torch.float64)
    return root @ root.mT / size


steps_of_groups = st.builds(
    lambda rate, momentum, dampening, decay, kind: SGDStep(
        rate,
        0.0 if kind == "plain" else momentum,
        dampening if kind == "dampened" else 0.0,
        kind == "nesterov",
        decay,
    ),
    st.floats(1e-3, 1.0),
    st.floats(0.05, 0.95),
    st.floats(0.0, 0.9),
    st.sampled_from([0.0, 0.1, 2.0]),
    st.sampled_from(["plain", "heavy ball", "dampened", "nesterov"]),
)


def whole_step(matrix, sizes, steps, times):
    """(x, v) of one step on all groups to the next, with all learning rates taken so many times."""
    size = len(matrix)

    def entries(of):
        return torch.diag(
            torch.cat([torch.full((n,), of(s)).double() for n, s in zip(sizes, steps, strict=True)])
        )

    m, rate = entries(lambda s: s.momentum), times * entries(lambda s: s.learning_rate)
    gradient = matrix + entries(lambda s: s.weight_decay)
    # Without momentum the buffer is the gradient: torch's v = g is m = τ = 0 here.
    into = entries(lambda s: 1 - s.dampening) @ gradient
    nesterov = entries(lambda s: float(s.nesterov))
    plain = torch.eye(size).double() - nesterov
    # direction = v' or g + m v', v' = m v + (1 − τ) g
    of_x = plain @ into + nesterov @ (gradient + m @ into)
    of_v = plain @ m + nesterov @ m @ m
    top = torch.cat([torch.eye(size).double() - rate @ of_x, -rate @ of_v], 1)
    return torch.cat([top, torch.cat([into, m], 1)])


@given(
    st.tuples(steps_of_groups, steps_of_groups, steps_of_groups),
    st.integers(0, 3),
    st.sampled_from([None, 2]),
)
@settings(max_examples=60)
def test_any_mix_of_groups_diverges_where_the_ratio_says(groups, seed, rank):
    model = Quadratic(definite(7, seed, rank))
    steps = {f"parts.{i}": step for i, step in enumerate(groups)}
    reading = measure_stability(model.function(), steps, 1, curvature="hessian", sharpness=False)
    sizes = [len(part) for part in model.parts]
    radius = {
        times: torch.linalg.eigvals(
            whole_step(model.matrix(), sizes, groups, times / reading.stability_ratio)
        )
        .abs()
        .max()
        .item()
        for times in (0.3, 0.7, 0.99, 1.01, 1.5)
    }
    # Of rank 2 and without weight decay some directions are flat: they stay, at 1.
    assert all(radius[times] < 1 + 1e-7 for times in (0.3, 0.7, 0.99))
    assert all(radius[times] > 1 + 1e-7 for times in (1.01, 1.5))
    assert reading.learning_rate == max(step.learning_rate for step in groups)
    assert reading.largest_stable_learning_rate == pytest.approx(
        reading.learning_rate / reading.stability_ratio, rel=1e-12
    )
    assert reading.largest_eigenvalue == pytest.approx(
        torch.linalg.eigvalsh(model.hessian)[-1].item(), rel=1e-5
    )


def test_one_group_is_the_formula():
    model = Quadratic(definite(6, 0))
    h = torch.linalg.eigvalsh(model.hessian)[-1].item()
    step = SGDStep(0.1, 0.9, 0.2, weight_decay=0.3)
    steps = {f"parts.{i}": step for i in range(3)}
    reading = measure_stability(model.function(), steps, 5, curvature="hessian", sharpness=False)
    assert reading.largest_eigenvalue == pytest.approx(h, rel=1e-6)
    assert reading.stability_ratio == pytest.approx(stability_ratio(0.1, h + 0.3, 0.9, 0.2), rel=1e-6)
    assert reading.variance_inflation == pytest.approx(variance_inflation(0.1, h + 0.3, 0.9, 0.2), rel=1e-5)
    assert (reading.num_examples, reading.num_parameters, reading.curvature) == (5, 6, "hessian")


def test_equal_groups_in_three_and_one_that_hardly_differs():
    model = Quadratic(definite(6, 1))
    same = {f"parts.{i}": SGDStep(0.1, 0.9, nesterov=True) for i in range(3)}
    other = same | {"parts.2": SGDStep(0.1, 0.9, nesterov=True, weight_decay=1e-12)}
    one, several = (
        measure_stability(model.function(), steps, 1, curvature="hessian", sharpness=False)
        for steps in (same, other)
    )
    assert several.num_products > one.num_products
    assert several.stability_ratio == pytest.approx(one.stability_ratio, rel=1e-6)
    assert several.variance_inflation == pytest.approx(one.variance_inflation, rel=1e-5)


def test_groups_that_differ_in_momentum_have_no_variance_inflation():
    model = Quadratic(definite(6, 1))
    steps = {f"parts.{i}": SGDStep(0.1, 0.3 * i) for i in range(3)}
    reading = measure_stability(model.function(), steps, 1, curvature="hessian", sharpness=False)
    assert reading.variance_inflation is None
    assert "variance inflation" not in str(reading)


@pytest.mark.parametrize("rates", [(0.0, 0.0, 0.0), (0.1, 0.0, 0.1)])
def test_learning_rates_of_zero(rates):
    model = Quadratic(definite(6, 1))
    steps = {f"parts.{i}": SGDStep(rate) for i, rate in enumerate(rates)}
    reading = measure_stability(model.function(), steps, 1, curvature="hessian", sharpness=False)
    moved = [j for j, i in enumerate(model.order.tolist()) if rates[i % 3] or not any(rates)]
    h = torch.linalg.eigvalsh(model.matrix()[moved][:, moved])[-1].item()
    assert reading.stability_ratio == pytest.approx(max(rates) * h / 2, rel=1e-6)
    assert reading.largest_stable_learning_rate == pytest.approx(2 / h, rel=1e-6)


def test_negative_curvature_alone():
    model = Quadratic(-definite(6, 1) - torch.eye(6).double())
    steps = {f"parts.{i}": SGDStep(0.1) for i in range(3)}
    reading = measure_stability(model.function(), steps, 1, curvature="hessian", sharpness=False)
    assert reading.largest_eigenvalue < 0 and reading.stability_ratio < 0
    assert reading.largest_stable_learning_rate == math.inf
    assert reading.variance_inflation is None


def test_other_optimizers():
    reading = measure_stability(
        Quadratic(definite(6, 1)).function(), None, 1, curvature="hessian", sharpness=False
    )
    assert (
        reading.stability_ratio is reading.largest_stable_learning_rate is reading.variance_inflation is None
    )
    assert "known for SGD alone" in str(reading)


def corners(size):
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * size)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("at_minimum", [True, False])
def test_sharpness_of_a_quadratic(seed, at_minimum):
    """A convex function is largest in a corner of the box, of which there are 2⁷."""
    generator = torch.Generator().manual_seed(seed)
    point = torch.randn(7, generator=generator, dtype=torch.float64)
    shift = torch.zeros(7).double() if at_minimum else 3e-3 * torch.randn(7, generator=generator).double()
    model = Quadratic(definite(7, seed), point, point - shift)
    function = model.function()
    _, vectors = torch.linalg.eigh(model.matrix())
    at_weights, found = largest_loss_in_box(function, vectors[:, -1])
    half = 1e-3 * (function.flat().abs() + 1)
    ends = shift[model.order] + corners(7) * half
    largest = (0.5 * (ends @ model.matrix() * ends).sum(1)).max().item()
    loss = (0.5 * shift @ model.hessian @ shift).item()
    assert at_weights == pytest.approx(loss, rel=1e-9, abs=1e-20)
    assert 0.9 * largest <= found <= largest * (1 + 1e-9)
    assert torch.equal(function.flat(), model.function().flat())
    assert torch.equal(function.flat(), point[model.order])  # the weights are back


def test_sharpness_where_the_maximum_is_known():
    """Of independent coordinates each end of the box is as far as the other: ½ Σ h w²."""
    values = torch.tensor([5.0, 1.0, 0.2, 3.0]).double()
    model = Quadratic(torch.diag(values))
    steps = {f"parts.{i}": SGDStep(0.1) for i in range(3)}
    reading = measure_stability(model.function(), steps, 1, curvature="hessian", sharpness=True)
    assert reading.sharpness == pytest.approx(100 * 0.5 * values.sum().item() * 1e-6, rel=1e-6)


def test_table():
    reading = StabilityReading(12.5, 0.01, 1.25, 0.2, 0.16, math.inf, 3.5, "ggn", 1024, 5000, 100, False, 1.5)
    assert str(reading).splitlines() == [
        "Stability on 1,024 examples, GGN of the mean loss in 5,000 parameters",
        "largest eigenvalue             12.5000  ± 0.01, NOT CONVERGED in 100 products",
        "stability ratio                 1.2500  BEYOND THE EDGE OF STABILITY",
        "largest stable lr               0.1600  the present one is 0.2",
        "variance inflation                 inf",
        "sharpness (Keskar)              3.5000  percent of 1 + loss, at least",
        "seconds                           1.50",
    ]
