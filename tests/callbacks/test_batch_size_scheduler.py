"""Batches that grow in place of a decay, held against SGD written out by hand."""

import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import lr_scheduler as schedulers

from lightning_bayes import BatchSizeScheduler, ScalingAdvisor, SGDNoiseScale
from lightning_bayes.callbacks.trainer.optimizers import sgd_steps
from lightning_bayes.callbacks.trainer.settings import read_configuration
from tests.scenarios import (
    BATCH,
    NUM_ROWS,
    Regression,
    RegressionData,
    column,
    grow,
    momentum_sgd,
    sgd_by_hand,
    weights,
    with_scheduler,
)

METHODS = ("accumulate", "reload")
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums in another order
# N/10 is 9: two batches. The factors here need more.
WIDE = {"max_batch_size": 48}


@pytest.mark.parametrize("method", METHODS)
def test_batch_grows_at_the_milestones(tmp_path, method):
    net = grow(tmp_path, [2, 4], options={"factor": 3, "method": method, **WIDE})
    assert column(net, "batch_size") == [4, 4, 12, 12, 36, 36]
    made_up = {"accumulate": ([1, 1, 3, 3, 9, 9], [4] * 6), "reload": ([1] * 6, [4, 4, 12, 12, 36, 36])}
    assert (column(net, "accumulation"), column(net, "loader")) == made_up[method]
    assert column(net, "learning_rate") == [0.1] * 6
    assert column(net, "steps") == [24, 48, 56, 64, 67, 70]


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_larger_batches(tmp_path, method):
    net = grow(tmp_path, {2: 3, 4: 2}, options={"method": method, **WIDE})
    expected = sgd_by_hand([(4, 0.1)] * 2 + [(12, 0.1)] * 2 + [(24, 0.1)] * 2)
    torch.testing.assert_close(weights(net), expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_learning_rate_takes_what_the_batch_cannot(tmp_path, method):
    # 12 wanted, 8 to be had: 2/3 of the learning rate. Then 24 wanted: 1/3.
    net = grow(tmp_path, {2: 3, 4: 2}, options={"method": method, "max_batch_size": 8})
    assert column(net, "batch_size") == [4, 4, 8, 8, 8, 8]
    assert column(net, "learning_rate") == pytest.approx(
        [0.1, 0.1, 0.2 / 3, 0.2 / 3, 0.1 / 3, 0.1 / 3], rel=1e-5
    )
    expected = sgd_by_hand([(4, 0.1)] * 2 + [(8, 0.2 / 3)] * 2 + [(8, 0.1 / 3)] * 2)
    torch.testing.assert_close(weights(net), expected, **CLOSE)
    assert net.run.optimizers[0].param_groups[0]["lr"] == 0.1


def test_a_tenth_of_the_data_is_the_limit_unless_given(tmp_path):
    assert column(grow(tmp_path, [1], max_epochs=2), "batch_size") == [4, 8]  # 20 wanted, 9 allowed


def test_a_batch_that_is_not_whole_is_rounded_down_and_the_learning_rate_corrected(tmp_path):
    net = grow(tmp_path, [1], options={"factor": 2.5, **WIDE}, max_epochs=2)
    assert (column(net, "batch_size"), column(net, "learning_rate")) == ([4, 8], [0.1, pytest.approx(0.08)])
    net = grow(tmp_path, [1], options={"factor": 2.5, "method": "reload", **WIDE}, max_epochs=2)
    assert (column(net, "batch_size"), column(net, "learning_rate")) == ([4, 10], [0.1, 0.1])


def test_accumulation_of_the_trainer_is_the_start(tmp_path):
    net = grow(tmp_path, [1], options={"factor": 3, **WIDE}, max_epochs=2, accumulate_grad_batches=2)
    assert column(net, "accumulation") == [2, 6]
    assert net.run.accumulate_grad_batches == 2  # as it was


def test_memory_limit_reloads_and_accumulates(tmp_path):
    net = grow(tmp_path, {1: 3, 2: 2}, options={"max_device_batch_size": 12, **WIDE}, max_epochs=3)
    assert column(net, "batch_size") == [4, 12, 24]
    assert (column(net, "loader"), column(net, "accumulation")) == ([4, 12, 12], [1, 1, 2])
    torch.testing.assert_close(weights(net), sgd_by_hand([(4, 0.1), (12, 0.1), (24, 0.1)]), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_validation_stays_as_it_was(tmp_path, method):
    net = grow(tmp_path, [2, 4], options={"factor": 3, "method": method, **WIDE})
    # At every epoch, on batches of the size that the DataModule was given.
    assert net.validated == [(epoch, BATCH) for epoch in range(6)]
    assert net.run.reload_dataloaders_every_n_epochs == 0


@pytest.mark.parametrize("interval", [0.25, 6])
def test_validation_within_epochs_stays_as_it_was(tmp_path, interval):
    options = {"factor": 3, "max_device_batch_size": 48, **WIDE}  # would reload
    net = grow(tmp_path, [1, 2], options=options, max_epochs=3, val_check_interval=interval)
    assert net.validated == [(epoch, BATCH) for epoch in range(3) for _ in range(4)]
    assert (column(net, "loader"), column(net, "accumulation")) == ([4, 4, 4], [1, 3, 9])


@pytest.mark.parametrize("method", METHODS)
def test_noise_scale_is_that_of_the_decayed_run(tmp_path, method):
    steps = with_scheduler(lambda optimizer: schedulers.MultiStepLR(optimizer, [2, 4], 1 / 3))
    decayed = grow(tmp_path, None, SGDNoiseScale(), net=Regression(steps))
    options = {"method": method, "rule": "exact", **WIDE}
    # SGDNoiseScale reads it in time, before or after in the list.
    listed = grow(tmp_path, [2, 4], SGDNoiseScale(), options={"factor": 3, **options})
    wrapped = grow(tmp_path, "lr_scheduler", SGDNoiseScale(), net=Regression(steps), options=options)
    expected = pytest.approx(column(decayed, "noise_scale"), rel=1e-5)
    assert column(listed, "noise_scale") == column(wrapped, "noise_scale") == expected
    assert column(listed, "batch_size") == column(wrapped, "batch_size") == [4, 4, 12, 12, 36, 36]


def warm_up(epoch):
    return (0.25, 0.5, 1.0, 0.5, 0.25, 0.5)[min(epoch, 5)]


MADE = {
    "StepLR": lambda optimizer: schedulers.StepLR(optimizer, 2, 1 / 3),
    "MultiStepLR": lambda optimizer: schedulers.MultiStepLR(optimizer, [1, 3], 0.3),
    "ExponentialLR": lambda optimizer: schedulers.ExponentialLR(optimizer, 0.7),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, warm_up),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 6, 1e-3),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("method", METHODS)
def test_decays_of_a_scheduler_become_batches(tmp_path, method, name):
    plain = grow(tmp_path, None, net=Regression(with_scheduler(MADE[name])))
    net = grow(
        tmp_path,
        "lr_scheduler",
        net=Regression(with_scheduler(MADE[name])),
        options={"method": method, **WIDE},
    )
    # The scheduler goes its own way, whichever of torch's it is.
    assert net.scheduled == plain.scheduled
    rates = [rate for (rate,) in plain.scheduled]
    phases, peak = [], 0.0
    for rate in rates:
        peak = max(peak, rate)
        batch = min(4 * peak / rate, 48) + 1e-9
        batch = int(batch // 4 * 4 if method == "accumulate" else batch)
        phases.append((batch, rate * batch / 4))
    assert column(net, "batch_size") == [batch for batch, _ in phases]
    assert column(net, "learning_rate") == pytest.approx([rate for _, rate in phases], rel=1e-5)
    assert len({batch for batch, _ in phases}) > 1
    if method == "reload":  # where N is no multiple of B, Lightning weighs the last accumulation less
        torch.testing.assert_close(weights(net), sgd_by_hand(phases), **CLOSE)


def test_warm_up_is_left_alone_and_a_rise_shrinks_the_batch(tmp_path):
    net = grow(tmp_path, "lr_scheduler", net=Regression(with_scheduler(MADE["LambdaLR"])), options=WIDE)
    assert column(net, "batch_size") == [4, 4, 4, 8, 16, 8]
    assert column(net, "learning_rate") == pytest.approx([0.025, 0.05, 0.1, 0.1, 0.1, 0.1])


def test_plateau(tmp_path):
    plateau = partial(schedulers.ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9, mode="max")
    configure = with_scheduler(plateau, monitor="val_loss")
    plain = grow(tmp_path, None, net=Regression(configure), max_epochs=4)
    net = grow(tmp_path, "lr_scheduler", net=Regression(configure), options=WIDE, max_epochs=4)
    assert net.scheduled == plain.scheduled == [[0.1], [0.1], [0.05], [0.025]]
    torch.testing.assert_close(weights(net), sgd_by_hand([(4, 0.1), (4, 0.1), (8, 0.1), (16, 0.1)]), **CLOSE)


def test_groups_that_decay_differently_go_by_the_slowest(tmp_path):
    def configure(module):
        first, _, last = module.network
        optimizer = torch.optim.SGD(
            [{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.2}], 0.1
        )
        schedule = schedulers.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 0.25**e])
        return [optimizer], [schedule]

    seen = []

    class Look(SGDNoiseScale):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            logged = trainer.callback_metrics
            keys = ("learning_rate", "noise_scale")
            seen.append([logged[f"bayes/{key}-SGD/pg{group}"].item() for key in keys for group in (1, 2)])

    growing = BatchSizeScheduler("lr_scheduler", rule="exact", **WIDE)
    grow(tmp_path, None, growing, Look(), net=Regression(configure), max_epochs=2)
    # Grown to 8. g is that of the decayed groups: 0.05 and 0.05 at B = 4.
    g = 0.05 * (NUM_ROWS / 4 - 1)
    rate = g / (NUM_ROWS / 8 - 1)
    assert seen[1] == pytest.approx([rate, rate, g, g], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedules_in_steps_end_when_they_would_have(tmp_path, method, accumulate):
    def configure(module):
        optimizer = momentum_sgd(module)
        total = module.trainer.estimated_stepping_batches
        schedule = schedulers.OneCycleLR(optimizer, 0.1, total_steps=total + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    kwargs = {"accumulate_grad_batches": accumulate, "max_epochs": 4}
    plain = grow(tmp_path, None, net=Regression(configure), **kwargs)
    options = {"method": method, "factor": 3, **WIDE}
    net = grow(
        tmp_path, {1: 3, 2: 1.5}, net=Regression(configure), options={**options, "factor": None}, **kwargs
    )
    assert net.global_step < plain.global_step
    assert net.scheduled == plain.scheduled
    ends = [run.run.lr_scheduler_configs[0].scheduler.last_epoch for run in (net, plain)]
    assert ends == [plain.global_step] * 2


def test_adam_by_its_own_rule(tmp_path):
    def configure(module):
        return torch.optim.Adam(module.parameters(), lr=0.01)

    with pytest.warns(UserWarning, match="k squared times"):
        net = grow(tmp_path, [1], options={"factor": 2, **WIDE}, net=Regression(configure), max_epochs=2)
    assert column(net, "batch_size") == [4, 8]
    net = grow(
        tmp_path, [1], options={"factor": 2, "rule": "sqrt", **WIDE}, net=Regression(configure), max_epochs=2
    )
    assert column(net, "batch_size") == [4, 16]
    with pytest.warns(UserWarning, match="is for Adam-like"):
        grow(tmp_path, [], options={"rule": "sqrt"}, max_epochs=1)


def test_a_step_that_is_skipped_does_not_mislead_the_scheduler(tmp_path):
    class Skipping(Regression):
        """Skips the last step of each epoch, as a GradScaler does after an overflow."""

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            if batch_idx == 23:
                optimizer_closure()
            else:
                optimizer.step(closure=optimizer_closure)

    configure = with_scheduler(MADE["StepLR"])
    options = {"max_batch_size": 8}
    net = grow(tmp_path, "lr_scheduler", net=Skipping(configure), options=options)
    assert net.scheduled == grow(tmp_path, None, net=Regression(configure)).scheduled


def test_other_callbacks_read_the_learning_rate_of_the_step_at_any_time(tmp_path):
    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            groups = read_configuration(trainer).groups
            (step,) = sgd_steps(trainer)
            assert step.learning_rate == groups[0].configuration.learning_rate
            seen.append(step.learning_rate)

    seen = []
    grow(tmp_path, [1], Look(), options={"factor": 4, "max_batch_size": 8}, max_epochs=2)
    assert sorted(set(seen)) == pytest.approx([0.05, 0.1])


def test_mixed_precision_whose_steps_lie_outside_the_closure(tmp_path):
    class Single(Regression):
        def __init__(self, configure):
            super().__init__(configure)
            self.network.float()

        def training_step(self, batch, batch_idx):
            return super().training_step([part.float() for part in batch], batch_idx)

        def validation_step(self, batch, batch_idx):
            pass

    def plugin():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**30))

    configure = with_scheduler(MADE["StepLR"])
    options = {"max_batch_size": 8}
    plain = grow(tmp_path, None, SGDNoiseScale(), net=Single(configure), plugins=plugin())
    net = grow(
        tmp_path, "lr_scheduler", SGDNoiseScale(), net=Single(configure), options=options, plugins=plugin()
    )
    # The first scale overflows, and some steps are skipped: schedules go on as they do without growth.
    assert net.run.precision_plugin.scaler.get_scale() < 2.0**30
    assert net.scheduled == plain.scheduled
    rates = [0.1, 0.1, 0.2 / 3, 0.2 / 3, 0.2 / 9, 0.2 / 9]
    assert column(net, "learning_rate") == pytest.approx(rates, rel=1e-5)
    noise = [
        rate * (NUM_ROWS / batch - 1) / 0.1 for rate, batch in zip(rates, [4, 4, 8, 8, 8, 8], strict=True)
    ]
    assert column(net, "noise_scale") == pytest.approx(noise, rel=1e-5)


