"""Wrong use ends before the first optimizer step, in a message with the argument and the remedy."""

import math
import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bayes import LaplaceEvidence
from lightning_bayes.structures.base import Budget
from tests.cases import use_budget

from .evidence_models import Module, cross_entropy, fit, loader, mlp, refused, tensors

OPTIONS = [
    (
        "structure",
        "dense",
        r"`structure` to be 'auto', 'full', 'blocks', 'kron', 'kron_joint', 'kron_expand', 'diag', got 'dense'",
    ),
    ("structure", None, r"`structure`.*got None"),
    ("structure", ["full"], r"`structure`.*got \['full'\]"),
    ("likelihood", "poisson", r"`likelihood` to be one of .*got 'poisson'"),
    ("likelihood", 3, r"`likelihood`.*Gaussian\(sigma=0.1\), got 3"),
    ("prior_precision", 0.0, r"`prior_precision` to be a positive.*got 0.0"),
    ("prior_precision", -1, r"`prior_precision`.*got -1"),
    ("prior_precision", float("nan"), r"`prior_precision`.*got nan"),
    ("prior_precision", float("inf"), r"`prior_precision`.*got inf"),
    ("prior_precision", True, r"`prior_precision`.*got True"),
    ("prior_precision", None, r"`prior_precision`.*'auto'.*got None"),
    ("prior_precision", {}, r"`prior_precision`.*non-empty mapping"),
    ("prior_precision", {"*": -1.0}, r"non-negative, finite numbers or 'optimize', got \{'\*': -1.0\}"),
    ("prior_precision", {3: 1.0}, r"parameter-name patterns.*got \{3: 1.0\}"),
    ("prior_precision", "optimise", r"'auto', 'optimize_per_group', 'optimize'.*got 'optimise'"),
    ("subset_of_weights", "head", r"`subset_of_weights` to be 'all', 'last_layer' or a list.*got 'head'"),
    ("subset_of_weights", [], r"`subset_of_weights`.*got \[\]"),
    ("curvature", "fisher", r"`curvature` to be 'ggn', 'hessian', 'hessian_positive', got 'fisher'"),
    ("backend", "jax", r"`backend` to be 'auto', 'backpack', 'autograd', got 'jax'"),
    ("network", 3, r"`network` to be None, the name of a submodule, or a function.*got 3"),
    ("every_n_epochs", 0, r"`every_n_epochs` to be a whole number of at least 1.*got 0"),
    ("every_n_epochs", 1.5, r"`every_n_epochs`.*got 1.5"),
    ("every_n_epochs", True, r"`every_n_epochs`.*got True"),
    ("max_examples", 0, r"`max_examples` to be a whole number.*got 0"),
    ("max_examples", "all", r"`max_examples`.*got 'all'"),
    ("batch_size", -1, r"`batch_size` to be a whole number.*got -1"),
    ("batch_size", 2.5, r"`batch_size`.*got 2.5"),
    ("tolerance", 0.0, r"`tolerance` to be a finite number above 0.*got 0.0"),
    ("num_samples", 0, r"`num_samples` to be a whole number of at least 1.*got 0"),
    ("max_overhead", 0, r"`max_overhead` to be a finite number above 0.*got 0"),
    ("max_overhead", float("nan"), r"`max_overhead`.*got nan"),
    ("max_overhead", "10%", r"`max_overhead`.*got '10%'"),
    ("log_key_prefix", None, r"`log_key_prefix` to be a string, but got None"),
]


@pytest.mark.parametrize(("name", "value", "message"), OPTIONS, ids=str)
def test_arguments_are_checked_at_construction(name, value, message):
    likelihood = {"likelihood": "classification"} if name == "network" else {}
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        LaplaceEvidence(**{name: value}, **likelihood)


def test_network_needs_a_likelihood():
    with pytest.raises(ValueError, match=r"`likelihood` to be given beside `network`.*'classification'"):
        LaplaceEvidence(network="network")


