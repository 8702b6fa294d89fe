"""Where advice goes: runs that share a directory keep their files apart, and what cannot be written is a warning."""

import errno
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from lightning_bayes import ScalingAdvisor
from lightning_bayes.advice.references import read_reference
from lightning_bayes.functional import SavedAdvice
from tests.scenarios import Classifier, plain_sgd, shuffled, trainer, two_classes


class Shared(Logger):
    """As MLflow's and W&B's: one `save_dir` for all runs, told apart by their ids."""

    def __init__(self, save_dir, name, version):
        self.directory, self.called, self.run = str(save_dir), name, version

    save_dir = property(lambda self: self.directory)
    name = property(lambda self: self.called)
    version = property(lambda self: self.run)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


class WithLogDir(Shared):
    """One of somebody's own that gives all runs one log_dir."""

    log_dir = property(lambda self: self.directory)


def fit(tmp_path, logger, rate=0.1, advisors=1, **kwargs):
    callbacks = [ScalingAdvisor(target_batch_size=50 + n) for n in range(advisors)]
    trainer(tmp_path, callbacks, logger=logger, **kwargs).fit(Classifier(plain_sgd(lr=rate)), shuffled())
    return callbacks


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("scaling_advice*.json"))


def rate_in(path):
    return SavedAdvice.from_json(Path(path).read_text()).configurations["SGD"].learning_rate


@pytest.mark.parametrize(
    ("first", "second"),
    [(("exp", "a1b2"), ("exp", "c3d4")), (("exp", 0), ("other/name", 0)), ((None, None),) * 2],
)
def test_runs_that_share_a_directory(tmp_path, first, second):
    for run, rate in ((first, 0.1), (second, 0.2)):
        fit(tmp_path, Shared(tmp_path / "runs", *run), rate)
    found = files(tmp_path / "runs")
    assert len(found) == 2
    assert sorted(rate_in(tmp_path / "runs" / name) for name in found) == [0.1, 0.2]
    # The directory is a reference still, of its newest run.
    assert read_reference(tmp_path / "runs").groups["SGD"].learning_rate == 0.2


def test_a_log_dir_shared_by_all_runs_gets_numbered_files(tmp_path):
    for rate in (0.1, 0.2, 0.3):
        fit(tmp_path, WithLogDir(tmp_path / "all", "x", 0), rate)
    assert files(tmp_path / "all") == [
        "scaling_advice-1.json",
        "scaling_advice-2.json",
        "scaling_advice.json",
    ]
    assert rate_in(tmp_path / "all" / "scaling_advice.json") == 0.1
    assert read_reference(tmp_path / "all").groups["SGD"].learning_rate == 0.3


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_loggers_that_number_their_directories_keep_their_place(tmp_path, kind):
    for _ in range(2):
        fit(tmp_path, kind(tmp_path, name="x"), advisors=2)
    names = ("scaling_advice-1.json", "scaling_advice.json")
    assert files(tmp_path) == [f"x/version_{n}/{name}" for n in (0, 1) for name in names]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("trouble", ["a file in its place", "a full disk"])
def test_a_file_that_cannot_be_written_is_one_warning(tmp_path, capsys, monkeypatch, trouble):
    if trouble == "a full disk":
        monkeypatch.setattr("lightning_bayes.callbacks.advice.report._save", full)
    else:
        (tmp_path / "taken").write_text("")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (advisor,) = fit(tmp_path, Shared(tmp_path / "taken", "x", "y"))
    said = [str(one.message) for one in caught if "ScalingAdvisor" in str(one.message)]
    assert len(said) == 1 and said[0].startswith("ScalingAdvisor: ")
    assert "was printed and is in `advisor.advice`" in said[0]
    assert advisor.advice and "Scaling advice for SGD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ({"limit_train_batches": 3}, 101),
        ({"limit_train_batches": 0.5}, 60),
        ({"limit_train_batches": 1}, 20),
        ({"overfit_batches": 2}, 60),
        ({}, 101),
    ],
)
def test_a_target_batch_beyond_the_data_says_what_to_do(tmp_path, flags, size):
    data = DataLoader(two_classes(), batch_size=10)
    run = trainer(tmp_path, [ScalingAdvisor(target_batch_size=size, on_error="raise")], **flags)
    with pytest.raises(ValueError, match="at most `dataset_size`") as error:
        run.fit(Classifier(), data)
    text = str(error.value)
    assert "take a target_batch_size below " in text
    named = [flag for flag in ("limit_train_batches", "overfit_batches") if f"remove `{flag}`" in text]
    # Beyond all of the data no flag helps.
    assert named == ([*flags] if size <= 100 else [])
    below = int(text.rsplit("below ", 1)[1].split(".", maxsplit=1)[0]) - 1
    trainer(tmp_path, [ScalingAdvisor(target_batch_size=below)], **flags).fit(Classifier(), data)
