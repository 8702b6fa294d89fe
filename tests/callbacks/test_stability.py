"""The edge of stability that is reported is the one at which training diverges, and h is that of the loss."""

import math
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bayes import Stability
from tests.curvature.dense import dense_matrix
from tests.scenarios import (
    Module,
    N,
    Rich,
    cross_entropy,
    fit,
    loader,
    mean_squared_error,
    mlp,
    optimizer,
    tensors,
    with_lambda,
)

STEPS = 150


def linear():
    """Its loss is a quadratic."""
    return nn.Linear(4, 1)


class Repeated:
    """The whole training set as one batch, again and again in one epoch."""

    def __init__(self, times):
        self.times = times

    def __len__(self):
        return self.times

    def __iter__(self):
        return iter([list(range(N))] * self.times)


def full_batch(times=1):
    if times == 1:
        return loader("regression", batch_size=N)
    return DataLoader(TensorDataset(*tensors("regression")), batch_sampler=Repeated(times))


def grouped(rate, **kwargs):
    """Weight and bias with learning rates, momenta and weight decays of their own."""

    def configure(module):
        net = module.network
        weight = {"params": [net.weight], "lr": rate, "momentum": 0.8, "weight_decay": 0.3}
        return torch.optim.SGD(
            [weight, {"params": [net.bias], "lr": 3 * rate, "momentum": 0.3, "nesterov": True}]
        )

    return configure


def plainly(**kwargs):
    return lambda rate: optimizer(lr=rate, **kwargs)


OPTIMIZERS = {
    "plain": plainly(weight_decay=0.0),
    "momentum": plainly(momentum=0.9, weight_decay=0.0),
    "dampening": plainly(momentum=0.7, dampening=0.4, weight_decay=0.0),
    "nesterov": plainly(momentum=0.9, nesterov=True, weight_decay=0.0),
    "weight decay": plainly(momentum=0.5, weight_decay=0.5),
    "groups": grouped,
}


def diverges(tmp_path, make, rate):
    """Whether training goes away from the minimum, for a real Trainer and optimizer."""
    module = Module(linear(), mean_squared_error, make(rate))
    sizes = []
    module.on_train_batch_end = lambda *_: sizes.append(module.network.weight.detach().clone())
    fit(tmp_path, module, full_batch(STEPS))
    late, early = (sizes[i + 1] - sizes[i] for i in (-2, STEPS // 2))
    return late.norm().item() > early.norm().item()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_reported_edge_is_where_training_diverges(tmp_path, kind):
    make, callback = OPTIMIZERS[kind], Stability()
    fit(tmp_path, Module(linear(), mean_squared_error, make(0.01)), full_batch(), callback)
    factor = callback.reading.largest_stable_learning_rate / callback.reading.learning_rate
    assert factor == pytest.approx(1 / callback.reading.stability_ratio, rel=1e-12)
    assert not diverges(tmp_path, make, 0.01 * factor * 0.98)
    assert diverges(tmp_path, make, 0.01 * factor * 1.02)


@pytest.mark.slow
def test_edge_found_by_bisection(tmp_path):
    make, callback = OPTIMIZERS["momentum"], Stability()
    fit(tmp_path, Module(linear(), mean_squared_error, make(0.01)), full_batch(), callback)
    low, high = 0.01, 10.0
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if diverges(tmp_path, make, middle) else (middle, high)
    assert callback.reading.largest_stable_learning_rate == pytest.approx(low, rel=0.02)


def expected(module, data, loss, curvature="hessian"):
    matrix = dense_matrix(module.network.train(), *data, loss, curvature)
    return torch.linalg.eigvalsh(matrix)[-1].item()


def reading_of(tmp_path, module, data, callback=None, **kwargs):
    callback = callback or Stability()
    fit(tmp_path, module, data, callback, **kwargs)
    return callback.reading


TIGHT = 1e-5
"""Lanczos stops at a residual of 1e-3; eigenvalues are right to its square."""


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    ("step", "loss", "task"),
    [(cross_entropy, F.cross_entropy, "classification"), (mean_squared_error, F.mse_loss, "regression_2")],
)
def test_largest_eigenvalue_is_that_of_the_mean_loss(tmp_path, step, loss, task, curvature):
    data = tensors(task)
    module = Module(mlp(data[1].shape[1] if data[1].dim() > 1 else 3), step)
    reading = reading_of(tmp_path, module, loader(task, shuffle=True), Stability(curvature=curvature))
    assert reading.largest_eigenvalue == pytest.approx(expected(module, data, loss, curvature), rel=TIGHT)
    assert (reading.num_examples, reading.curvature) == (N, curvature)
    assert reading.stability_ratio == pytest.approx(0.1 * (reading.largest_eigenvalue + 0.02) / 2, rel=1e-12)


def summed(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"batch_size": N}], ids=str)
def test_a_summed_loss_counts_the_batch_that_a_step_sees(tmp_path, curvature, options):
    module, callback = Module(mlp(), summed, optimizer(lr=0.01)), Stability(curvature=curvature, **options)
    reading = reading_of(tmp_path, module, loader(batch_size=8), callback, accumulate_grad_batches=2)
    mean = expected(module, tensors(), F.cross_entropy, curvature)
    assert reading.largest_eigenvalue == pytest.approx(8 * mean, rel=TIGHT)


