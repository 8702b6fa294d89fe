"""Whose weights are read, what the copy sees of its Trainer, and the hooks that batches go through."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

from lightning_bayes import LaplaceEvidence
from tests.refusals import fit_refuses
from tests.scenarios import (
    DECAY,
    Module,
    N,
    cross_entropy,
    disagreements,
    fit,
    loader,
    mlp,
    optimizer,
    reference,
    sgd,
    tensors,
)


def from_dict(module, batch):
    return F.cross_entropy(module(batch["x"]), batch["y"])


def halved(batch):
    return {"x": batch[0] / 2, "y": batch[1]}


class Transferring(Module):
    """Every hook of transfer does something that must happen once."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        assert isinstance(batch, list)
        return halved(batch)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(batch, device, dataloader_idx) | {"moved": device}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert batch.pop("moved") == self.device
        return batch | {"x": batch["x"] + 1}


class Data(L.LightningDataModule):
    """The hooks of a datamodule go before the module's."""

    num_classes = 3

    def train_dataloader(self):
        return loader()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return halved(batch)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"x": batch["x"] + 1}


@pytest.mark.parametrize("where", ["module", "datamodule"])
def test_hooks_of_transfer(tmp_path, where):
    callback = LaplaceEvidence()
    module = (Transferring if where == "module" else Module)(mlp(), from_dict)
    fit(tmp_path, module, loader() if where == "module" else Data(), callback)
    x, y = tensors()
    assert disagreements(callback.history[0][1], reference(module.network, (x / 2 + 1, y))) == {}


def test_what_a_training_step_reads(tmp_path):
    seen = []

    class Reader(Module):
        def training_step(self, batch, batch_idx):
            trainer = self.trainer
            assert isinstance(trainer, L.Trainer)
            seen.append(
                (
                    trainer.datamodule.num_classes,
                    trainer.max_epochs,
                    self.current_epoch,
                    self.global_step,
                    self.optimizers().param_groups[0]["lr"],
                    self.device.type,
                    batch_idx,
                )
            )
            self.logger.experiment.log_metrics({"x": 1.0})
            trainer.loggers[0].log_metrics({"x": 1.0})
            trainer.logger.log_metrics({"x": 1.0})
            self.log("loss", 1.0, on_step=True)
            return from_dict(self, batch)

    logger = CSVLogger(tmp_path)
    logged = []
    logger.log_metrics = lambda metrics, step=None: logged.append(metrics)
    logger.experiment.log_metrics = lambda metrics, step=None: logged.append(metrics)
    callback = LaplaceEvidence()
    fit(tmp_path, Reader(mlp(), None), Data(), callback, logger=logger, max_epochs=2)
    assert len(callback.history) == 2
    assert {step[:3] + step[4:6] for step in seen} == {(3, 2, epoch, 0.1, "cpu") for epoch in (0, 1)}
    assert sum(metrics == {"x": 1.0} for metrics in logged) == 3 * 6  # of six steps, the copy's not counted


