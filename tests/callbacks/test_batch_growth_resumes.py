"""A run that breaks down in mid-schedule and is resumed is, bit for bit, the run that did not."""

import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_bayes import BatchSizeScheduler, SGDNoiseScale
from tests.scenarios import (
    NUM_ROWS,
    Regression,
    RegressionData,
    column,
    grow,
    momentum_sgd,
    rows,
    same,
    trainer,
    weights,
    with_scheduler,
)

pytestmark = [
    # A run that goes on writes into the folder of the run that it resumes.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # Lightning takes any number of steps that this epoch's do not divide for one within an epoch.
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning"
    ),
]

LISTED = {2: 3, 3: 2.5}  # 4, 12, then 28 or 30 examples with 0.8 or more of the learning rate
STEPS = with_scheduler(lambda optimizer: schedulers.StepLR(optimizer, 2, 0.4))
CYCLE = with_scheduler(
    lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=150, pct_start=0.1), interval="step"
)
AT_EPOCH_END = {"save_on_train_epoch_end": True}
AT_VALIDATION = {"save_on_train_epoch_end": False}
CASES = {
    "listed": (LISTED, momentum_sgd, "accumulate"),
    "listed, reload": (LISTED, momentum_sgd, "reload"),
    "StepLR": ("lr_scheduler", STEPS, "accumulate"),
    "StepLR, reload": ("lr_scheduler", STEPS, "reload"),
    "OneCycleLR": ("lr_scheduler", CYCLE, "accumulate"),
    "OneCycleLR, reload": ("lr_scheduler", CYCLE, "reload"),
    "listed over OneCycleLR": (LISTED, CYCLE, "accumulate"),
}


def run(tmp_path, case, crash=None, ckpt_path=None, checkpoint=AT_EPOCH_END, data=None, epochs=6):
    """The module after fit, or after the breakdown, and where the last checkpoint is."""
    schedule, configure, method = CASES[case]
    growing = BatchSizeScheduler(schedule, method=method, max_batch_size=30)
    saving = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, **checkpoint)
    module = Regression(configure, crash)
    callbacks = [SGDNoiseScale(), growing, saving]
    module.run = trainer(
        tmp_path, callbacks, max_epochs=epochs, enable_checkpointing=True, limit_val_batches=2
    )
    loaders = {"datamodule": data or RegressionData(shuffle=True)}
    if crash is None:
        module.run.fit(module, **loaders, ckpt_path=ckpt_path)
    else:
        with pytest.raises(RuntimeError, match="power failure"):
            module.run.fit(module, **loaders, ckpt_path=ckpt_path)
    return module, saving.best_model_path or saving.last_model_path


def left_behind(module):
    trained = module.run
    return {
        "weights": weights(module),
        "optimizer": trained.optimizers[0].state_dict(),
        "schedulers": [dict(config.scheduler.state_dict()) for config in trained.lr_scheduler_configs],
        "steps": trained.global_step,
    }


def differences(one, other):
    one, other = left_behind(one), left_behind(other)
    return [key for key in one if not same(one[key], other[key])]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [AT_EPOCH_END, AT_VALIDATION], ids=["epoch end", "validation"])
@pytest.mark.parametrize("case", CASES)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, case, checkpoint):
    whole, _ = run(tmp_path / "whole", case, checkpoint=checkpoint)
    assert len(set(column(whole, "batch_size"))) > 1
    per_epoch = [math.ceil(NUM_ROWS / size) for size in column(whole, "loader")]
    # In the epoch after the batch cannot grow further; checkpoints of all epochs before it are there.
    broken, last = run(tmp_path / "broken", case, crash=sum(per_epoch[:5]) + 1, checkpoint=checkpoint)
    assert len(broken.epochs) == 5
    saved = {int(re.search(r"epoch=(\d+)", path.name)[1]): path for path in Path(last).parent.iterdir()}
    for epoch in (1, 2, 4):  # the last of its batch size, the first, and when the batch cannot grow further
        resumed, _ = run(tmp_path / "broken", case, ckpt_path=saved[epoch], checkpoint=checkpoint)
        assert differences(resumed, whole) == []
        left = 5 - epoch
        assert resumed.epochs[-left:] == whole.epochs[-left:]
        assert resumed.validated[-left:] == whole.validated[-left:]


class Resumable(DataLoader):
    """Goes on from where it was, as Lightning asks of loaders that are resumed within an epoch."""

    position, start = 0, 0

    def __iter__(self):
        first, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= first:
                self.position = index + 1
                yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.start = state_dict["position"]


class ResumableData(RegressionData):
    def train_dataloader(self):
        return Resumable(rows(), self.batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["listed", "listed, reload", "StepLR", "OneCycleLR", "OneCycleLR, reload"])
def test_resumed_within_an_epoch(tmp_path, case):
    whole, _ = run(tmp_path / "whole", case, data=ResumableData())
    steps = column(whole, "steps")
    for step in (steps[1] + 2, steps[2] + 1):
        saving = {"every_n_train_steps": step}
        folder = tmp_path / str(step)
        run(folder, case, data=ResumableData(), checkpoint=saving, epochs=5)
        (saved,) = folder.glob(f"*step={step}.ckpt")
        resumed, _ = run(folder, case, data=ResumableData(), checkpoint=saving, ckpt_path=saved)
        assert differences(resumed, whole) == []


def test_checkpoint_holds_the_learning_rate_of_the_scheduler(tmp_path):
    plain = grow(tmp_path, None, net=Regression(STEPS), max_epochs=4)
    _, saved = run(tmp_path, "StepLR", epochs=4)
    (state,) = torch.load(saved)["optimizer_states"]
    assert state["param_groups"][0]["lr"] == plain.run.optimizers[0].param_groups[0]["lr"]
    # It serves a run without the callback.
    module = Regression(STEPS)
    trainer(tmp_path, [], max_epochs=5).fit(module, datamodule=RegressionData(), ckpt_path=saved)
    assert module.scheduled == [[pytest.approx(0.1 * 0.4**2)]]


@pytest.mark.parametrize("case", ["listed", "listed, reload"])
def test_a_run_begun_without_it_takes_the_batch_of_its_epoch(tmp_path, case):
    saving = ModelCheckpoint(tmp_path, "{epoch}", **AT_EPOCH_END)
    grow(tmp_path, None, saving, max_epochs=3, enable_checkpointing=True)
    resumed, _ = run(tmp_path, case, ckpt_path=saving.best_model_path)
    assert column(resumed, "batch_size")[0] == 28  # made of batches of 4 until the next epoch
    assert column(resumed, "loader")[-1] == (30 if "reload" in case else 4)


def test_resumed_on_other_batches_keeps_the_noise(tmp_path):
    whole, _ = run(tmp_path / "whole", "listed")
    _, saved = run(tmp_path, "listed", epochs=3)
    resumed, _ = run(tmp_path, "listed", ckpt_path=saved, data=RegressionData(batch_size=3, shuffle=True))
    # 3 x 10 = 30 in place of 4 x 7 = 28, and so much more of the learning rate: lr/B as before
    assert column(resumed, "batch_size")[-1] == 30
    ratios = [run.epochs[-1]["learning_rate"] / run.epochs[-1]["batch_size"] for run in (resumed, whole)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)
