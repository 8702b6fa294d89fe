"""The callback's evidence is that of the oracle, whatever way a training_step is written."""

import logging

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

from lightning_bayes import LaplaceEvidence, laplace_evidence
from lightning_bayes.likelihoods import Gaussian
from lightning_bayes.structures.base import Budget
from tests.cases import use_budget
from tests.scenarios import (
    DECAY,
    TASKS,
    Module,
    N,
    Pair,
    Record,
    Rich,
    Shaped,
    cross_entropy,
    disagreements,
    fit,
    loader,
    mean_squared_error,
    mean_squared_residual,
    mlp,
    reference,
    task_of,
    tensors,
)

B = 8


def loss(function, **kwargs):
    """A step with `function` as the loss; modules and functions are called alike."""
    return lambda module, batch: function(module(batch[0]), batch[1], **kwargs)


def then(reduce, function):
    return lambda module, batch: reduce(function(module(batch[0]), batch[1], reduction="none"))


# task, step, and s / (2σ² for regression): how many times the mean per-example nll the loss is
LOSSES = {
    "cross_entropy": ("classification", loss(F.cross_entropy), 1),
    "CrossEntropyLoss": ("classification", loss(nn.CrossEntropyLoss()), 1),
    "cross_entropy none.mean": ("classification", then(torch.mean, F.cross_entropy), 1),
    "cross_entropy sum": ("classification", loss(F.cross_entropy, reduction="sum"), B),
    "cross_entropy none.sum": ("classification", then(torch.sum, F.cross_entropy), B),
    "nll_loss": ("classification", lambda m, b: F.nll_loss(F.log_softmax(m(b[0]), dim=1), b[1]), 1),
    "NLLLoss": ("classification", lambda m, b: nn.NLLLoss()(torch.log_softmax(m(b[0]), 1), b[1]), 1),
    "nll_loss sum": (
        "classification",
        lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1], reduction="sum"),
        B,
    ),
    "bce": ("binary", loss(F.binary_cross_entropy_with_logits), 1),
    "bce squeezed": (
        "binary",
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]).squeeze(1), b[1].squeeze(1)),
        1,
    ),
    "bce 3": ("binary_3", loss(F.binary_cross_entropy_with_logits), 1 / 3),
    "BCEWithLogitsLoss 3": ("binary_3", loss(nn.BCEWithLogitsLoss()), 1 / 3),
    "bce 3 sum": ("binary_3", loss(F.binary_cross_entropy_with_logits, reduction="sum"), B),
    "mse": ("regression", mean_squared_error, 1),
    "MSELoss": ("regression", loss(nn.MSELoss()), 1),
    "mse squeezed": ("regression", lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1][:, 0]), 1),
    "mse 2": ("regression_2", mean_squared_error, 1 / 2),
    "mse 2 none.mean": ("regression_2", then(torch.mean, F.mse_loss), 1 / 2),
    "mse 2 sum": ("regression_2", loss(F.mse_loss, reduction="sum"), B),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_reductions(tmp_path, name):
    task, step, scale = LOSSES[name]
    callback, module = LaplaceEvidence("full"), Module(mlp(TASKS[task]), step)
    fit(tmp_path, module, loader(task, B, shuffle=True), callback)
    ((epoch, evidence),) = callback.history
    data = tensors(task)
    if task.startswith("regression"):
        variance = mean_squared_residual(module.network, data)
        assert evidence.noise_variance == pytest.approx(variance, rel=1e-10)
        scale *= 2 * variance
    expected = reference(module.network, data, task_of(task), scale)
    assert epoch == 0
    assert evidence.prior_precision == pytest.approx(N * DECAY / scale)
    assert disagreements(evidence, expected) == {}


def test_prior_of_a_squared_error_in_units_of_the_noise(tmp_path):
    # φλ = N wd K / 2 does not know σ: the minimum of the cost is that of the training loss.
    callback, module = LaplaceEvidence(likelihood=Gaussian(sigma=0.3)), Module(mlp(2), mean_squared_error)
    fit(tmp_path, module, loader("regression_2"), callback)
    evidence = callback.history[0][1]
    assert evidence.noise_variance == pytest.approx(0.09)
    assert evidence.noise_variance * evidence.prior_precision == pytest.approx(N * DECAY * 2 / 2)
    expected = reference(module.network, tensors("regression_2"), "regression", 2 * 0.09 / 2, sigma=0.3)
    assert disagreements(evidence, expected) == {}


