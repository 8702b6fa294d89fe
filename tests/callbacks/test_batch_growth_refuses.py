"""Wrong use of BatchSizeScheduler is found out before the first step, with the remedy."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, IterableDataset

from lightning_bayes import BatchSizeScheduler

from .growth_models import BATCH, Data, N, Net, column, dataset, fit, scheduled, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"schedule": "StepLR"}, "`schedule` to be epochs such as .* but got 'StepLR'"),
        ({"schedule": 3}, "`schedule`"),
        (
            {"schedule": [0]},
            "at least 1 .the batch size of epoch 0 is the one that you start with., but got 0",
        ),
        ({"schedule": [1.5]}, "but got 1.5"),
        ({"schedule": [True]}, "but got True"),
        ({"schedule": [2, 2]}, "to differ"),
        ({"schedule": [2], "factor": 0.2}, "`factor` to be a number of at least 1.* but got 0.2"),
        ({"schedule": [2], "factor": math.nan}, "`factor`"),
        ({"schedule": {2: "5"}}, "`factor`"),
        ({"schedule": {2: 5}, "factor": 5}, "no argument `factor` beside a mapping"),
        ({"schedule": "lr_scheduler", "factor": 5}, 'no argument `factor` beside "lr_scheduler"'),
        ({"schedule": [2], "max_batch_size": 0}, "`max_batch_size`"),
        ({"schedule": [2], "max_device_batch_size": 1.5}, "`max_device_batch_size`"),
        ({"schedule": [2], "dataset_size": -1}, "`dataset_size`"),
        ({"schedule": [2], "method": "grow"}, "`method`"),
        ({"schedule": [2], "rule": "square"}, "`rule`"),
        ({"schedule": [2], "log_key_prefix": None}, "`log_key_prefix`"),
    ],
)
def test_at_construction(arguments, match):
    with pytest.raises(ValueError, match=match):
        BatchSizeScheduler(arguments.pop("schedule"), **arguments)


class Cached(Data):
    def setup(self, stage):
        self.loader = super().train_dataloader()

    def train_dataloader(self):
        return self.loader


class Fixed(Data):
    def train_dataloader(self):
        return DataLoader(dataset(), 2)


class Nameless(Data):
    def __init__(self):
        super().__init__()
        del self.batch_size

    def train_dataloader(self):
        return DataLoader(dataset(), BATCH)

    val_dataloader = train_dataloader


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


RELOAD = {"method": "reload"}
PLATEAU = scheduled(schedulers.ReduceLROnPlateau, monitor="val_loss")


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"net": Manual}, "automatic_optimization = False"),
        (
            {"callbacks": [GradientAccumulationScheduler({1: 2})]},
            "got GradientAccumulationScheduler beside it",
        ),
        ({"callbacks": [BatchSizeScheduler([3])]}, "got BatchSizeScheduler beside it"),
        ({"schedule": "lr_scheduler"}, "`configure_optimizers` returned none"),
        ({"options": {"max_batch_size": N + 1}}, "`max_batch_size` to be at most `dataset_size`"),
        ({"options": {"max_batch_size": N, "rule": "exact"}}, "at full batch the noise scale is 0"),
        ({"options": {"max_device_batch_size": 2}}, "at least the batch of the loader to start with"),
        ({"options": RELOAD, "data": Cached}, "at batch_size=8 it returned a loader with 4"),
        ({"options": RELOAD, "data": Fixed}, "at batch_size=4 it returned a loader with 2"),
        ({"options": RELOAD, "data": Nameless}, "has no whole number `batch_size`"),
        ({"options": RELOAD, "limit_train_batches": 3}, "limit_train_batches=3"),
        ({"options": RELOAD, "overfit_batches": 0.5}, "overfit_batches"),
        ({"options": RELOAD, "val_check_interval": 6}, "val_check_interval=6"),
        ({"options": RELOAD, "val_check_interval": 0.5}, "val_check_interval=0.5"),
        (
            {"options": RELOAD, "schedule": "lr_scheduler", "net": partial(Net, PLATEAU)},
            'ReduceLROnPlateau with method="reload"',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:You have overridden `train_dataloader`:UserWarning")
def test_before_the_first_step(tmp_path, setting, match):
    setting = dict(setting)
    net, data = setting.pop("net", Net)(), setting.pop("data", Data)()
    callbacks, schedule = setting.pop("callbacks", []), setting.pop("schedule", [1])
    before = weights(net)
    with pytest.raises(ValueError, match=match):
        fit(tmp_path, schedule, *callbacks, net=net, data=data, **setting)
    assert net.batches == 0 and torch.equal(weights(net), before)
    assert "train_dataloader" not in vars(data)


def test_reload_needs_a_datamodule(tmp_path):
    with pytest.raises(ValueError, match="come from no LightningDataModule"):
        trainer(tmp_path, BatchSizeScheduler([1], method="reload")).fit(Net(), DataLoader(dataset(), BATCH))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(dataset())


def test_a_stream_needs_its_size(tmp_path):
    data = DataLoader(Endless(), BATCH)
    with pytest.raises(ValueError, match=r"dataset_size=.* \(SGDNoiseScale, BatchSizeScheduler\)"):
        trainer(tmp_path, BatchSizeScheduler([1])).fit(Net(), data)
    net = Net()
    trainer(tmp_path, BatchSizeScheduler([1], dataset_size=200), max_epochs=2).fit(net, data)
    assert column(net, "batch_size") == [4, 20]
    assert column(net, "accumulation") == [1, 5]


def test_deepspeed_is_refused_by_name(tmp_path):
    class DeepSpeedStrategy(type(trainer(tmp_path).strategy)):
        pass

    with pytest.raises(ValueError, match="DeepSpeedStrategy accumulates"):
        run = trainer(tmp_path, BatchSizeScheduler([1]), strategy=DeepSpeedStrategy("cpu"))
        run.fit(Net(), DataLoader(dataset(), BATCH))


@pytest.mark.parametrize("method", ["accumulate", "reload"])
def test_a_summed_loss_grows_with_the_batch_of_the_loader(tmp_path, method):
    class Summed(Net):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.network(batch[0]), batch[1], reduction="sum")

    def run():
        return fit(tmp_path, [1], net=Summed(), options={"factor": 2, "method": method}, max_epochs=2)

    if method == "accumulate":
        assert run().epochs[-1]["batch_size"] == 8
        return
    with pytest.raises(ValueError, match=r"mean over the batch.*got a sum.*accumulate"):
        run()