def test_a_loss_that_is_no_likelihood(tmp_path, caplog):
    def huber(f, y):
        return F.huber_loss(f, y) + 0.01 * f.square().mean()

    def step(module, batch):  # a penalty, if of nothing, is no sum over examples
        return huber(module(batch[0]), batch[1]) + 0.0 * module.network[0].weight.square().sum()

    module = Module(mlp(1), step)
    with caplog.at_level("INFO"):
        reading = reading_of(tmp_path, module, loader("regression", batch_size=7))
    assert reading.largest_eigenvalue == pytest.approx(
        expected(module, tensors("regression"), huber), rel=TIGHT
    )
    assert "taken as it is returned, and as a mean over the examples" in caplog.text


def test_network_read_directly(tmp_path):
    def step(module, batch):
        return module.network(batch[0]).logsumexp(1).mean() * 0

    module = Module(mlp(), step)
    callback = Stability(network="network", likelihood="classification")
    reading = reading_of(tmp_path, module, loader(), callback)
    assert reading.largest_eigenvalue == pytest.approx(
        expected(module, tensors(), F.cross_entropy), rel=TIGHT
    )


def test_batch_norm_as_trained(tmp_path):
    module = Module(Rich(), cross_entropy, optimizer(lr=0.01))
    reading = reading_of(tmp_path, module, loader(batch_size=N, shuffle=True))
    assert reading.largest_eigenvalue == pytest.approx(expected(module, tensors(), F.cross_entropy), rel=1e-4)
    module = Module(Rich(), cross_entropy, optimizer(lr=0.01))
    module.on_train_start = module.network.norm.eval
    reading = reading_of(tmp_path, module, loader(batch_size=N))
    module.network.eval()
    matrix = dense_matrix(module.network, *tensors(), F.cross_entropy, "hessian")
    assert reading.largest_eigenvalue == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-4)


def test_parameters_that_training_does_not_move_are_left_out(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.network[0].weight.requires_grad_(False)
    reading = reading_of(tmp_path, module, loader())
    matrix = dense_matrix(module.network, *tensors(), F.cross_entropy, "hessian")[20:, 20:]
    assert reading.num_parameters == 23
    assert reading.largest_eigenvalue == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=TIGHT)


@pytest.mark.parametrize(("max_examples", "count"), [(3, 8), (8, 8), (17, 16), (21, 16), (1024, 21)])
def test_whole_batches(tmp_path, max_examples, count):
    reading = reading_of(
        tmp_path, Module(mlp(), cross_entropy), loader(), Stability(max_examples=max_examples)
    )
    assert reading.num_examples == count


