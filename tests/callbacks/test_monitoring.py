"""What other callbacks, loggers and checkpoints see of the evidence."""

import math
from collections.abc import Mapping

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_bayes import Evidence, LaplaceEvidence
from tests.scenarios import Module, cross_entropy, fit, loader, mean_squared_error, mlp, optimizer

KEY = "bayes/log_evidence"


class Driven(Module):
    """Moves its weights to a set size in each epoch: the evidence goes where the test wants it."""

    def __init__(self, sizes):
        super().__init__(mlp(), cross_entropy, optimizer(lr=0.0))
        self.sizes = sizes
        self.start = {name: p.detach().clone() for name, p in self.network.named_parameters()}

    def on_train_epoch_start(self):
        for name, parameter in self.network.named_parameters():
            parameter.data = self.start[name] * self.sizes[self.current_epoch]

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self, batch))


SIZES = [4.0, 2.0, 0.5, 3.0, 5.0, 0.1]


def values(callback):
    return [evidence.log_evidence for _, evidence in callback.history]


def monitored(tmp_path, module, *callbacks, **kwargs):
    module.val_dataloader = loader
    kwargs = {"enable_checkpointing": True, "num_sanity_val_steps": 1} | kwargs
    return fit(tmp_path, module, loader(), *callbacks, **kwargs)


@pytest.mark.parametrize("val_check_interval", [1.0, 0.5])
def test_model_checkpoint(tmp_path, val_check_interval):
    callback = LaplaceEvidence()
    checkpoint = ModelCheckpoint(
        tmp_path, "{epoch}", monitor=KEY, mode="max", save_on_train_epoch_end=val_check_interval < 1 or None
    )
    monitored(
        tmp_path, Driven(SIZES), callback, checkpoint, val_check_interval=val_check_interval, max_epochs=5
    )
    assert len(callback.history) == 5
    best = max(range(5), key=values(callback).__getitem__)
    assert best == 2  # on random labels the smallest network is believed most
    assert checkpoint.best_model_path.endswith(f"epoch={best}.ckpt")
    assert checkpoint.best_model_score.item() == pytest.approx(values(callback)[best], rel=1e-6)


@pytest.mark.parametrize("val_check_interval", [1.0, 0.5])
def test_early_stopping(tmp_path, val_check_interval):
    callback = LaplaceEvidence()
    stopping = EarlyStopping(
        KEY, mode="max", patience=2, check_on_train_epoch_end=val_check_interval < 1 or None
    )
    monitored(
        tmp_path, Driven(SIZES), callback, stopping, val_check_interval=val_check_interval, max_epochs=6
    )
    assert values(callback)[3] < values(callback)[2] > values(callback)[4]
    assert stopping.stopped_epoch == 4
    assert len(callback.history) == 5


def test_every_second_epoch(tmp_path):
    callback = LaplaceEvidence(every_n_epochs=2)
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", monitor=KEY, mode="max", every_n_epochs=2)
    stopping = EarlyStopping(KEY, mode="max", patience=3, strict=False)
    module = Driven([4.0, 3.0, 2.0, 0.5, 2.0, 2.0, 2.0, 2.0])
    monitored(tmp_path, module, callback, checkpoint, stopping, max_epochs=8)
    assert [epoch for epoch, _ in callback.history] == [1, 3, 5]
    assert checkpoint.best_model_path.endswith("epoch=3.ckpt")
    # A skipped epoch keeps the last value: epochs 4, 5 and 6 bring nothing better.
    assert stopping.stopped_epoch == 6


def test_every_key_is_logged_with_its_value(tmp_path):
    callback = LaplaceEvidence(log_key_prefix="evidence-")
    run = fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback)
    evidence = callback.history[0][1]
    logged = {k.removeprefix("evidence-"): v.item() for k, v in run.callback_metrics.items()}
    assert sorted(logged) == [
        "effective_parameters",
        "log_evidence",
        "log_evidence_best_prior",
        "log_evidence_ratio",
        "log_likelihood",
        "log_occam_factor",
        "lower",
        "newton_decrement",
        "prior_optimized",
        "prior_precision",
        "upper",
        "weight_penalty",
    ]
    assert logged == pytest.approx({name: float(getattr(evidence, name)) for name in logged}, rel=1e-6)


def test_keys_of_a_regression(tmp_path):
    run = fit(tmp_path, Module(mlp(1), mean_squared_error), loader("regression"), LaplaceEvidence())
    assert "bayes/noise_variance" in run.callback_metrics
    assert "bayes/log_evidence_ratio" not in run.callback_metrics


def test_two_structures_side_by_side(tmp_path):
    full, diag = LaplaceEvidence("full"), LaplaceEvidence("diag", log_key_prefix="bayes/diag/")
    run = fit(tmp_path, Module(mlp(), cross_entropy), loader(), full, diag)
    assert run.callback_metrics[KEY] == pytest.approx(full.history[0][1].log_evidence, rel=1e-6)
    assert run.callback_metrics["bayes/diag/log_evidence"] == pytest.approx(values(diag)[0], rel=1e-6)
    assert values(full)[0] != values(diag)[0]


def plain(value):
    return isinstance(value, float | int | str | type(None)) or (
        isinstance(value, tuple | Mapping) and all(map(plain, value))
    )


def test_history_holds_plain_values(tmp_path):
    callback = LaplaceEvidence()
    fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback)
    assert all(plain(value) for value in vars(callback.history[0][1]).values())


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Epochs(Callback):
    """Each epoch takes 10 seconds."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_epoch_start(self, trainer, pl_module):
        self.clock.now += 10.0


EVERY_EPOCH = [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "takes", "evaluated"),
    [
        ({}, 3.0, EVERY_EPOCH),
        ({"max_overhead": 1.0}, 3.0, EVERY_EPOCH),
        ({"max_overhead": 0.1}, 3.0, [0, 5]),  # 3 + 3 <= 0.1 * training in the sixth epoch, when it is 60 s
        ({"max_overhead": 0.01}, 3.0, [0]),
        ({}, 15.0, EVERY_EPOCH),
        ({"max_overhead": 10.0}, 15.0, EVERY_EPOCH),
    ],
)
def test_max_overhead(tmp_path, monkeypatch, arguments, takes, evaluated):
    callback, clock = timed_evidence(monkeypatch, takes, **arguments)
    fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback, Epochs(clock), max_epochs=8)
    assert [epoch for epoch, _ in callback.history] == evaluated


def timed_evidence(monkeypatch, takes, **arguments):
    """A callback whose evaluations take so many seconds by a clock, and the clock."""
    clock = Clock()

    class Timed(LaplaceEvidence):
        def _take(self, trainer, take):
            evidence = super()._take(trainer, take)
            clock.now += takes
            return Evidence(**{**vars(evidence), "seconds": takes})

    monkeypatch.setattr("lightning_bayes.callbacks.laplace_evidence.time.monotonic", clock)
    return Timed(**arguments), clock


def test_policy_can_be_overridden(tmp_path):
    class Last(LaplaceEvidence):
        def should_evaluate(self, trainer):
            return trainer.current_epoch + 1 == trainer.max_epochs

    callback = Last()
    fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback, max_epochs=3)
    assert [epoch for epoch, _ in callback.history] == [2]
    assert math.isfinite(values(callback)[0])