def test_hyper_parameters_of_the_datamodule_are_not_changed(tmp_path):
    class Saved(RegressionData):
        def __init__(self, batch_size=BATCH):
            super().__init__(batch_size)
            self.save_hyperparameters()

        def train_dataloader(self):
            self.batch_size = self.hparams.batch_size
            loader = super().train_dataloader()
            sizes.append((loader.batch_size, self.batch_size))
            return loader

    sizes, data = [], Saved()
    net = grow(tmp_path, [1], options={"method": "reload", **WIDE}, data=data, max_epochs=3)
    assert column(net, "loader") == [4, 20, 20]
    assert (data.batch_size, data.hparams.batch_size) == (4, 4)
    assert "train_dataloader" not in vars(data)
    # Loaded, tried twice, and made anew once: nothing is loaded again in the third epoch.
    assert [size for size, _ in sizes] == [4, 4, 8, 20]


def test_is_left_behind_by_an_exception(tmp_path):
    data, net = RegressionData(), Regression(crash=60)
    with pytest.raises(RuntimeError, match="power failure"):
        grow(tmp_path, [1], net=net, data=data, options={"max_batch_size": 4, "method": "reload"})
    assert "train_dataloader" not in vars(data)
    assert net.trainer.accumulate_grad_batches == 1
    assert net.trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    assert not net.trainer.optimizers[0]._optimizer_step_pre_hooks