@pytest.mark.parametrize(("batch_size", "count"), [(4, 20), (8, 16), (100, 21)])
def test_batch_norm_sees_no_incomplete_batch(tmp_path, batch_size, count):
    """Of one example it would raise."""
    module = Module(Rich(), cross_entropy)
    data = loader(batch_size=batch_size, sampler=range(N - 1) if batch_size == 4 else None)
    reading = reading_of(tmp_path, module, data)
    assert reading.num_examples == count


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*tensors()))

    def __len__(self):
        return N


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined:UserWarning")
@pytest.mark.parametrize(("max_examples", "count"), [(12, 8), (1024, 21)])
def test_iterable_dataset(tmp_path, max_examples, count):
    module = Module(mlp(), cross_entropy)
    reading = reading_of(tmp_path, module, DataLoader(Stream(), 8), Stability(max_examples=max_examples))
    assert reading.num_examples == count
    first = tuple(part[:count] for part in tensors())
    assert reading.largest_eigenvalue == pytest.approx(expected(module, first, F.cross_entropy), rel=TIGHT)


def test_learning_rate_in_force_at_the_last_step(tmp_path):
    callback = Stability()
    module = Module(
        mlp(), cross_entropy, with_lambda("epoch", lambda epoch: 0.5**epoch, lr=0.4, momentum=0.9)
    )
    run = fit(tmp_path, module, loader(), callback, max_epochs=3)
    assert [reading.learning_rate for _, reading in callback.history] == pytest.approx([0.4, 0.2, 0.1])
    for _, reading in callback.history:
        ratio = reading.learning_rate * reading.largest_eigenvalue / (2 * 1.9)
        assert reading.stability_ratio == pytest.approx(ratio, rel=1e-12)
    assert run.callback_metrics["bayes/stability"].item() == pytest.approx(ratio, rel=1e-6)


ADAPTIVE = {"Adam": torch.optim.Adam, "RMSprop": torch.optim.RMSprop, "Adadelta": torch.optim.Adadelta}


class LARS(torch.optim.SGD):
    """A step of its own under the settings of SGD."""

    def step(self, closure=None):
        return super().step(closure)


class Renamed(torch.optim.SGD):
    """Nothing of its own."""


def test_a_subclass_of_sgd_that_steps_as_sgd_does_is_sgd(tmp_path):
    module = Module(mlp(), cross_entropy, lambda module: Renamed(module.parameters(), lr=0.1))
    assert reading_of(tmp_path, module, loader()).stability_ratio is not None


UNKNOWN = {"LARS": LARS, "ASGD": torch.optim.ASGD, "Rprop": torch.optim.Rprop}


@pytest.mark.parametrize("name", ADAPTIVE | UNKNOWN)
def test_other_optimizers_have_an_eigenvalue_and_no_edge(tmp_path, caplog, name):
    module = Module(
        mlp(), cross_entropy, lambda module: (ADAPTIVE | UNKNOWN)[name](module.parameters(), lr=0.01)
    )
    callback = Stability(sharpness=True)
    with caplog.at_level("INFO"):
        run = fit(tmp_path, module, loader(), callback)
    assert name in caplog.text and "The largest eigenvalue alone is logged" in caplog.text
    assert sorted(run.callback_metrics) == ["bayes/largest_eigenvalue", "bayes/sharpness"]
    assert callback.reading.stability_ratio is None
    assert callback.reading.largest_eigenvalue > 0


def test_every_key_is_logged_with_its_value(tmp_path):
    callback = Stability(sharpness=True, log_key_prefix="edge-")
    run = fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback)
    reading = callback.reading
    assert {name: value.item() for name, value in run.callback_metrics.items()} == pytest.approx(
        {
            "edge-largest_eigenvalue": reading.largest_eigenvalue,
            "edge-stability": reading.stability_ratio,
            "edge-largest_stable_learning_rate": reading.largest_stable_learning_rate,
            "edge-sharpness": reading.sharpness,
        },
        rel=1e-6,
    )
    assert reading.sharpness > 0


