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
from tests.refusals import UNSAID, fit_refuses
from tests.scenarios import Module, cross_entropy, fit, loader, mlp, tensors


def test_likelihood_of_another_kind_than_the_loss(tmp_path):
    subject = "likelihood=Gaussian() was given, but training_step uses F.cross_entropy"
    callback = LaplaceEvidence(likelihood="regression")
    fit_refuses(tmp_path, Module(mlp(), cross_entropy), subject, remedy="'auto'", callback=callback)


def test_frozen_last_layer(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.network[2].requires_grad_(False)
    callback = LaplaceEvidence(subset_of_weights="last_layer")
    subject = "the last layer, ['network.2.weight', 'network.2.bias'], is frozen"
    fit_refuses(tmp_path, module, subject, remedy="Unfreeze it", callback=callback)


def test_pattern_that_matches_nothing(tmp_path):
    callback = LaplaceEvidence(subset_of_weights=["network.0.*", "head.*"])
    subject = "`subset_of_weights` to name parameters of Module"
    fit_refuses(
        tmp_path,
        Module(mlp(), cross_entropy),
        subject,
        ["head.*"],
        ("match none", "network.0"),
        callback=callback,
    )


def test_hessian_of_a_large_network(tmp_path, monkeypatch):
    use_budget(monkeypatch, Budget(hessian_memory=1e4))
    callback = LaplaceEvidence(curvature="hessian")
    remedy = ("up to 17 are accepted", 'curvature="ggn", or subset_of_weights=')
    module = Module(mlp(), cross_entropy)
    fit_refuses(tmp_path, module, "Hessian of 43 parameters takes", remedy=remedy, callback=callback)


PRECISIONS = [
    ({"*.weight": 1.0}, "no pattern for ['network.0.bias', 'network.2.bias']", UNSAID, "Add '*'"),
    ({"*": 1.0, "head.*": 2.0}, "`prior_precision` to name parameters of Module", ["head.*"], ()),
    ({"*": 1.0, "*.bias": 2.0}, "patterns ['*.bias'] of prior_precision decide no trainable", UNSAID, ()),
    ({"*": 0.0}, "Every parameter has prior precision 0", UNSAID, ()),
]


@pytest.mark.parametrize(("precision", "subject", "value", "remedy"), PRECISIONS, ids=str)
def test_prior_that_does_not_fit_the_module(tmp_path, precision, subject, value, remedy):
    callback = LaplaceEvidence(prior_precision=precision)
    fit_refuses(tmp_path, Module(mlp(), cross_entropy), subject, value, remedy, callback=callback)


def test_all_parameters_frozen(tmp_path):
    module = Module(mlp(), cross_entropy, lambda m: None)
    module.requires_grad_(False)
    with pytest.warns(UserWarning, match="returned `None`"):  # Lightning's
        fit_refuses(tmp_path, module, "Module has no trainable parameter: all have requires_grad=False")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*tensors()))


DATA = {
    "no length": (lambda: DataLoader(Stream(), 8), "Stream has no length", ("N is unknown", "__len__")),
    "dict": (
        lambda: {"a": loader(), "b": loader()},
        "one torch DataLoader for training, got a collection of 2",
        (),
    ),
    "list": (
        lambda: [loader(), loader()],
        "got a collection of 2",
        ("single DataLoader, or leave", "call laplace_evidence"),
    ),
    "not a DataLoader": (lambda: list(loader()), "one torch DataLoader", ()),
    "whole batches": (
        lambda: DataLoader([tuple(tensors())] * 2, batch_size=None),
        "batch_size=None",
        "Give it a batch_size",
    ),
}


@pytest.mark.situation("Loaders and datasets that have no evidence")
@pytest.mark.parametrize("name", DATA)
def test_loaders(tmp_path, name):
    make, subject, remedy = DATA[name]
    fit_refuses(tmp_path, Module(mlp(), cross_entropy), subject, remedy=remedy, data=make())


def test_empty_loader_is_lightnings_to_warn_of(tmp_path):
    callback = LaplaceEvidence()
    empty = loader(data=(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))
    with pytest.warns(UserWarning, match="Total length of .* across ranks is zero"):
        run = fit(tmp_path, Module(mlp(), cross_entropy), empty, callback)
    assert callback.history == [] and run.global_step == 0


def test_module_that_cannot_be_copied(tmp_path):
    module = Module(mlp(), cross_entropy)
    module.lock = threading.Lock()
    fit_refuses(
        tmp_path,
        module,
        "copy.deepcopy cannot copy",
        remedy=("lock", "Keep it out of the module, or", "network="),
    )


def test_function_that_holds_on_to_the_original(tmp_path):
    module = Module(mlp(), lambda m, b: F.cross_entropy(m.function(b[0]), b[1]))
    module.function = lambda x: module.network(1.0 * x)
    subject = "still runs the original's parameters ['network"
    fit_refuses(tmp_path, module, subject, remedy="Make that function a method")


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