def test_likelihood_of_another_kind_than_the_loss(tmp_path):
    message = r"likelihood=Gaussian\(sigma=None\) was given, but training_step uses F.cross_entropy.*'auto'"
    refused(
        tmp_path, message, Module(mlp(), cross_entropy), callback=LaplaceEvidence(likelihood="regression")
    )


def test_frozen_last_layer(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.network[2].requires_grad_(False)
    callback = LaplaceEvidence(subset_of_weights="last_layer")
    message = r"the last layer, \['network.2.weight', 'network.2.bias'\], is frozen.*Unfreeze it"
    refused(tmp_path, message, module, callback=callback)


def test_pattern_that_matches_nothing(tmp_path):
    callback = LaplaceEvidence(subset_of_weights=["network.0.*", "head.*"])
    message = (
        r"`subset_of_weights` to name parameters of Module, got \['head.\*'\], which match none.*network.0"
    )
    refused(tmp_path, message, Module(mlp(), cross_entropy), callback=callback)


def test_hessian_of_a_large_network(tmp_path, monkeypatch):
    use_budget(monkeypatch, Budget(hessian_memory=1e4))
    callback = LaplaceEvidence(curvature="hessian")
    message = (
        r"Hessian of 43 parameters takes.*up to 17 are accepted.*curvature=\"ggn\", or subset_of_weights="
    )
    refused(tmp_path, message, Module(mlp(), cross_entropy), callback=callback)


PRECISIONS = [
    ({"*.weight": 1.0}, r"no pattern for \['network.0.bias', 'network.2.bias'\].*Add '\*'"),
    ({"*": 1.0, "head.*": 2.0}, r"`prior_precision` to name parameters of Module, got \['head.\*'\]"),
    ({"*": 1.0, "*.bias": 2.0}, r"patterns \['\*.bias'\] of prior_precision decide no trainable"),
    ({"*": 0.0}, r"Every parameter has prior precision 0"),
]


@pytest.mark.parametrize(("precision", "message"), PRECISIONS, ids=str)
def test_prior_that_does_not_fit_the_module(tmp_path, precision, message):
    callback = LaplaceEvidence(prior_precision=precision)
    refused(tmp_path, message, Module(mlp(), cross_entropy), callback=callback)


def test_all_parameters_frozen(tmp_path):
    module = Module(mlp(), cross_entropy, lambda m: None)
    module.requires_grad_(False)
    with pytest.warns(UserWarning, match="returned `None`"):  # Lightning's
        refused(tmp_path, r"Module has no trainable parameter: all have requires_grad=False", module)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*tensors()))