BATCHES = {
    "tuple": (lambda x, y: (x, y), lambda b: (b[0], b[1])),
    "dict": (lambda x, y: {"image": x, "label": y}, lambda b: (b["image"], b["label"])),
    "nested dict": (lambda x, y: {"in": {"x": x}, "out": [y]}, lambda b: (b["in"]["x"], b["out"][0])),
    "namedtuple": (Pair, lambda b: (b.image, b.label)),
    "tuple of tuples": (lambda x, y: ((x, x.sum()), (y,)), lambda b: (b[0][0], b[1][0])),
    "strings on board": (lambda x, y: {"name": "a", "x": x, "y": y}, lambda b: (b["x"], b["y"])),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(tmp_path, name):
    pack, unpack = BATCHES[name]
    callback, module = LaplaceEvidence(), Module(mlp(), lambda m, batch: cross_entropy(m, unpack(batch)))
    data = torch.utils.data.DataLoader(Shaped(tensors(), pack), B)
    fit(tmp_path, module, data, callback)
    assert disagreements(callback.history[0][1], reference(module.network, tensors())) == {}


def collated(items, function):
    x, y = torch.utils.data.default_collate(items)
    return function(x, y)


@pytest.mark.parametrize(
    "pack",
    [
        Record,
        lambda x, y: Record(
            [torch.ones(3), x], y
        ),  # tensors of several lengths say nothing of the batch size
    ],
)
def test_batches_of_other_shapes(tmp_path, pack):
    def step(module, batch):
        x = batch.x if isinstance(batch.x, torch.Tensor) else batch.x[1]
        return F.cross_entropy(module(x), batch.y)

    callback, module = LaplaceEvidence(), Module(mlp(), step)
    fit(tmp_path, module, loader(collate_fn=lambda items: collated(items, pack)), callback)
    assert disagreements(callback.history[0][1], reference(module.network, tensors())) == {}


class Elaborate(Module):
    """Metrics, other losses beside the one that counts, losses kept with their graph, a dict returned."""

    def __init__(self, network):
        super().__init__(network, None)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.criterion = nn.CrossEntropyLoss()
        self.losses = []

    def training_step(self, batch):  # no batch_idx
        x, y = batch
        logits = self(x)
        loss = self.criterion(logits, y)
        self.losses.append(loss)
        self.accuracy(logits.softmax(1), y)
        F.cross_entropy(logits, y, label_smoothing=0.1)  # for show
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"kl": F.kl_div(logits.log_softmax(1), logits.softmax(1), reduction="batchmean")})
        self.print("step", end="")
        assert self.trainer.training and self.trainer.optimizers[0].param_groups[0]["lr"] == 0.1
        self.logger.experiment.add_scalar("x", loss)
        return {"loss": loss, "logits": logits}


def test_elaborate_training_step(tmp_path, capsys):
    callback, module = LaplaceEvidence(), Elaborate(Rich())
    run = fit(tmp_path, module, loader(shuffle=True), callback, logger=True, max_epochs=2)
    assert disagreements(callback.history[1][1], reference(module.network, tensors())) == {}
    assert len(module.losses) == 2 * 3  # the steps of training alone
    assert capsys.readouterr().out.count("step") == 2 * 3
    assert run.logged_metrics["accuracy_epoch"] <= 1


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("task", ["classification", "regression_2"])
def test_structures_on_a_rich_network(tmp_path, structure, task):
    step = mean_squared_error if task.startswith("regression") else cross_entropy
    callback, module = LaplaceEvidence(structure), Module(Rich(TASKS[task]), step)
    fit(tmp_path, module, loader(task, shuffle=True), callback, max_epochs=2)
    data, scale = tensors(task), 1.0
    if task == "regression_2":
        scale = mean_squared_residual(module.network, data)  # 2σ²/K
    for_structure = reference(module.network, data, task_of(task), scale, structure=structure)
    evidence = callback.history[1][1]
    assert evidence.structure == structure
    assert disagreements(evidence, for_structure) == {}


def test_agrees_with_laplace_evidence_in_float32(tmp_path):
    callback, module = LaplaceEvidence(), Module(Rich(), cross_entropy).float()
    data = tuple(part.float() if part.is_floating_point() else part for part in tensors())
    fit(tmp_path, module, loader(data=data), callback)
    direct = laplace_evidence(module.network, data, prior_precision=N * DECAY)
    # Batches of other sizes add in another order.
    assert disagreements(callback.history[0][1], direct, rel=1e-5) == {}


def test_auto_says_which_structure_and_why(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Module(mlp(), cross_entropy), loader(), LaplaceEvidence())
    assert "structure='full'. 43 parameters, 42 rows: exact takes" in caplog.text
    use_budget(monkeypatch, Budget(seconds=0.0))
    callback = LaplaceEvidence()
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback)
    assert "structure='kron'" in caplog.text and "max_examples= takes fewer examples" in caplog.text
    assert callback.history[0][1].structure == "kron"


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precision_plugins(tmp_path, precision):
    data = tuple(part.float() if part.is_floating_point() else part for part in tensors())
    callback, module = LaplaceEvidence(), Module(mlp(), cross_entropy).float()
    fit(tmp_path, module, loader(data=data), callback, precision=precision)
    if precision == "bf16-true":  # what training sees
        data = data[0].bfloat16(), data[1]
    expected = reference(module.network.double(), (data[0].double(), data[1]))
    assert disagreements(callback.history[0][1], expected, rel=1e-8 if precision == "64-true" else 1e-4) == {}


@pytest.mark.parametrize("part", ["module", "network"])
def test_compiled(tmp_path, part):
    module = Module(mlp(), cross_entropy)
    network, callback = module.network, LaplaceEvidence()
    if part == "network":
        module.network = torch.compile(network, backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    fit(tmp_path, module, loader(), callback)
    assert disagreements(callback.history[0][1], reference(network, tensors())) == {}


def test_training_step_that_works_on_its_batch(tmp_path):
    def step(module, batch):
        x, y = batch
        x.mul_(0.5)
        return F.cross_entropy(module(x), y)

    callback, module = LaplaceEvidence(), Module(mlp(), step)
    fit(tmp_path, module, loader(), callback)
    x, y = tensors()
    assert disagreements(callback.history[0][1], reference(module.network, (0.5 * x, y))) == {}
