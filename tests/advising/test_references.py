"""A known-good run is read from whatever it left behind."""

import re

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_bayes import ScalingAdvisor, SGDNoiseScale
from lightning_bayes.advice.optimizer_groups import ParameterGroup
from lightning_bayes.advice.references import comparisons_with, read_reference
from lightning_bayes.functional import AdamConfiguration, Configuration, SavedAdvice
from tests.refusals import refuses
from tests.scenarios import Classifier, plain_sgd, shuffled, trainer, two_groups, with_lambda

GOOD = Configuration(0.1, 10, 100, 0.9)  # g = 0.1 * 9 / 0.1 = 9


class WithHyperParameters(Classifier):
    def __init__(self, optimizers, **values):
        super().__init__(optimizers)
        self.save_hyperparameters(values)


def checkpoint(tmp_path, model, *callbacks):
    run = trainer(tmp_path, [*callbacks])
    run.fit(model, shuffled())
    path = tmp_path / "good.ckpt"
    run.save_checkpoint(path)
    return path


def adam(**kwargs):
    return lambda module: torch.optim.Adam(module.parameters(), **kwargs)


def only(reference):
    (found,) = reference.groups.values()
    return found


@pytest.mark.parametrize(
    "given",
    [
        GOOD,
        {"learning_rate": 0.1, "batch_size": 10, "dataset_size": 100, "momentum": 0.9},
    ],
)
def test_a_configuration_as_given(given):
    assert only(read_reference(given)) == GOOD


def test_a_dict_with_betas_is_adams():
    given = {"learning_rate": 1e-3, "batch_size": 10, "betas": [0.9, 0.99]}
    assert only(read_reference(given)) == AdamConfiguration(1e-3, 10, (0.9, 0.99))


def test_checkpoint_with_what_an_advisor_noted(tmp_path):
    # Stopped where the schedule had gone down: the peak is what counts.
    model = Classifier(with_lambda("step", lambda step: 0.5**step, momentum=0.9))
    reference = read_reference(checkpoint(tmp_path, model, ScalingAdvisor(target_batch_size=50)))
    assert reference.groups == {"SGD": GOOD}
    assert reference.notes == ()


def test_checkpoint_with_hyper_parameters(tmp_path):
    model = WithHyperParameters(
        plain_sgd(momentum=0.9, nesterov=True), batch_size=5, dataset_size=100, accumulate_grad_batches=2
    )
    reference = read_reference(str(checkpoint(tmp_path, model)))
    assert only(reference) == Configuration(0.1, 10, 100, 0.9, nesterov=True)
    assert "batch size of the reference, 10, is from the hyper_parameters" in reference.notes[0]


def test_checkpoint_in_the_middle_of_a_schedule_has_its_base(tmp_path):
    path = checkpoint(tmp_path, Classifier(with_lambda("step", lambda step: 0.5**step, momentum=0.9)))
    assert torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"] < 0.01
    assert only(read_reference({"path": path, "batch_size": 10, "dataset_size": 100})) == GOOD


def test_checkpoint_of_one_cycle_has_its_peak(tmp_path):
    def one_cycle(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=20, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    path = checkpoint(tmp_path, Classifier(one_cycle))
    assert only(read_reference({"path": path, "batch_size": 10, "dataset_size": 100})) == GOOD


def test_checkpoint_of_a_schedule_without_a_base_says_so(tmp_path):
    def plateau(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "loss", "strict": False},
        }

    class Logging(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    path = checkpoint(tmp_path, Logging(plateau))
    reference = read_reference({"path": path, "batch_size": 10, "dataset_size": 100})
    assert "that at the moment of" in reference.notes[0]


def test_checkpoint_of_adam_does_without_the_dataset(tmp_path):
    path = checkpoint(tmp_path, Classifier(adam(lr=0.01, betas=(0.8, 0.99))))
    reference = read_reference({"path": path, "batch_size": 10})
    assert only(reference) == AdamConfiguration(0.01, 10, (0.8, 0.99), 1e-8)
    assert reference.adaptive


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Rprop])
def test_checkpoint_of_an_optimizer_without_noise_scale(tmp_path, kind):
    path = checkpoint(tmp_path, Classifier(lambda module: kind(module.parameters(), lr=0.01)))
    with refuses("neither noise scale describes it"):
        read_reference({"path": path, "batch_size": 10, "dataset_size": 100})


