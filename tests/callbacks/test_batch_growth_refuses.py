"""Wrong use of BatchSizeScheduler is found out before the first step, with the remedy."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, IterableDataset

from lightning_bayes import BatchSizeScheduler
from tests.refusals import refuses
from tests.scenarios import (
    BATCH,
    NUM_ROWS,
    Regression,
    RegressionData,
    column,
    grow,
    rows,
    trainer,
    weights,
    with_scheduler,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")


class Cached(RegressionData):
    def setup(self, stage):
        self.loader = super().train_dataloader()

    def train_dataloader(self):
        return self.loader


class Fixed(RegressionData):
    def train_dataloader(self):
        return DataLoader(rows(), 2)


class Nameless(RegressionData):
    def __init__(self):
        super().__init__()
        del self.batch_size

    def train_dataloader(self):
        return DataLoader(rows(), BATCH)

    val_dataloader = train_dataloader


RELOAD = {"method": "reload"}
PLATEAU = with_scheduler(schedulers.ReduceLROnPlateau, monitor="val_loss")


@pytest.mark.parametrize(
    ("setting", "subject"),
    [
        (
            {"callbacks": [GradientAccumulationScheduler({1: 2})]},
            "got GradientAccumulationScheduler beside it",
        ),
        ({"schedule": "lr_scheduler"}, "`configure_optimizers` returned none"),
        ({"options": {"max_batch_size": NUM_ROWS + 1}}, "`max_batch_size` to be at most `dataset_size`"),
        ({"options": {"max_batch_size": NUM_ROWS, "rule": "exact"}}, "at full batch the noise scale is 0"),
        ({"options": {"max_device_batch_size": 2}}, "at least the batch of the loader to start with"),
        ({"options": RELOAD, "data": Cached}, "at batch_size=8 it returned a loader with 4"),
        ({"options": RELOAD, "data": Fixed}, "at batch_size=4 it returned a loader with 2"),
        ({"options": RELOAD, "data": Nameless}, "has no whole number `batch_size`"),
        ({"options": RELOAD, "limit_train_batches": 3}, "limit_train_batches=3"),
        ({"options": RELOAD, "overfit_batches": 0.5}, "overfit_batches"),
        ({"options": RELOAD, "val_check_interval": 6}, "val_check_interval=6"),
        ({"options": RELOAD, "val_check_interval": 0.5}, "val_check_interval=0.5"),
        (
            {"options": RELOAD, "schedule": "lr_scheduler", "net": partial(Regression, PLATEAU)},
            'ReduceLROnPlateau with method="reload"',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:You have overridden `train_dataloader`:UserWarning")
def test_before_the_first_step(tmp_path, setting, subject):
    setting = dict(setting)
    net, data = setting.pop("net", Regression)(), setting.pop("data", RegressionData)()
    callbacks, schedule = setting.pop("callbacks", []), setting.pop("schedule", [1])
    before = weights(net)
    with refuses(subject):
        grow(tmp_path, schedule, *callbacks, net=net, data=data, **setting)
    assert net.batches == 0 and torch.equal(weights(net), before)
    assert "train_dataloader" not in vars(data)


def test_reload_needs_a_datamodule(tmp_path):
    with refuses("come from no LightningDataModule"):
        trainer(tmp_path, [BatchSizeScheduler([1], method="reload")]).fit(
            Regression(), DataLoader(rows(), BATCH)
        )


class Endless(IterableDataset):
    def __iter__(self):
        return iter(rows())


def test_a_stream_needs_its_size(tmp_path):
    data = DataLoader(Endless(), BATCH)
    with refuses("length", remedy=("dataset_size=", "(SGDNoiseScale, BatchSizeScheduler)")):
        trainer(tmp_path, [BatchSizeScheduler([1])]).fit(Regression(), data)
    net = Regression()
    trainer(tmp_path, [BatchSizeScheduler([1], dataset_size=200)], max_epochs=2).fit(net, data)
    assert column(net, "batch_size") == [4, 20]
    assert column(net, "accumulation") == [1, 5]


def test_deepspeed_is_refused_by_name(tmp_path):
    class DeepSpeedStrategy(type(trainer(tmp_path, []).strategy)):
        pass

    with refuses("DeepSpeedStrategy accumulates"):
        run = trainer(tmp_path, [BatchSizeScheduler([1])], strategy=DeepSpeedStrategy("cpu"))
        run.fit(Regression(), DataLoader(rows(), BATCH))


@pytest.mark.parametrize("method", ["accumulate", "reload"])
def test_a_summed_loss_grows_with_the_batch_of_the_loader(tmp_path, method):
    class Summed(Regression):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.network(batch[0]), batch[1], reduction="sum")

    def run():
        return grow(tmp_path, [1], net=Summed(), options={"factor": 2, "method": method}, max_epochs=2)

    if method == "accumulate":
        assert run().epochs[-1]["batch_size"] == 8
        return
    with refuses("mean over the batch", remedy=("got a sum", "accumulate")):
        run()
