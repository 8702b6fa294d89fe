"""ScalingAdvisor beside a known-good run, with other callbacks' measurements, and what it writes."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bayes import GradientNoiseScale, ScalingAdvisor, Stability
from lightning_bayes.callbacks.measurements import measured
from lightning_bayes.callbacks.trainer.settings import read_configuration
from lightning_bayes.functional import (
    AdamConfiguration,
    Configuration,
    GradientNoise,
    SavedAdvice,
    advise,
)
from lightning_bayes.functional.check import Measurements
from tests.scenarios import Classifier, plain_sgd, shuffled, trainer, two_classes, with_lambda

GOOD = Configuration(0.1, 10, 100, 0.9)  # g = 9


def fit(tmp_path, optimizers, *callbacks, batch_size=10, **kwargs):
    run = trainer(tmp_path, list(callbacks), **kwargs)
    run.fit(Classifier(optimizers), shuffled(batch_size=batch_size))
    return run


def test_a_difference_is_a_warning_at_the_start(tmp_path):
    advisor = ScalingAdvisor(reference=GOOD)
    # g = 0.1 * (100/20 - 1)/0.1 = 4; m' = 1 - 0.1 * 4/9
    with pytest.warns(UserWarning, match=r"g is 4 of SGD, and 9 in the reference.*Any one of.*batch size 10"):
        fit(tmp_path, plain_sgd(momentum=0.9), advisor, batch_size=20)
    (comparison,) = advisor.comparisons
    values = {change.quantity: change.value for change in comparison.restorations}
    assert values == pytest.approx(
        {"learning_rate": 0.225, "batch_size": 10, "momentum": 1 - 0.4 / 9, "dataset_size": 200}
    )


@pytest.mark.parametrize("change", [{"lr": 0.225}, {"momentum": 1 - 0.4 / 9}])
def test_the_change_that_it_names_ends_the_warning(tmp_path, change):
    advisor = ScalingAdvisor(reference=GOOD)
    fit(tmp_path, plain_sgd(**({"momentum": 0.9} | change)), advisor, batch_size=20)  # warnings are errors
    assert not advisor.comparisons[0].differs and advisor.advice == []


def test_a_warm_up_is_compared_at_its_base(tmp_path):
    advisor = ScalingAdvisor(reference=GOOD)
    fit(tmp_path, with_lambda("step", lambda step: min(1.0, step / 5), momentum=0.9), advisor)
    assert not advisor.comparisons[0].differs


def test_at_the_end_the_peak_counts(tmp_path, capsys):
    advisor = ScalingAdvisor(reference=GOOD)
    fit(tmp_path, with_lambda("step", lambda step: 0.5, momentum=0.9), advisor)
    assert advisor.comparisons[0].differs and advisor.comparisons[0].ratio == pytest.approx(0.5)
    assert "Beside the reference" in capsys.readouterr().out


def test_reference_and_target(tmp_path, capsys):
    advisor = ScalingAdvisor(
        target_batch_size=50, reference={"learning_rate": 0.1, "batch_size": 10, "dataset_size": 100}
    )
    fit(tmp_path, plain_sgd(), advisor)
    assert advisor.advice[0].exact.learning_rate == pytest.approx(0.9)
    printed = capsys.readouterr().out
    assert "Scaling advice for SGD" in printed and "the same within 1%" in " ".join(printed.split())


def test_another_kind_of_optimizer_fails_before_training(tmp_path):
    model = Classifier()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="`reference` to be of SGD"):
        trainer(tmp_path, [ScalingAdvisor(reference=AdamConfiguration(1e-3, 10), on_error="raise")]).fit(
            model, shuffled()
        )
    assert all(map(torch.equal, before, model.parameters()))


def test_a_checkpoint_of_an_earlier_run(tmp_path):
    first = fit(tmp_path, plain_sgd(momentum=0.9), ScalingAdvisor(target_batch_size=50))
    first.save_checkpoint(tmp_path / "good.ckpt")
    with pytest.warns(UserWarning, match="good.ckpt"):
        fit(tmp_path, plain_sgd(momentum=0.5), ScalingAdvisor(reference=tmp_path / "good.ckpt"))


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_saved_where_the_run_is_logged(tmp_path, capsys, logger):
    log = logger(tmp_path)
    advisor = ScalingAdvisor(target_batch_size=50)
    fit(tmp_path, plain_sgd(momentum=0.9), advisor, logger=log)
    path = f"{log.log_dir}/scaling_advice.json"
    assert f"Saved: {path}" in capsys.readouterr().out
    with open(path, encoding="utf-8") as file:
        saved = SavedAdvice.from_json(file.read())
    assert saved == SavedAdvice({"SGD": GOOD}, tuple(advisor.advice))
    # And is a reference for the next run.
    fit(tmp_path, plain_sgd(momentum=0.9), ScalingAdvisor(reference=log.log_dir))


def test_nothing_is_saved_without_a_logger(tmp_path, capsys):
    fit(tmp_path, plain_sgd(), ScalingAdvisor(target_batch_size=50))
    assert list(tmp_path.rglob("*.json")) == [] and "Saved" not in capsys.readouterr().out


def test_nothing_is_saved_by_a_rehearsal(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            tmp_path,
            plain_sgd(),
            ScalingAdvisor(target_batch_size=50),
            logger=CSVLogger(tmp_path),
            fast_dev_run=2,
        )
    assert list(tmp_path.rglob("*.json")) == []


def test_two_advisors_have_a_file_each(tmp_path):
    log = CSVLogger(tmp_path)
    fit(
        tmp_path,
        plain_sgd(),
        ScalingAdvisor(target_batch_size=50),
        ScalingAdvisor(target_momentum=0.5),
        logger=log,
    )
    found = sorted(path.name for path in tmp_path.rglob("*.json"))
    assert found == ["scaling_advice-1.json", "scaling_advice.json"]


class WithHyperParameters(Classifier):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 8})


def test_hyper_parameters_join_the_users(tmp_path):
    log = CSVLogger(tmp_path)
    trainer(tmp_path, [ScalingAdvisor(target_batch_size=50)], logger=log).fit(
        WithHyperParameters(), shuffled()
    )
    found = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text())
    assert found["width"] == 8
    assert found["bayes/advice/SGD/present/noise_scale"] == pytest.approx(0.9)
    assert found["bayes/advice/SGD/advised_learning_rate/learning_rate"] == pytest.approx(0.9)
    assert found["bayes/advice/SGD/verdict"] == "doubtful"


@pytest.mark.parametrize("model", [Classifier, WithHyperParameters])
def test_tensorboard_keeps_the_users_hyper_parameters(tmp_path, model):
    def tags(folder, *callbacks):
        log = TensorBoardLogger(tmp_path / folder)
        trainer(tmp_path, list(callbacks), logger=log).fit(model(), shuffled())
        events = EventAccumulator(log.log_dir).Reload()
        return set(events.Tags()["scalars"]), log.hparams

    plain, _ = tags("plain")
    scalars, hparams = tags("advised", ScalingAdvisor(target_batch_size=50))
    assert hparams["bayes/advice/SGD/present/batch_size"] == 10
    # The user's session is not logged a second time; without one, ours is, under a key of our own.
    assert scalars - plain == (
        set() if model is WithHyperParameters else {"bayes/advice/SGD/present/noise_scale"}
    )


class Refusing(CSVLogger):
    def log_hyperparams(self, params=None):
        if params and any("advice" in key for key in params):
            raise RuntimeError("Changing param values is not allowed")


def test_a_logger_that_refuses_does_not_end_the_fit(tmp_path):
    advisor = ScalingAdvisor(target_batch_size=50)
    with pytest.warns(
        UserWarning, match="Refusing did not take the advice.*Changing param values.*scaling_advice.json"
    ):
        fit(tmp_path, plain_sgd(), advisor, logger=Refusing(tmp_path))
    assert advisor.advice


def test_curvature_of_a_stability_callback(tmp_path):
    stability, advisor = Stability(), ScalingAdvisor(target_batch_size=50)
    run = fit(tmp_path, plain_sgd(momentum=0.9), stability, advisor, max_epochs=3)
    (found,) = [check for check in advisor.advice[0].checks if check.name == "stability"]
    h = max(reading.largest_eigenvalue for _, reading in stability.history)
    assert h > stability.reading.largest_eigenvalue  # the sharpest, not the last
    assert measured(run) == Measurements(None, h)
    assert found.limit == pytest.approx(2 * 1.9 / h) and found.passed is not None
    assert measured(trainer(tmp_path, [Stability()])) == Measurements()


class Measured(GradientNoiseScale):
    """Stands for one that has measured this."""

    estimate = None

    def __init__(self, estimate):
        super().__init__(every_n_steps=10**9)
        self.estimate = estimate

    def on_train_epoch_end(self, trainer, pl_module):
        """Logs nothing, and does not warn of noise that it was given."""


@pytest.mark.parametrize(
    ("noise", "passed"),
    [(300.0, True), (20.0, False), (math.nan, None), (-3.0, None), (0.0, None), (math.inf, None)],
)
def test_gradient_noise_of_a_callback(tmp_path, noise, passed):
    advisor = ScalingAdvisor(target_batch_size=50)
    fit(tmp_path, plain_sgd(), Measured(GradientNoise(1.0, 1.0, noise)), advisor)
    (found,) = [check for check in advisor.advice[0].checks if check.name == "gradient_noise_scale"]
    assert found.passed is passed
    assert measured(trainer(tmp_path, [Measured(None)])) == Measurements()


def test_gradient_noise_that_was_measured(tmp_path):
    noise, advisor = GradientNoiseScale(every_n_steps=1), ScalingAdvisor(target_batch_size=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels are random: there may be no gradient but noise
        run = fit(tmp_path, plain_sgd(), noise, advisor, max_epochs=2)
    found, expected = measured(run).gradient_noise_scale, noise.estimate.noise_scale
    assert found == expected or (math.isnan(found) and math.isnan(expected))
    (check,) = [check for check in advisor.advice[0].checks if check.name == "gradient_noise_scale"]
    assert (check.passed is None) is math.isnan(found)


def test_ema_decay(tmp_path):
    advisor = ScalingAdvisor(target_batch_size=50, ema_decay=0.99)
    fit(tmp_path, plain_sgd(), advisor)
    (found,) = [check for check in advisor.advice[0].checks if check.name == "weight_ema"]
    assert found.limit == pytest.approx(0.99**5)


@pytest.mark.parametrize(("accumulate", "expected"), [(1, 8), (2, 8), (8, None)])
def test_what_the_trainer_has_to_do(tmp_path, accumulate, expected):
    advisor = ScalingAdvisor(target_batch_size=80)
    fit(tmp_path, plain_sgd(), advisor, accumulate_grad_batches=accumulate)
    (found,) = [check for check in advisor.advice[0].checks if check.name == "trainer"]
    assert found.passed is (expected is None)
    if expected is not None:
        assert f"accumulate_grad_batches={expected}" in found.sentence


@pytest.mark.parametrize(
    ("optimizer", "accumulate"),
    [
        ({"lr": 0.1}, 2),
        ({"lr": 0.03, "momentum": 0.9, "dampening": 0.3}, 3),
        ({"lr": 0.02, "momentum": 0.8, "nesterov": True}, 1),
    ],
)
def test_round_trip_through_two_trainers(tmp_path, optimizer, accumulate):
    """The second run does what the first one's advice says, and has its noise."""
    first = ScalingAdvisor(target_batch_size=40)
    fit(tmp_path, plain_sgd(**optimizer), first, batch_size=5, accumulate_grad_batches=accumulate)
    (advice,) = first.advice
    (how,) = [check for check in advice.checks if check.name == "trainer"]
    accumulated = int(how.value)
    second = ScalingAdvisor(reference=advice.present)
    fit(
        tmp_path,
        plain_sgd(**(optimizer | {"lr": advice.exact.learning_rate})),
        second,
        batch_size=40 // accumulated,
        accumulate_grad_batches=accumulated,
    )
    (comparison,) = second.comparisons
    assert comparison.present.batch_size == 40
    assert comparison.ratio == pytest.approx(1, rel=1e-9)