def test_a_second_fit_begins_anew(tmp_path):
    growing = BatchSizeScheduler([1], **WIDE)
    for batch_size in (4, 8):
        net = grow(tmp_path, None, growing, data=RegressionData(batch_size), max_epochs=2)
        assert column(net, "batch_size") == [batch_size, 5 * batch_size]


def test_says_what_it_will_do_and_when_it_cannot(tmp_path, caplog):
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)  # whether or not Lightning's messages reach the root
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        grow(tmp_path, [2, 4], options={"factor": 3, "max_batch_size": 12})
    logger.removeHandler(caplog.handler)
    said = list(dict.fromkeys(message for message in caplog.messages if "BatchSizeScheduler" in message))
    assert said[0] == (
        "BatchSizeScheduler: B = 4, 12 from epoch 2, 12 from epoch 4 with the learning rate / 3."
        " 80 optimizer steps in 6 epochs, in place of 144."
    )
    assert len(said) == 2 and said[1].startswith("BatchSizeScheduler: from epoch 4 on the batch cannot take")


def test_warns_of_max_steps(tmp_path):
    with pytest.warns(UserWarning, match="`max_steps=30` counts optimizer steps"):
        grow(tmp_path, [1], max_steps=30)


def test_advice_is_for_the_batch_at_the_peak(tmp_path):
    advisor = ScalingAdvisor(target_batch_size=24)
    grow(tmp_path, [1], advisor, options={"factor": 2, **WIDE}, max_epochs=2)
    (advice,) = advisor.advice
    assert (advice.present.batch_size, advice.present.learning_rate) == (8, 0.1)