DATA = {
    "no length": (lambda: DataLoader(Stream(), 8), {}, r"Stream has no length.*N is unknown.*__len__"),
    "dict": (
        lambda: {"a": loader(), "b": loader()},
        {},
        r"one torch DataLoader for training, got a collection of 2",
    ),
    "list": (
        lambda: [loader(), loader()],
        {},
        r"got a collection of 2.*single DataLoader, or leave.*call laplace_evidence",
    ),
    "not a DataLoader": (lambda: list(loader()), {}, r"one torch DataLoader"),
    "whole batches": (
        lambda: DataLoader([tuple(tensors())] * 2, batch_size=None),
        {},
        r"batch_size=None.*Give it a batch_size",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_loaders(tmp_path, name):
    make, options, message = DATA[name]
    refused(tmp_path, message, Module(mlp(), cross_entropy), make(), LaplaceEvidence(**options))


def test_empty_loader_is_lightnings_to_warn_of(tmp_path):
    callback = LaplaceEvidence()
    empty = loader(data=(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))
    with pytest.warns(UserWarning, match="Total length of .* across ranks is zero"):
        run = fit(tmp_path, Module(mlp(), cross_entropy), empty, callback)
    assert callback.history == [] and run.global_step == 0


def test_manual_optimization(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.automatic_optimization = False
    refused(tmp_path, r"Module optimizes manually.*LaplaceEvidence\(likelihood=..., network=...\)", module)


def test_module_that_cannot_be_copied(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.lock = threading.Lock()
    refused(tmp_path, r"copy.deepcopy cannot copy .*lock.*Keep it out of the module, or.*network=", module)


def test_function_that_holds_on_to_the_original(tmp_path):
    module = Module(mlp(), lambda m, b: F.cross_entropy(m.function(b[0]), b[1]))
    module.function = lambda x: module.network(1.0 * x)
    refused(tmp_path, r"still runs the original's parameters \['network.*Make that function a method", module)


def test_two_callbacks_under_one_prefix(tmp_path):
    callbacks = [LaplaceEvidence("full"), LaplaceEvidence("diag")]
    message = r"`log_key_prefix` to differ between the LaplaceEvidence .*got 'bayes/' twice.*='bayes/2/'"
    refused(tmp_path, message, Module(mlp(), cross_entropy), callback=callbacks)


class Poison(Callback):
    """Stands before the callback and makes the weights NaN at the end of epoch 1."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.saved = pl_module.network[0].weight.detach().clone()
            pl_module.network[0].weight.data.fill_(float("nan"))


class Heal(Callback):
    """Stands behind it, notes what was logged, and undoes the harm."""

    def __init__(self, poison, key="bayes/log_evidence"):
        self.poison, self.key, self.logged = poison, key, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.logged.append(trainer.callback_metrics[self.key].item())
        if trainer.current_epoch == 1:
            pl_module.network[0].weight.data.copy_(self.poison.saved)


def test_nan_weights_do_not_stop_training(tmp_path):
    poison = Poison()
    callback, heal = LaplaceEvidence(), Heal(poison)
    with pytest.warns(UserWarning, match="LaplaceEvidence") as warned:
        run = fit(tmp_path, Module(mlp(), cross_entropy), loader(), poison, callback, heal, max_epochs=3)
    assert run.current_epoch == 3
    assert [epoch for epoch, _ in callback.history] == [0, 2]
    (message,) = [str(w.message) for w in warned if "LaplaceEvidence" in str(w.message)]
    assert "no evidence for epoch 1; training goes on" in message
    assert "20 of 20 entries of the parameter 'network.0.weight' are NaN or infinite" in message
    assert [math.isfinite(value) for value in heal.logged] == [True, False, True]


def test_nan_inputs(tmp_path):
    x, y = tensors()
    x[3] = float("nan")
    callback = LaplaceEvidence()
    with pytest.warns(UserWarning, match="are NaN or infinite") as warned:
        run = fit(tmp_path, Module(mlp(), cross_entropy), loader(data=(x, y)), callback, max_epochs=2)
    messages = "\n".join(str(w.message) for w in warned)
    assert "first batch has no evidence. 3 of " in messages
    assert "entries of the network's outputs are NaN" in messages
    assert "no evidence for epoch 0; training goes on" in messages
    assert callback.history == [] and run.current_epoch == 2
    assert math.isnan(run.callback_metrics["bayes/log_evidence"].item())


def test_step_that_fails_on_the_last_batch_only(tmp_path):
    def step(module, batch):
        assert len(batch[0]) == 8, "hard-coded"
        return cross_entropy(module, batch)

    callback = LaplaceEvidence(batch_size=8)
    with pytest.warns(
        UserWarning, match="no evidence for epoch 0; training goes on. AssertionError: hard-coded"
    ):
        run = fit(tmp_path, Module(mlp(), step), loader(drop_last=True), callback)
    assert run.global_step == 2


def test_random_training_step_is_announced(tmp_path):
    def step(module, batch):
        return F.cross_entropy(F.dropout(module(batch[0])), batch[1])

    with pytest.warns(UserWarning, match=r"draws random numbers \(a functional dropout without training="):
        fit(tmp_path, Module(mlp(), step), loader(), LaplaceEvidence())
