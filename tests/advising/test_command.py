"""`python -m lightning_bayes advise`."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_bayes.advice.cli import main
from lightning_bayes.functional import AdamConfiguration, Configuration, SavedAdvice, rescale, rescale_adam

RUN = ["--lr", "0.1", "--batch-size", "256", "--dataset-size", "50000", "--momentum", "0.9"]


def advise(*arguments):
    return main(["advise", *arguments])


def printed(capsys, *arguments):
    assert advise(*arguments) == 0
    return capsys.readouterr().out


def saved(capsys, *arguments):
    return SavedAdvice.from_json(printed(capsys, *arguments, "--json"))


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_table(capsys):
    text = printed(capsys, *RUN, "--target-batch-size", "8192")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert lines[0] == "Scaling advice for SGD"
    assert lines[1] == "up to batch 5000: lr 2.159 (batch size limits it)"
    assert lines[2] == "asked, batch 8192: lr 3.807 (linear 3.2); doubtful, 2 of 6 checks fail"
    assert max(map(len, text.splitlines())) <= 80


def test_json_is_what_the_formulas_give(capsys):
    found = saved(
        capsys, *RUN, "--dampening", "0.25", "--target-lr", "0.5", "--target-dataset-size", "100000"
    )
    expected = rescale(
        learning_rate=0.1,
        batch_size=256,
        dataset_size=50_000,
        momentum=0.9,
        dampening=0.25,
        target_learning_rate=0.5,
        target_dataset_size=100_000,
    )
    assert found.advice[0].exact == expected
    assert found.configurations == {"SGD": Configuration(0.1, 256, 50_000, 0.9, 0.25)}


def test_every_check_can_be_given(capsys):
    (advice,) = saved(
        capsys,
        *RUN,
        *("--nesterov", "--target-batch-size", "2048", "--devices", "8", "--ema-decay", "0.999"),
        *("--gradient-noise-scale", "3000", "--largest-eigenvalue", "0.01"),
    ).advice
    assert advice.verdict == "safe" and advice.present.nesterov
    actions = {one.name: one for one in advice.checks if one.action}
    assert actions["weight_ema"].limit == pytest.approx(0.999**8)
    assert "DataLoader(batch_size=256) on each of the 8 devices" in actions["trainer"].sentence


@pytest.mark.parametrize(
    ("optimizer", "betas"), [("adam", (0.9, 0.999)), ("adamw", (0.9, 0.999)), ("rmsprop", (0.99,))]
)
def test_adam_and_rmsprop(capsys, optimizer, betas):
    run = ["--optimizer", optimizer, "--lr", "1e-3", "--batch-size", "64", "--target-batch-size", "128"]
    expected = rescale_adam(learning_rate=1e-3, batch_size=64, target_batch_size=128, betas=betas)
    assert saved(capsys, *run).advice[0].advised == expected
    other = saved(capsys, *run, "--betas", "0.95", "0.98", "--eps", "1e-6").advice[0].present
    assert other == AdamConfiguration(1e-3, 64, (0.95, 0.98), 1e-6)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "scaling_advice.json"
    path.write_text(SavedAdvice({"SGD": Configuration(0.1, 256, 50_000, 0.9)}).to_json())
    return str(path)


def test_reference_to_compare_with(capsys, good):
    run = ["--lr", "0.1", "--batch-size", "512", "--dataset-size", "50000", "--momentum", "0.9"]
    (comparison,) = saved(capsys, *run, "--reference", good).comparisons
    assert comparison.differs
    assert "Beside the reference" in printed(capsys, *run, "--reference", good)
    assert "Any one of these changes restores it" in printed(capsys, *run, "--reference", good)


def test_reference_to_start_from(capsys, good):
    found = saved(capsys, "--reference", good, "--target-batch-size", "2048")
    assert found.advice[0].present == Configuration(0.1, 256, 50_000, 0.9)
    assert found.comparisons == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN], "nothing is to change: give at least one of --target-batch-size"),
        (["--lr", "0.1", "--target-batch-size", "64"], "missing --batch-size, --dataset-size"),
        ([*RUN, "--target-batch-size", "60000"], "--target-batch-size to be at most --dataset-size"),
        ([*RUN, "--target-batch-size", "8.5"], "--target-batch-size to be a whole number"),
        ([*RUN, "--momentum", "1", "--target-batch-size", "8"], "--momentum to be a number in [0, 1)"),
        ([*RUN[:-2], "--target-batch-size", "8", "--dampening", "0.5"], "--dampening needs --momentum"),
        ([*RUN, "--target-batch-size", "8", "--betas", "0.9"], "--betas: for Adam and RMSprop only"),
        ([*RUN, "--optimizer", "adam", "--target-batch-size", "8"], "--momentum: for SGD only"),
        ([*RUN, "--target-batch-size", "8", "--largest-eigenvalue", "nan"], "--largest-eigenvalue to be"),
        ([*RUN, "--target-batch-size", "8", "--devices", "0"], "--devices to be a whole number"),
        ([*RUN, "--reference", "nowhere.json"], "no file 'nowhere.json'"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        ([*RUN, "--optimizer", "lion"], "invalid choice: 'lion'"),
        (["--reference", "GOOD"], "has nothing to be compared with"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, good, arguments, message):
    with pytest.raises(SystemExit) as error:
        advise(*(good if argument == "GOOD" else argument for argument in arguments))
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err
    assert len(printed.err.splitlines()) == 1 and "`" not in printed.err.replace("`python", "")


NUMBERS = {
    "--lr": ["-1", "0", "nan", "inf", "-1e-3", "text"],
    "--batch-size": ["-1", "0", "nan", "inf", "2.5", "text"],
    "--dataset-size": ["-1", "0", "nan", "inf", "text"],
    "--momentum": ["-1", "1", "nan", "-inf", "text"],
    "--dampening": ["-1", "1", "nan", "inf", "text"],
    "--target-batch-size": ["-1", "0", "nan", "inf", "text"],
    "--target-lr": ["-1", "0", "nan", "inf", "-.5", "text"],
    "--target-momentum": ["-1", "1", "nan", "inf", "text"],
    "--target-dataset-size": ["-1", "0", "nan", "inf", "text"],
    "--devices": ["-1", "0", "nan", "inf", "0.5", "text"],
    "--gradient-noise-scale": ["-1", "0", "inf", "text"],
    "--largest-eigenvalue": ["nan", "inf", "-inf", "text"],
    "--ema-decay": ["-1", "1", "nan", "inf", "text"],
    "--averaged-batches": ["-1", "0", "nan", "inf", "1.5", "text"],
}


@pytest.mark.parametrize(
    ("option", "value"), [(name, value) for name, some in NUMBERS.items() for value in some]
)
def test_every_number_outside_its_domain_is_named(capsys, option, value):
    given = dict(zip(RUN[::2], RUN[1::2], strict=True)) | {"--target-batch-size": "512", "--reduction": "sum"}
    given[option] = value
    with pytest.raises(SystemExit) as error:
        advise(*(part for pair in given.items() for part in pair))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    if value == "text":
        assert f"argument {option}: invalid" in line
    else:
        got = float(line.rsplit("but got ", 1)[1].rstrip("."))
        assert f"expected {option} to be" in line
        assert got == float(value) or (math.isnan(got) and value == "nan")
    if option in ("--lr", "--target-lr") and value != "text":
        assert "above 0" in line


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ([*RUN, "--target-batch-size", "50000"], "is the whole training set"),
        (
            ["--optimizer", "adam", "--lr", "1e-3", "--batch-size", "64", "--target-batch-size", "640"],
            "beta = 0.9",
        ),
    ],
)
@pytest.mark.parametrize("json", [[], ["--json"]])
def test_an_impossible_move_exits_with_1_and_the_reason(capsys, run, reason, json):
    assert advise(*run, *json) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert reason in line
    assert SavedAdvice.from_json(printed.out).advice if json else reason.split()[0] in printed.out


def test_summed_loss(capsys):
    run = ["--lr", "0.003125", "--batch-size", "64", "--dataset-size", "50000", "--target-batch-size", "128"]
    averaged = ["--reduction", "sum", "--averaged-batches", "2"]
    (advice,) = saved(capsys, *run, *averaged).advice
    mean = rescale(learning_rate=0.1, batch_size=64, dataset_size=50_000, target_batch_size=128)
    assert advice.exact.learning_rate == pytest.approx(mean.learning_rate / 64)
    assert "The loss is a sum" in printed(capsys, *run, *averaged)
    with pytest.raises(SystemExit):
        advise(*run, "--averaged-batches", "2")
    assert "--averaged-batches goes with --reduction sum" in capsys.readouterr().err


def test_reference_without_configuration_cannot_be_started_from(capsys, tmp_path):
    (tmp_path / "metrics.csv").write_text("bayes/noise_scale\n9.0\n")
    with pytest.raises(SystemExit):
        advise("--reference", str(tmp_path), "--target-batch-size", "64")
    assert "holds a noise scale and no configuration" in capsys.readouterr().err
    (comparison,) = saved(capsys, *RUN, "--reference", str(tmp_path)).comparisons
    assert comparison.reference_noise_scale == 9.0


def test_help(capsys):
    with pytest.raises(SystemExit) as error:
        advise("--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    for option in ("--lr", "--target-batch-size", "--gradient-noise-scale", "--reference", "examples:"):
        assert option in text


@pytest.mark.slow
def test_as_a_process(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "lightning_bayes", "advise", *RUN, "--target-batch-size", "8192", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    rate = json.loads(finished.stdout)["advice"][0]["moves"][0]["exact"]["learning_rate"]
    assert math.isclose(rate, 0.1 * (50_000 / 256 - 1) / (50_000 / 8192 - 1))


def test_wrong_use_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as error:
        advise("--lr", "0.1")
    assert error.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
