"""The quickstart, run as it stands on fewer digits, and everything that it promises."""

import io
import math
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
EPOCHS = 10
N = 640
"""Of the 1,000 that it trains on: the exact evidence takes a time that grows with N³."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder, source = tmp_path_factory.mktemp("quickstart"), SCRIPT.read_text()
    assert source.count("[1000, 4000]") == 1
    program = compile(source.replace("[1000, 4000]", f"[{N}, {5000 - N}]"), str(SCRIPT), "exec")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(SCRIPT)])
        for name, value in (("MPLBACKEND", "Agg"), ("COLUMNS", "80"), ("PL_GLOBAL_SEED", "0")):
            patch.setenv(name, value)
        exec(program, {"__name__": "__main__"})
    plt.close("all")
    return printed.getvalue(), folder


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
    # Evidence and ratio differ by that of guessing among ten digits, N times.
    for evidence, ratio in zip(logged["bayes/log_evidence"], logged["bayes/log_evidence_ratio"], strict=True):
        assert ratio - evidence == pytest.approx(N * math.log(10), rel=1e-5)


@pytest.mark.slow
def test_noise_scale_follows_the_cosine_schedule(run: tuple[str, Path]) -> None:
    rates = [0.1 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2 for epoch in range(EPOCHS)]
    expected = [rate * (N / 32 - 1) / (1 - 0.9) for rate in rates]
    assert scalars(run[1])["bayes/noise_scale"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_training_data_believe_the_net_and_the_test_data_agree(run: tuple[str, Path]) -> None:
    logged = scalars(run[1])
    assert logged["bayes/log_evidence_ratio"][-1] > N
    assert logged["bayes/log_evidence"][-1] > logged["bayes/log_evidence"][0] + N / 2
    assert logged["test_loss"][-1] < 0.5


@pytest.mark.slow
def test_prints_advice_figure_and_tensorboard(run: tuple[str, Path]) -> None:
    printed, folder = run
    advised = 19 * (1 - 0.9) / (N / 128 - 1)  # g = 0.1 (640/32 - 1)/(1 - 0.9) = 19
    assert re.search(rf"= {advised:.5g}\s", printed)  # the exact rule
    assert re.search(r"= 0\.1 \* 128/32 = 0\.4\s", printed)  # the linear rule
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    last = printed.strip().splitlines()[-1]
    assert last.startswith("Curves: tensorboard --logdir ") and (folder / last.split()[-1]).exists()
