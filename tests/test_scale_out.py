"""`examples/scale_out.py`: its statistics by hand, and the direction of its claims in a short run."""

import csv
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "scale_out.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_out", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_out"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows_of(script: ModuleType, name: str, accuracies: dict[int, float]) -> list:
    return [
        script.Row(name, seed, 16, 0.1, 0.9, 0, 100, 100, 1, 10, 1.0, 0.5, accuracy)
        for seed, accuracy in accuracies.items()
    ]


def test_differences_are_paired_by_seed(script: ModuleType) -> None:
    # Seeds differ by much, the runs of a seed by 1 and 3 points: mean 2, standard error (3 - 1)/√2/√2 = 1.
    rows = rows_of(script, "small batch", {0: 0.90, 1: 0.50}) + rows_of(script, "naive", {1: 0.47, 0: 0.89})
    mean, error = script.difference(rows, "naive", 1)
    assert mean == pytest.approx(-2)
    assert error == pytest.approx(1)


def test_claims_are_held_against_two_standard_errors(script: ModuleType) -> None:
    moves = [
        script.Move("small batch", 16, 0.1),
        script.Move("advised", 128, 0.8, True, "safe"),
        script.Move("naive", 128, 0.1),
        script.Move("too far", 90, 9.0, True, "doubtful: batch_size, stability"),
    ]
    rows = rows_of(script, "small batch", {0: 0.90, 1: 0.91})
    rows += rows_of(script, "advised", {0: 0.91, 1: 0.90})
    rows += rows_of(script, "naive", {0: 0.80, 1: 0.82})
    rows += rows_of(script, "too far", {0: 0.10, 1: 0.20})
    assert all(script.claims(moves, rows).values())
    worse = [row for row in rows if row.move != "advised"] + rows_of(script, "advised", {0: 0.85, 1: 0.87})
    assert [claim for claim, holds in script.claims(moves, worse).items() if not holds] == [
        "advised: within two standard errors of the small batch"
    ]


def test_refuses_one_seed(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--seeds", "1"])
    assert "--seeds 2" in capsys.readouterr().err


@pytest.mark.slow
def test_directions_in_a_short_run(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Too short for the claims themselves: most of the short run is warm-up.
    with warnings.catch_warnings():
        # Batches of 16 tell little of |G|² at first; `GradientNoiseScale` says so, and goes on.
        warnings.filterwarnings("ignore", ".*B_simple is not resolved.*")
        script.main(["--seeds", "2", "--epochs", "7", "--out", str(tmp_path / "figure.png")])
    printed = capsys.readouterr().out
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figure.md").read_text() in printed
    with (tmp_path / "figure.csv").open() as file:
        rows = list(csv.DictReader(file))
    end = {row["move"]: row for row in rows if row["epoch"] == "7" and row["seed"] == "0"}
    assert float(end["advised"]["noise_scale"]) == pytest.approx(float(end["small batch"]["noise_scale"]))
    assert int(end["advised"]["steps"]) * 7 < int(end["small batch"]["steps"])

    def accuracy(move: str) -> float:
        found = [float(row["test_accuracy"]) for row in rows if row["move"] == move and row["epoch"] == "7"]
        assert len(found) == 2
        return sum(found) / 2

    small = accuracy("small batch")
    assert small > 0.9
    assert abs(accuracy("advised") - small) < 0.5 * (small - accuracy("naive"))
    assert accuracy("too far") < accuracy("naive") - 0.2
    assert "shown: the advisor expects the move too far to diverge" in printed
