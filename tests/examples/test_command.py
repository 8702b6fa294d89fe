"""The command from a user's side: what it refuses, and what it says then."""

import pytest

from examples.smith_le_2018 import cli, data
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.data import Unavailable, load_digits
from examples.smith_le_2018.presets import PRESETS
from examples.smith_le_2018.sweep import RunTable
from examples.smith_le_2018.trials import Trials
from tests.examples.digits import TINY
from tests.examples.test_trials import KIND, make


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(cli.PRESETS, "quick", TINY)


@pytest.fixture
def no_mnist(monkeypatch):
    """MNIST is neither there nor to be downloaded."""

    def download(root, **settings):
        raise RuntimeError("Error downloading train-images")

    monkeypatch.setattr("torchvision.datasets.MNIST", download)
    data.load_digits.cache_clear()


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_counts_are_whole_and_positive(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["fig4", "--seeds", text])
    assert f"--seeds: expected a whole number of at least 1, but got {text}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fig4", "fig1", "check", "all"])
def test_nothing_to_draw_is_said_in_a_line(tmp_path, tiny, name):
    with pytest.raises(SystemExit, match=r"smith_le_2018: Expected "):
        cli.main([name, "--draw-only", "--results", str(tmp_path)])
    assert not list(tmp_path.rglob("*"))


def test_all_draws_what_is_complete(tmp_path, tiny, capsys):
    cli.main(["fig4", "--results", str(tmp_path), "--workers", "1"])
    (tmp_path / "tiny" / "fig4.png").unlink()
    cli.main(["all", "--draw-only", "--results", str(tmp_path)])
    assert [path.name for path in (tmp_path / "tiny").glob("*.png")] == ["fig4.png"]
    assert "fig5: left out. Expected" in capsys.readouterr().out


def test_the_whole_of_mnist_is_needed_to_train_and_not_to_draw(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["fig4", "--preset", "paper", "--results", str(tmp_path)])
    assert "give --mnist-root DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"Run it without `--draw-only`"):
        cli.main(["fig4", "--preset", "paper", "--results", str(tmp_path), "--draw-only"])


def test_seeds_are_those_of_every_figure():
    repeated = PRESETS["quick"].repeated(7)
    evidence = repeated.evidence
    assert {repeated.seeds, evidence.logistic_seeds, evidence.net_seeds, evidence.langevin_seeds} == {7}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_missing_digits_end_the_command(tmp_path, tiny, no_mnist, workers):
    """A pool whose processes do not find their digits would start new ones for ever."""
    for name in ("fig4", "fig1"):
        arguments = [
            name,
            "--results",
            str(tmp_path),
            "--workers",
            workers,
            "--mnist-root",
            str(tmp_path / "no"),
        ]
        with pytest.raises(SystemExit, match=r"Expected MNIST in .*no, .* but got: Error downloading"):
            cli.main(arguments)


def test_trials_do_not_start_processes_without_digits(tmp_path, no_mnist):
    runs = RunTable(tmp_path, tmp_path / "no", workers=2)
    trials = Trials(KIND, Context(TINY, 3, tmp_path, tmp_path / "no", runs, lambda line: None))
    with pytest.raises(Unavailable, match="Expected MNIST"):
        trials.measure("name", make)


def test_an_interrupted_download_is_finished(tmp_path, monkeypatch):
    """A folder alone does not mean that its files are there."""
    asked = []

    def mnist(root, *, train, download):
        asked.append(download)
        raise RuntimeError("no network")

    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    monkeypatch.setattr("torchvision.datasets.MNIST", mnist)
    load_digits.cache_clear()
    with pytest.raises(Unavailable):
        load_digits(tmp_path)
    assert asked == [True]
