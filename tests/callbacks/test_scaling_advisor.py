import inspect
import signal
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_bayes.callbacks import ScalingAdvisor
from lightning_bayes.functional import Configuration, rescale
from tests.refusals import refuses
from tests.scenarios import Classifier, plain_sgd, shuffled, trainer, two_classes, two_groups, with_lambda


def advise(
    tmp_path, optimizers=None, data=None, extra=(), logger=False, max_epochs=1, kwargs=None, **targets
):
    advisor = ScalingAdvisor(**targets)
    run = trainer(tmp_path, [*extra, advisor], logger=logger, max_epochs=max_epochs, **(kwargs or {}))
    run.fit(Classifier(optimizers), data or shuffled())
    return advisor.advice


def test_advice_is_data(tmp_path):
    (advice,) = advise(tmp_path, plain_sgd(momentum=0.9), target_batch_size=50)
    assert advice.name == "SGD"
    assert advice.present == Configuration(0.1, 10, 100, 0.9)
    expected = rescale(learning_rate=0.1, batch_size=10, dataset_size=100, momentum=0.9, target_batch_size=50)
    assert advice.exact == expected
    # g = 0.1 * 9 / 0.1 = 9; at B' = 50: lr' = 9 * 0.1 / (100/50 - 1)
    assert advice.exact.learning_rate == pytest.approx(0.9)
    assert advice.linear.learning_rate == pytest.approx(0.5)


def test_table_is_printed_once_and_fits_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    advise(tmp_path, plain_sgd(momentum=0.9), target_momentum=0.5)
    printed = capsys.readouterr().out
    assert printed.count("Scaling advice for SGD") == 1
    assert max(map(len, printed.splitlines())) <= 80
    assert "g = lr (N/B - 1)/(1 - m) = 0.1 * (100/10 - 1)/(1 - 0.9) = 9" in printed
    assert "How sure" in printed and "Trainer: yes" in printed