def test_monitored_and_every_second_epoch(tmp_path):
    callback = Stability(every_n_epochs=2)
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", monitor="bayes/stability", mode="max", every_n_epochs=2)
    stopping = EarlyStopping("bayes/largest_eigenvalue", stopping_threshold=-1.0, strict=False, patience=10)
    module = Module(mlp(), cross_entropy, with_lambda("epoch", lambda epoch: 1.0 if epoch == 3 else 0.1))
    fit(tmp_path, module, loader(), callback, checkpoint, stopping, max_epochs=6, enable_checkpointing=True)
    assert [epoch for epoch, _ in callback.history] == [1, 3, 5]
    assert checkpoint.best_model_path.endswith("epoch=3.ckpt")
    ratio = callback.history[1][1].stability_ratio
    assert checkpoint.best_model_score.item() == pytest.approx(ratio, rel=1e-6)


def test_early_stopping_on_the_edge(tmp_path):
    stopping = EarlyStopping("bayes/stability", stopping_threshold=10.0, mode="max", patience=100)
    module = Module(linear(), mean_squared_error, with_lambda("epoch", lambda epoch: 100.0 if epoch else 0.1))
    fit(tmp_path, module, full_batch(), Stability(), stopping, max_epochs=5)
    assert stopping.stopped_epoch == 1


def test_history_is_that_of_one_run(tmp_path):
    callback = Stability()
    assert callback.reading is None
    for folder in ("a", "b"):
        fit(tmp_path / folder, Module(mlp(), cross_entropy), loader(), callback, max_epochs=2)
    assert [epoch for epoch, _ in callback.history] == [0, 1]
    assert callback.reading is callback.history[1][1]


def test_weights_that_are_no_numbers_are_a_warning(tmp_path):
    class Broken(Module):
        def on_train_batch_end(self, *_):
            self.network[0].weight.data[0, 0] = torch.nan

    callback = Stability()
    with pytest.warns(UserWarning, match=r"no reading for epoch 0; training goes on.*NaN is logged"):
        run = fit(tmp_path, Broken(mlp(), cross_entropy), loader(), callback)
    assert callback.reading is None
    assert sorted(run.callback_metrics) == [
        "bayes/largest_eigenvalue",
        "bayes/largest_stable_learning_rate",
        "bayes/stability",
    ]
    assert all(value.isnan() for value in run.callback_metrics.values())


def test_draws_of_a_training_step_are_the_same_in_each_product(tmp_path):
    """Otherwise the products would be those of no one matrix, and be refused as not symmetric."""

    def noisy(module, batch):
        x, y = batch
        noise = np.random.normal() + random.random() + torch.randn_like(x)
        return F.cross_entropy(module(x + 0.3 * noise), y)

    def reading():
        torch.manual_seed(0)
        return reading_of(tmp_path, Module(mlp(), noisy, optimizer(lr=0.0)), loader())

    first, again = reading(), reading()
    assert first.converged
    assert first.largest_eigenvalue == again.largest_eigenvalue


def test_an_end_beyond_the_edge_is_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        module = Module(linear(), mean_squared_error, optimizer(lr=2.0))
        reading = reading_of(tmp_path, module, full_batch())
    assert reading.stability_ratio > 1
    assert f"ended at {reading.stability_ratio:.3g} times the edge of stability" in caplog.text
    assert f"up to a learning rate of {reading.largest_stable_learning_rate:.4g}" in caplog.text


def test_too_few_products_are_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lightning_bayes.loss_curvature.stability_reading.MAX_PRODUCTS", 3)
    with caplog.at_level("INFO"):
        reading = reading_of(tmp_path, Module(mlp(), cross_entropy), loader())
    assert not reading.converged
    assert "did not converge in 3 products" in caplog.text


def test_fast_dev_run(tmp_path):
    reading = reading_of(tmp_path, Module(mlp(), cross_entropy), loader(), fast_dev_run=True)
    assert reading.num_examples == 8


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_reduced_precision_is_read_in_full(tmp_path, precision):
    """The products take float32: in half precision an eigenvalue is lost in rounding."""
    x, y = tensors()
    module = Module(mlp(), cross_entropy, optimizer(lr=0.0)).float()
    reading = reading_of(tmp_path, module, loader(data=(x.float(), y)), precision=precision)
    matrix = dense_matrix(module.network.double(), x, y, F.cross_entropy, "hessian")
    assert reading.largest_eigenvalue == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-2)
    assert reading.largest_eigenvalue_error < 1e-3 * reading.largest_eigenvalue