def test_nested_lightning_modules_are_silent_too(tmp_path, capsys):
    class Inner(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            self.print("inner", end="")
            return self.net(x)

    callback, module = LaplaceEvidence(), Module(Inner(), cross_entropy)
    fit(tmp_path, module, loader(), callback)
    assert capsys.readouterr().out.count("inner") == 3  # of three steps
    assert disagreements(callback.history[0][1], reference(module.network.net, tensors())) == {}


class TwoTower(Module):
    """The part that `network=` names, and a head that stays outside."""

    def __init__(self, step, configure=None):
        super().__init__(nn.Identity(), step, configure)
        self.body = nn.ModuleDict({"net": mlp()})
        self.scale = nn.Parameter(torch.ones(3))
        self.double()


def weighted(module, batch):
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return F.cross_entropy(module.body["net"](batch[0]) * module.scale, batch[1], weight=weight)


def test_network_by_name(tmp_path):
    callback = LaplaceEvidence(likelihood="classification", network="body.net")
    module = TwoTower(weighted)
    fit(tmp_path, module, loader(), callback)
    assert disagreements(callback.history[0][1], reference(module.body["net"], tensors())) == {}


def test_network_as_a_function(tmp_path):
    def network(module, batch):
        return module.body["net"](batch["x"]), batch["y"]

    def step(module, batch):
        return weighted(module, (batch["x"], batch["y"]))

    class Datum(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    callback = LaplaceEvidence(
        likelihood="classification", network=network, prior_precision={"scale": 0.0, "*": 0.5}
    )
    module = TwoTower(step)
    fit(tmp_path, module, Datum(), callback)
    x, y = tensors()
    expected = reference(module.body["net"], (x / 2, y), precision=0.5)
    assert disagreements(callback.history[0][1], expected) == {}
    assert callback.history[0][1].fixed_parameters == ("scale",)


def test_manual_optimization_with_a_network(tmp_path):
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            own = self.optimizers()
            own.zero_grad()
            self.manual_backward(cross_entropy(self, batch))
            own.step()

    callback = LaplaceEvidence(likelihood="classification", network="network")
    module = Manual(mlp(), None)
    run = fit(tmp_path, module, loader(), callback, max_epochs=2)
    assert run.global_step == 6
    assert disagreements(callback.history[1][1], reference(module.network, tensors())) == {}


NETWORKS = {
    "unknown": (
        "body.head",
        "network='body.head' names no submodule of TwoTower; its children are ['network'",
    ),
    "parameter": ("scale", "network='scale' names no submodule"),
    "not a pair": (
        lambda module, batch: module.body["net"](batch[0]),
        "`network` to be a function that returns a pair of tensors (outputs, targets), got Tensor",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_cannot_be_used(tmp_path, name):
    network, subject, *remedy = NETWORKS[name]
    callback = LaplaceEvidence(
        likelihood="classification", network=network, prior_precision={"scale": 0.0, "*": 1.0}
    )
    fit_refuses(tmp_path, TwoTower(weighted), subject, remedy=remedy, callback=callback)


def test_network_function_over_the_module_outside(tmp_path):
    module = Module(mlp(), cross_entropy)
    callback = LaplaceEvidence(
        likelihood="classification", network=lambda _, batch: (module.network(batch[0]), batch[1])
    )
    fit_refuses(tmp_path, module, "must use the module that it is given", callback=callback)


def test_network_that_returns_no_tensor(tmp_path):
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return {"logits": self.net(x)}

    step = lambda m, b: F.cross_entropy(m(b[0])["logits"], b[1])  # noqa: E731
    callback = LaplaceEvidence(likelihood="classification", network="network")
    subject, remedy = "`network` returned dict", "network=lambda module, batch"
    fit_refuses(tmp_path, Module(Output(), step), subject, remedy=remedy, callback=callback)


def test_network_by_name_needs_pairs(tmp_path):
    callback = LaplaceEvidence(likelihood="classification", network="network")
    subject, remedy = (
        "network='network' is called on batch[0]",
        ("but the batch is dict", "lambda module, batch"),
    )
    fit_refuses(tmp_path, Module(mlp(), from_dict), subject, remedy=remedy, data=Data(), callback=callback)


def test_network_names_the_way_round_what_cannot_be_copied(tmp_path):
    callback = LaplaceEvidence(likelihood="classification", network="network")
    module = Module(mlp(), cross_entropy)
    module.stream = (i for i in range(3))
    fit(tmp_path, module, loader(), callback)
    assert disagreements(callback.history[0][1], reference(module.network, tensors())) == {}


def test_summed_loss_with_batches_from_a_list(tmp_path):
    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")

    callback = LaplaceEvidence()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*tensors()), batch_sampler=[range(7 * i, 7 * i + 7) for i in range(3)]
    )
    fit(tmp_path, Module(mlp(), step, optimizer(lr=0.01)), data, callback)
    assert callback.history[0][1].prior_precision == pytest.approx(N * DECAY / 7)


def test_optimizer_over_other_parameters_gives_no_prior(tmp_path):
    module = Module(mlp(), cross_entropy, lambda m: sgd(m.network[2]))
    callback = LaplaceEvidence()
    fit(tmp_path, module, loader(), callback)
    assert callback.history[0][1].fixed_parameters == ("network.0.weight", "network.0.bias")