def fake_trainer(batch_size, accumulate, replicas, options):
    """What `read_configuration` reads, for replicas that this machine does not have."""
    strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": replicas, "rank": 0})
    examples = two_classes(1000)
    data = DataLoader(examples, batch_size, sampler=DistributedSampler(examples, replicas, 0))
    return SimpleNamespace(
        lightning_module=SimpleNamespace(automatic_optimization=True),
        train_dataloader=data,
        accumulate_grad_batches=accumulate,
        num_training_batches=len(data),
        fast_dev_run=0,
        distributed_sampler_kwargs=strategy.distributed_sampler_kwargs,
        strategy=strategy,
        optimizers=[torch.optim.SGD([torch.zeros(1, requires_grad=True)], **options)],
    )


@given(
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(1e-4, 1.0),
    st.floats(0.01, 0.99),
    st.floats(0.0, 0.9),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_round_trip_over_replicas(batch, accumulate, replicas, rate, momentum, dampening, device, k, others):
    options = {"lr": rate, "momentum": momentum, "dampening": dampening}
    (present,) = read_configuration(fake_trainer(batch, accumulate, replicas, options)).groups
    assert present.configuration.batch_size == batch * accumulate * replicas
    advised = advise(present.configuration, target_batch_size=device * k * others).exact
    options["lr"] = advised.learning_rate
    (after,) = read_configuration(fake_trainer(device, k, others, options)).groups
    expected = rate * (1000 / (batch * accumulate * replicas) - 1) * (1 - dampening) / (1 - momentum)
    assert after.configuration.noise_scale == pytest.approx(expected, rel=1e-9)


def test_file_is_json(tmp_path):
    log = CSVLogger(tmp_path)
    fit(tmp_path, plain_sgd(), ScalingAdvisor(target_batch_size=100), logger=log)
    with open(f"{log.log_dir}/scaling_advice.json", encoding="utf-8") as file:
        document = json.load(file)
    assert document["advice"][0]["verdict"] == "impossible"
