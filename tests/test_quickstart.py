"""The quickstart, run as the README says, and everything that it promises."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
EPOCHS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("quickstart")
    environment = {**os.environ, "MPLBACKEND": "Agg", "COLUMNS": "80"}
    finished = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout, folder


def scalars(folder: Path) -> dict[str, list[float]]:
    (events,) = folder.glob("lightning_logs/version_0/events*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return {key: [event.value for event in accumulator.Scalars(key)] for key in accumulator.Tags()["scalars"]}


def test_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60


@pytest.mark.slow
def test_event_file_holds_every_epoch(run: tuple[str, Path]) -> None:
    logged = scalars(run[1])
    for key in ("bayes/log_evidence", "bayes/log_evidence_ratio", "bayes/noise_scale"):
        assert len(logged[key]) == EPOCHS
        assert all(math.isfinite(value) for value in logged[key])
    # Evidence and ratio differ by that of guessing among ten digits, 1,000 times.
    for evidence, ratio in zip(logged["bayes/log_evidence"], logged["bayes/log_evidence_ratio"], strict=True):
        assert ratio - evidence == pytest.approx(1000 * math.log(10), rel=1e-5)


@pytest.mark.slow
def test_noise_scale_follows_the_cosine_schedule(run: tuple[str, Path]) -> None:
    rates = [0.1 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2 for epoch in range(EPOCHS)]
    expected = [rate * (1000 / 32 - 1) / (1 - 0.9) for rate in rates]
    assert scalars(run[1])["bayes/noise_scale"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_training_data_believe_the_net_and_the_test_data_agree(run: tuple[str, Path]) -> None:
    logged = scalars(run[1])
    assert logged["bayes/log_evidence_ratio"][-1] > 1000
    assert logged["bayes/log_evidence"][-1] > logged["bayes/log_evidence"][0] + 500
    assert logged["test_loss"][-1] < 0.5


@pytest.mark.slow
def test_prints_advice_figure_and_tensorboard(run: tuple[str, Path]) -> None:
    printed, folder = run
    advised = 30.25 * (1 - 0.9) / (1000 / 128 - 1)  # g = 0.1 (1000/32 - 1)/(1 - 0.9) = 30.25
    assert f"{advised:.5f}" in printed
    assert re.search(r"= 0\.1 \* 128/32 = 0\.4\s", printed)  # the linear rule
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    last = printed.strip().splitlines()[-1]
    assert last.startswith("Curves: tensorboard --logdir ") and (folder / last.split()[-1]).exists()
