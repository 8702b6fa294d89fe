"""Wrong use of Stability ends before the first optimizer step, in a message with the argument and the remedy."""

import math
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bayes import Stability
from tests.networks.plain import parametrized
from tests.refusals import fit_refuses
from tests.scenarios import Module, cross_entropy, fit, loader, mlp, optimizer, tensors

from .test_bad_input import Heal, Poison


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*tensors()))


DATA = {
    "no length": (lambda: DataLoader(Stream(), 8), "Stream has no length", "__len__"),
    "list": (
        lambda: [loader(), loader()],
        "Stability need one torch DataLoader for training, got a collection of 2",
        (),
    ),
    "whole batches": (
        lambda: DataLoader([tuple(tensors())] * 2, batch_size=None),
        "batch_size=None",
        "Give it a batch_size",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_loaders(tmp_path, name):
    make, subject, remedy = DATA[name]
    module = Module(mlp(), cross_entropy)
    fit_refuses(tmp_path, module, subject, remedy=remedy, data=make(), callback=Stability())


def test_an_optimizer_that_climbs(tmp_path):
    module = Module(mlp(), cross_entropy, optimizer(maximize=True))
    remedy = "Return the negative loss"
    fit_refuses(tmp_path, module, "SGD was given maximize=True", remedy=remedy, callback=Stability())


def test_all_parameters_frozen(tmp_path):
    module = Module(mlp(), cross_entropy, lambda m: None)
    module.requires_grad_(False)
    with pytest.warns(UserWarning, match="returned `None`"):  # Lightning's
        subject = "no trainable parameter: all have requires_grad=False"
        fit_refuses(tmp_path, module, subject, callback=Stability())


def test_module_that_cannot_be_copied(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.lock = threading.Lock()
    remedy = ("lock", "Keep it out of the module, or", "network=")
    fit_refuses(tmp_path, module, "copy.deepcopy cannot copy", remedy=remedy, callback=Stability())


def test_function_that_holds_on_to_the_original(tmp_path):
    module = Module(mlp(), lambda m, b: F.cross_entropy(m.function(b[0]), b[1]))
    module.function = lambda x: module.network(1.0 * x)
    subject, remedy = "still runs the original's parameters ['network", "Make that function a method"
    fit_refuses(tmp_path, module, subject, remedy=remedy, callback=Stability())


STEPS = {
    "no scalar": (
        lambda m, b: {"loss": F.cross_entropy(m(b[0]), b[1], reduction="none")},
        "returned Tensor of shape [8]",
        "a scalar",
    ),
    "detached": (
        lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1]).requires_grad_(),
        "no graph back to a parameter",
        (),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_training_steps(tmp_path, name):
    step, subject, remedy = STEPS[name]
    fit_refuses(tmp_path, Module(mlp(), step), subject, remedy=remedy, callback=Stability())


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_loss_that_cannot_be_differentiated_twice(tmp_path, curvature):
    """Autograd would take its gradient for a constant, and say nothing."""

    def step(module, batch):
        return F.cross_entropy(OnceDifferentiable.apply(module(batch[0])), batch[1])

    subject, callback = (
        "gradient of this loss has no derivative (Error in its graph)",
        Stability(curvature=curvature),
    )
    fit_refuses(tmp_path, Module(mlp(), step), subject, remedy="once_differentiable", callback=callback)


def test_a_wrong_second_derivative(tmp_path):
    network = nn.Sequential(nn.Linear(4, 5), parametrized(3))
    subject, remedy = "not those of a symmetric matrix", ("weight_norm", 'curvature="ggn"')
    fit_refuses(tmp_path, Module(network, cross_entropy), subject, remedy=remedy, callback=Stability())
    callback = Stability(curvature="ggn")
    fit(tmp_path, Module(network, cross_entropy), loader(), callback)
    assert callback.reading.converged


def test_ggn_of_a_loss_that_cannot_be_read(tmp_path):
    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1]) + module.network[0].weight.square().sum()

    subject = "a factor, a mask or a further term is in the loss"
    fit_refuses(tmp_path, Module(mlp(), step), subject, callback=Stability(curvature="ggn"))


def test_network_of_another_name(tmp_path):
    callback = Stability(network="body", likelihood="classification")
    subject, remedy = "network='body' names no submodule", "its children are ['network']"
    fit_refuses(tmp_path, Module(mlp(), cross_entropy), subject, remedy=remedy, callback=callback)


def test_nan_weights_do_not_stop_training(tmp_path):
    poison = Poison()
    callback, heal = Stability(), Heal(poison, "bayes/stability")
    with pytest.warns(UserWarning, match="Stability") as warned:
        run = fit(tmp_path, Module(mlp(), cross_entropy), loader(), poison, callback, heal, max_epochs=3)
    assert run.current_epoch == 3
    assert [epoch for epoch, _ in callback.history] == [0, 2]
    (message,) = [str(w.message) for w in warned if "Stability" in str(w.message)]
    assert "no reading for epoch 1; training goes on" in message
    assert [math.isfinite(value) for value in heal.logged] == [True, False, True]


def test_nan_inputs(tmp_path):
    x, y = tensors()
    x[3] = float("nan")
    callback = Stability()
    with pytest.warns(UserWarning, match="Stability") as warned:
        run = fit(tmp_path, Module(mlp(), cross_entropy), loader(batch_size=21, data=(x, y)), callback)
    messages = "\n".join(str(w.message) for w in warned)
    assert "first batch has no reading" in messages
    assert "no reading for epoch 0; training goes on" in messages
    assert callback.history == [] and run.current_epoch == 1
    assert math.isnan(run.callback_metrics["bayes/largest_eigenvalue"].item())


def test_step_that_fails_on_an_incomplete_batch_that_training_drops(tmp_path):
    def step(module, batch):
        assert len(batch[0]) == 8, "hard-coded"
        return cross_entropy(module, batch)

    callback = Stability()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        fit(tmp_path, Module(mlp(), step), loader(drop_last=True), callback)
    assert callback.reading.num_examples == 16