def test_tensorboard_has_the_text(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    advise(tmp_path, logger=logger, target_batch_size=50)
    events = EventAccumulator(logger.log_dir).Reload()
    (event,) = events.Tensors("bayes/advice/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "Scaling advice for SGD" in text and text.startswith("```")


def test_loggers_without_text_do_not_crash(tmp_path):
    assert advise(tmp_path, logger=CSVLogger(tmp_path), target_batch_size=50)


def test_schedule_is_advised_at_its_peak(tmp_path):
    (advice,) = advise(
        tmp_path,
        with_lambda("epoch", lambda epoch: (0.5, 1.0, 0.1)[min(epoch, 2)]),
        max_epochs=3,
        target_batch_size=50,
    )
    assert advice.present.learning_rate == pytest.approx(0.1)
    assert any("Multiply the whole schedule" in caveat for caveat in advice.caveats)


def test_constant_rate_says_nothing_of_schedules(tmp_path):
    (advice,) = advise(tmp_path, max_epochs=2, target_batch_size=50)
    assert not any("schedule; the one shown" in caveat for caveat in advice.caveats)


def test_growing_batch_is_taken_at_the_end(tmp_path):
    (advice,) = advise(
        tmp_path, extra=[GradientAccumulationScheduler({0: 1, 1: 2})], max_epochs=2, target_batch_size=50
    )
    assert advice.present.batch_size == 20
    assert any("batch size changed during the run" in caveat for caveat in advice.caveats)


def test_groups_that_differ_have_advice_each(tmp_path):
    found = advise(tmp_path, two_groups({"lr": 0.2}, {}), target_learning_rate=0.4)
    assert [advice.name for advice in found] == ["SGD/pg1", "SGD/pg2"]
    # The target is the largest group's; both are doubled, and both ask for the same batch.
    assert [advice.exact.learning_rate for advice in found] == pytest.approx([0.4, 0.2])
    assert found[0].exact.batch_size == pytest.approx(found[1].exact.batch_size)


def test_equal_groups_share_advice(tmp_path):
    (advice,) = advise(tmp_path, two_groups({}, {"weight_decay": 0.1}), target_batch_size=50)
    assert advice.name == "SGD/pg1, SGD/pg2"


def test_adam_gets_its_own_rule(tmp_path, capsys):
    (advice,) = advise(
        tmp_path, lambda module: torch.optim.AdamW(module.parameters(), lr=0.01), target_batch_size=40
    )
    assert advice.optimizer == "adam"
    assert advice.advised.learning_rate == pytest.approx(0.02)
    assert advice.advised.betas == pytest.approx((0.6, 0.996))
    assert "sqrt rule" in capsys.readouterr().out


def test_accumulation_and_drop_last(tmp_path):
    (advice,) = advise(
        tmp_path,
        data=shuffled(size=95, drop_last=True),
        kwargs={"accumulate_grad_batches": 3},
        target_batch_size=40,
    )
    assert advice.present == Configuration(0.1, 30, 95)


def test_peak_survives_a_checkpoint(tmp_path):
    def configure():
        return Classifier(with_lambda("epoch", lambda epoch: 0.5**epoch))

    first = trainer(tmp_path, [ScalingAdvisor(target_batch_size=50)], max_epochs=1)
    first.fit(configure(), shuffled())
    first.save_checkpoint(tmp_path / "first.ckpt")
    # Another model and callback: only the checkpoint knows of the first epoch at 0.1.
    advisor = ScalingAdvisor(target_batch_size=50)
    second = trainer(tmp_path, [advisor], max_epochs=3)
    # Older Lightning has no such argument.
    safely = {"weights_only": True} if "weights_only" in inspect.signature(second.fit).parameters else {}
    second.fit(configure(), shuffled(), ckpt_path=tmp_path / "first.ckpt", **safely)
    (advice,) = advisor.advice
    assert advice.present.learning_rate == pytest.approx(0.1)
    assert any("Multiply the whole schedule" in caveat for caveat in advice.caveats)


@pytest.mark.parametrize(
    "optimizers", [plain_sgd(momentum=0.9), lambda m: torch.optim.Adam(m.parameters(), lr=0.01)]
)
def test_state_round_trips(tmp_path, optimizers):
    advisor = ScalingAdvisor(target_batch_size=50)
    trainer(tmp_path, [advisor]).fit(Classifier(optimizers), shuffled())
    other = ScalingAdvisor(target_batch_size=50)
    other.load_state_dict(advisor.state_dict())
    assert other.state_dict() == advisor.state_dict() != {}


def test_second_fit_begins_anew(tmp_path):
    advisor = ScalingAdvisor(target_batch_size=50)
    trainer(tmp_path, [advisor]).fit(Classifier(plain_sgd(lr=0.4)), shuffled())
    trainer(tmp_path, [advisor]).fit(Classifier(plain_sgd(lr=0.1)), shuffled())
    assert advisor.advice[0].present.learning_rate == 0.1


def test_two_advisors_in_one_trainer(tmp_path):
    advisors = [ScalingAdvisor(target_batch_size=50), ScalingAdvisor(target_momentum=0.5)]
    trainer(tmp_path, advisors).fit(Classifier(), shuffled())
    assert all(advisor.advice for advisor in advisors)


def test_two_advisors_with_the_same_targets_fail_before_training(tmp_path):
    advisors = [
        ScalingAdvisor(target_batch_size=50),
        ScalingAdvisor(target_batch_size=50, log_key_prefix="x/"),
    ]

    class WithCallbacks(Classifier):
        # Lightning checks those given to the Trainer itself, but not these.
        def configure_callbacks(self):
            return advisors

    model = WithCallbacks()
    before = [parameter.clone() for parameter in model.parameters()]
    with refuses("to differ in their targets, but two have", remedy=("batch_size=50", "Remove one")):
        trainer(tmp_path, [], enable_checkpointing=True).fit(model, shuffled())
    assert all(map(torch.equal, before, model.parameters()))


class Interrupt(L.Callback):
    """Ctrl-C in the second epoch, or whatever `error` is."""

    def __init__(self, error=KeyboardInterrupt):
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 4:
            raise self.error

    def on_test_start(self, trainer, pl_module):
        raise self.error


@pytest.fixture
def keeps_sigint():
    # Lightning ignores the signal from the first Ctrl-C on, and ends the process.
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("keeps_sigint")
def test_ctrl_c_gives_advice_once(tmp_path, capsys):
    advisor, logger = ScalingAdvisor(target_batch_size=50), TensorBoardLogger(tmp_path)
    run = trainer(tmp_path, [advisor, Interrupt()], max_epochs=3, logger=logger)
    with pytest.raises(SystemExit):
        run.fit(Classifier(), shuffled())
    assert advisor.advice[0].present == Configuration(0.1, 10, 100)
    assert capsys.readouterr().out.count("Scaling advice for SGD") == 1
    assert EventAccumulator(logger.log_dir).Reload().Tags()["tensors"] == ["bayes/advice/text_summary"]


class NetWithTest(Classifier):
    def test_step(self, batch, batch_idx):
        pass


@pytest.mark.usefixtures("keeps_sigint")
@pytest.mark.parametrize("epochs", [1, 3])
def test_no_advice_after_an_error_or_in_a_later_test(tmp_path, capsys, epochs):
    advisor, interrupt = ScalingAdvisor(target_batch_size=50), Interrupt(RuntimeError)
    run, model = trainer(tmp_path, [advisor, interrupt], max_epochs=epochs), NetWithTest()
    with nullcontext() if epochs == 1 else pytest.raises(RuntimeError):
        run.fit(model, shuffled())
    assert len(advisor.advice) == (epochs == 1)
    interrupt.error = KeyboardInterrupt
    with pytest.raises(SystemExit):
        run.test(model, DataLoader(two_classes(), batch_size=10))
    assert capsys.readouterr().out.count("Scaling advice for SGD") == (epochs == 1)


def test_changed_dataset_size_is_said(tmp_path):
    class Growing(Classifier):
        def train_dataloader(self):
            return shuffled(size=24 if self.trainer.current_epoch == 0 else 40, batch_size=8)

    advisor = ScalingAdvisor(target_batch_size=16)
    trainer(tmp_path, [advisor], max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(Growing())
    (advice,) = advisor.advice
    assert advice.present.dataset_size == 40
    assert any("The dataset size changed during the run" in caveat for caveat in advice.caveats)


def test_without_a_step_there_is_no_advice(tmp_path):
    with pytest.warns(UserWarning, match="no optimizer step"):
        assert advise(tmp_path, plain_sgd(lr=0.0), target_batch_size=50) == []


def test_target_batch_beyond_the_data_fails_before_training(tmp_path):
    with refuses("`target_batch_size` to be at most `dataset_size`", remedy=("100", "101")):
        advise(tmp_path, target_batch_size=101, on_error="raise")


def test_momentum_target_for_adam_fails_before_training(tmp_path):
    with refuses("`target_momentum` to be None", 0.5):
        advise(
            tmp_path,
            lambda module: torch.optim.Adam(module.parameters()),
            target_momentum=0.5,
            on_error="raise",
        )