@pytest.mark.parametrize(
    ("optimizer", "betas"),
    [
        (lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.95, momentum=0.9), (0.95,)),
        (lambda p: torch.optim.Adagrad(p, lr=0.01), ()),
        (lambda p: torch.optim.Adadelta(p, lr=0.01, rho=0.8), (0.8,)),
    ],
)
def test_checkpoint_of_other_adaptive_optimizers(tmp_path, optimizer, betas):
    path = checkpoint(tmp_path, Classifier(lambda module: optimizer(module.parameters())))
    assert only(read_reference({"path": path, "batch_size": 10})).betas == betas


def test_what_a_checkpoint_lacks_is_named_with_the_remedy(tmp_path):
    path = checkpoint(tmp_path, WithHyperParameters(plain_sgd(), batch_size=10))
    with refuses("say `dataset_size` (training examples)", remedy="have only ['batch_size']") as error:
        read_reference(path)
    assert 'reference={"path": ..., "dataset_size": ...}' in str(error.value)
    assert only(read_reference({"path": path, "dataset_size": 100})) == Configuration(0.1, 10, 100)


def test_a_checkpoint_already_loaded(tmp_path):
    path = checkpoint(tmp_path, WithHyperParameters(plain_sgd(momentum=0.9), batch_size=10, dataset_size=100))
    assert only(read_reference(torch.load(path, weights_only=False))) == GOOD


class Odd:
    pass


def test_a_checkpoint_with_objects_is_not_unpickled(tmp_path):
    path = checkpoint(tmp_path, WithHyperParameters(plain_sgd(), batch_size=10, dataset_size=100, odd=Odd()))
    with refuses("holds no objects", remedy="reference=torch.load"):
        read_reference(path)


def test_weights_alone_are_no_reference(tmp_path):
    path = tmp_path / "weights.ckpt"
    run = trainer(
        tmp_path,
        [ModelCheckpoint(tmp_path, save_weights_only=True, filename="weights")],
        enable_checkpointing=True,
    )
    run.fit(Classifier(), shuffled())
    with refuses("optimizer states, but", remedy="has none"):
        read_reference(path)
    (tmp_path / "other.ckpt").write_text("nothing")
    with refuses("loading it failed"):
        read_reference(tmp_path / "other.ckpt")


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_logged_noise_scale(tmp_path, logger):
    log = logger(tmp_path)
    run = trainer(tmp_path, [SGDNoiseScale()], logger=log, max_epochs=3)
    run.fit(
        Classifier(with_lambda("epoch", lambda epoch: (0.5, 1.0, 0.1)[min(epoch, 2)], momentum=0.9)),
        shuffled(),
    )
    reference = read_reference(log.log_dir)
    assert only(reference) == pytest.approx(9, rel=1e-6)
    assert "the largest of 3 logged" in reference.notes[0] and not reference.adaptive


def test_logged_noise_scale_of_each_group(tmp_path):
    log = CSVLogger(tmp_path)
    trainer(tmp_path, [SGDNoiseScale()], logger=log).fit(Classifier(two_groups({"lr": 0.2}, {})), shuffled())
    assert read_reference(log.log_dir).groups == pytest.approx({"SGD/pg1": 1.8, "SGD/pg2": 0.9}, rel=1e-6)


