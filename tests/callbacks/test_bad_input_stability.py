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

from .evidence_models import Module, cross_entropy, fit, loader, mlp, optimizer, refused, tensors
from .test_bad_input import Heal, Poison

OPTIONS = [
    ("every_n_epochs", 0, r"`every_n_epochs` to be a whole number of at least 1.*got 0"),
    ("every_n_epochs", 1.5, r"`every_n_epochs`.*got 1.5"),
    ("max_examples", 0, r"`max_examples` to be a whole number.*got 0"),
    ("max_examples", None, r"`max_examples`.*got None"),
    ("max_examples", True, r"`max_examples`.*got True"),
    ("curvature", "fisher", r"`curvature` to be 'hessian' or 'ggn', got 'fisher'"),
    ("curvature", "hessian_positive", r"`curvature` to be 'hessian' or 'ggn', got 'hessian_positive'"),
    ("curvature", None, r"`curvature`.*got None"),
    ("sharpness", "yes", r"`sharpness` to be a boolean, but got 'yes'"),
    ("sharpness", 1e-3, r"`sharpness` to be a boolean, but got 0.001"),
    ("network", 3, r"`network` to be None, the name of a submodule, or a function.*got 3"),
    ("likelihood", "poisson", r"`likelihood` to be one of .*got 'poisson'"),
    ("likelihood", "classification", r"`likelihood` to be 'auto' without `network`, got 'classification'"),
    ("batch_size", -1, r"`batch_size` to be a whole number.*got -1"),
    ("batch_size", "all", r"`batch_size`.*got 'all'"),
    ("log_key_prefix", None, r"`log_key_prefix` to be a string, but got None"),
]


@pytest.mark.parametrize(("name", "value", "message"), OPTIONS, ids=str)
def test_arguments_are_checked_at_construction(name, value, message):
    likelihood = {"likelihood": "classification"} if name == "network" else {}
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        Stability(**{name: value}, **likelihood)


def test_network_needs_a_likelihood():
    with pytest.raises(ValueError, match=r"`likelihood` to be given beside `network`.*'classification'"):
        Stability(network="network")


def test_arguments_are_keywords():
    with pytest.raises(TypeError):
        Stability(5)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*tensors()))


DATA = {
    "no length": (lambda: DataLoader(Stream(), 8), r"Stream has no length.*__len__"),
    "list": (
        lambda: [loader(), loader()],
        r"Stability need one torch DataLoader for training, got a collection of 2",
    ),
    "whole batches": (lambda: DataLoader([tuple(tensors())] * 2, batch_size=None), r"Give it a batch_size"),
}


@pytest.mark.parametrize("name", DATA)
def test_loaders(tmp_path, name):
    make, message = DATA[name]
    refused(tmp_path, message, Module(mlp(), cross_entropy), make(), Stability())


def test_manual_optimization(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.automatic_optimization = False
    refused(
        tmp_path,
        r"Module optimizes manually.*Stability\(likelihood=..., network=...\)",
        module,
        None,
        Stability(),
    )


def test_an_optimizer_that_climbs(tmp_path):
    module = Module(mlp(), cross_entropy, optimizer(maximize=True))
    refused(tmp_path, r"SGD was given maximize=True. Return the negative loss", module, None, Stability())


def test_all_parameters_frozen(tmp_path):
    module = Module(mlp(), cross_entropy, lambda m: None)
    module.requires_grad_(False)
    with pytest.warns(UserWarning, match="returned `None`"):  # Lightning's
        refused(tmp_path, r"no trainable parameter: all have requires_grad=False", module, None, Stability())


def test_two_callbacks_under_one_prefix(tmp_path):
    callbacks = [Stability(), Stability(curvature="ggn")]
    message = r"`log_key_prefix` to differ between the Stability callbacks.*got 'bayes/' twice.*'bayes/2/'"
    refused(tmp_path, message, Module(mlp(), cross_entropy), callback=callbacks)


def test_module_that_cannot_be_copied(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.lock = threading.Lock()
    message = r"copy.deepcopy cannot copy .*lock.*Keep it out of the module, or.*network="
    refused(tmp_path, message, module, None, Stability())


def test_function_that_holds_on_to_the_original(tmp_path):
    module = Module(mlp(), lambda m, b: F.cross_entropy(m.function(b[0]), b[1]))
    module.function = lambda x: module.network(1.0 * x)
    message = r"still runs the original's parameters \['network.*Make that function a method"
    refused(tmp_path, message, module, None, Stability())


STEPS = {
    "no scalar": (
        lambda m, b: {"loss": F.cross_entropy(m(b[0]), b[1], reduction="none")},
        r"returned Tensor of shape \[8\]; a scalar",
    ),
    "detached": (
        lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1]).requires_grad_(),
        r"no graph back to a parameter",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_training_steps(tmp_path, name):
    step, message = STEPS[name]
    refused(tmp_path, message, Module(mlp(), step), None, Stability())


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

    message = r"gradient of this loss has no derivative \(Error in its graph\).*once_differentiable"
    refused(tmp_path, message, Module(mlp(), step), None, Stability(curvature=curvature))


def test_a_wrong_second_derivative(tmp_path):
    network = nn.Sequential(nn.Linear(4, 5), parametrized(3))
    message = r"not those of a symmetric matrix.*weight_norm.*curvature=\"ggn\""
    refused(tmp_path, message, Module(network, cross_entropy), None, Stability())
    callback = Stability(curvature="ggn")
    fit(tmp_path, Module(network, cross_entropy), loader(), callback)
    assert callback.reading.converged


def test_ggn_of_a_loss_that_cannot_be_read(tmp_path):
    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1]) + module.network[0].weight.square().sum()

    message = r"a factor, a mask or a further term is in the loss"
    refused(tmp_path, message, Module(mlp(), step), None, Stability(curvature="ggn"))


def test_network_of_another_name(tmp_path):
    callback = Stability(network="body", likelihood="classification")
    message = r"network='body' names no submodule.*its children are \['network'\]"
    refused(tmp_path, message, Module(mlp(), cross_entropy), None, callback)


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