def test_logged_noise_scale_of_adam(tmp_path):
    log = CSVLogger(tmp_path)
    trainer(tmp_path, [SGDNoiseScale()], logger=log).fit(Classifier(adam(lr=0.01)), shuffled())
    reference = read_reference(log.log_dir)
    assert reference.adaptive and only(reference) == pytest.approx(0.01 / 10**0.5, rel=1e-6)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_hyper_parameters_of_a_logged_run(tmp_path, logger):
    log = logger(tmp_path)
    model = WithHyperParameters(plain_sgd(), lr=0.1, batch_size=10, dataset_size=100, momentum=0.9, name="x")
    trainer(tmp_path, [], logger=log).fit(model, shuffled())
    assert only(read_reference(log.log_dir)) == GOOD


def test_saved_advice_comes_first(tmp_path):
    log = CSVLogger(tmp_path)
    callbacks = [ScalingAdvisor(target_batch_size=50), SGDNoiseScale()]
    trainer(tmp_path, callbacks, logger=log).fit(Classifier(plain_sgd(momentum=0.9)), shuffled())
    for path in (log.log_dir, f"{log.log_dir}/scaling_advice.json"):
        assert read_reference(path).groups == {"SGD": GOOD}


def test_a_log_with_what_is_no_number(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,bayes/noise_scale\n1,2.0\n2,abc\n")
    with refuses("`reference`", remedy=("bayes/noise_scale", "metrics.csv", "'abc'")):
        read_reference(tmp_path)


def test_dampening_without_momentum_is_none_as_in_torch():
    values = {"learning_rate": 0.1, "batch_size": 10, "dataset_size": 100, "dampening": 0.5}
    assert only(read_reference(values)) == Configuration(0.1, 10, 100)


def test_a_directory_without_any_of_it(tmp_path):
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump({"lr": 0.1}))
    (tmp_path / "metrics.csv").write_text("step,bayes/gradient_noise_scale\n1,2.0\n")
    with refuses("to hold scaling_advice.json", remedy="found only ['hparams.yaml', 'metrics.csv']"):
        read_reference(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "`reference` to be the path"),
        ("nowhere", "no file 'nowhere'"),
        ({"learning_rate": 0.1, "batch_size": 10}, "say dataset_size"),
        ({"learning_rate": 0.1, "batch_size": 10, "dataset_size": 100, "lr": 1}, "got also lr"),
        ({"learning_rate": 0.1, "batch_size": 10.5, "dataset_size": 100}, "`batch_size`"),
        ({"learning_rate": 0.1, "batch_size": 10, "betas": (0.9,), "momentum": 0.9}, "momentum beside betas"),
        ({"path": "x", "momentum": 0.9}, "got also momentum"),
    ],
)
def test_bad_references_are_named(given, message):
    with refuses(message):
        read_reference(given)


def test_other_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "x.json"))):
        read_reference(tmp_path / "x.json")


def groups(*configurations):
    return [ParameterGroup(f"SGD/pg{index}", one) for index, one in enumerate(configurations, start=1)]


def test_groups_are_matched(tmp_path):
    half = Configuration(0.05, 10, 100, 0.9)
    saved = tmp_path / "x.json"
    saved.write_text(SavedAdvice({"SGD/pg2": half, "SGD/pg1": GOOD}).to_json())
    reference = read_reference(saved)
    assert not any(found.differs for found in comparisons_with(reference, groups(GOOD, half)))
    # One group stands for all: that with the largest learning rate.
    (found,) = comparisons_with(reference, groups(GOOD))
    assert not found.differs
    (found,) = comparisons_with(read_reference(GOOD), groups(half, GOOD))
    assert not found.differs and found.name == "SGD/pg2"
    # By position under other names; equal pairs are one comparison.
    both = comparisons_with(read_reference(saved), [ParameterGroup("a", half), ParameterGroup("b", GOOD)])
    assert not any(found.differs for found in both)


def test_other_kinds_of_optimizer_are_refused():
    with refuses("`reference` to be of an Adam-like optimizer"):
        comparisons_with(read_reference(GOOD), [ParameterGroup("Adam", AdamConfiguration(1e-3, 10))])
    with refuses("`reference` to be of SGD"):
        comparisons_with(read_reference(AdamConfiguration(1e-3, 10)), groups(GOOD))
