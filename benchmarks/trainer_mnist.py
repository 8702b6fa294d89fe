"""LaplaceEvidence in a Trainer on MNIST whole: what it says, what it costs, and the same weights with and without it.

    python benchmarks/trainer_mnist.py --mnist-root DIR [--epochs 5] [--threads 2]
                                       [--output docs/benchmarks/trainer_mnist.csv]

784-800-10, 60,000 digits as torchvision gives them, B = 128, SGD with ε = 0.05 and m = 0.9 and the weight decay of
λ = 1. Without a callback, with `LaplaceEvidence()` and with `LaplaceEvidence("lanczos", num_probes=4,
every_n_epochs=5)`, one after the other and then plain again, each in a process of its own. `seconds` is of `fit`;
`predicted` is what the line said before the evaluation that took `measured`, the last one of the run. Prints what the
package says, the quotients of the times to the mean of the two plain runs, and whether all weights are the same bits.
"""

import argparse
import hashlib
import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from table import Row, markdown_table, write_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from lightning_bayes import LaplaceEvidence

SECONDS = re.compile(r"an evaluation takes about ([\d.,e+]+) s")
"""In the line of the package that says what it costs."""


class Timed(LaplaceEvidence):
    """With the seconds of its last hook at the end of an epoch, which the evaluation is in."""

    seconds = 0.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate, or skip the epoch."""
        start, before = time.perf_counter(), len(self.history)
        super().on_train_epoch_end(trainer, pl_module)
        if len(self.history) > before:
            self.seconds = time.perf_counter() - start


RUNS = {
    "plain": lambda: [],
    "LaplaceEvidence()": lambda: [Timed()],
    'LaplaceEvidence("lanczos", every_n_epochs=5)': lambda: [
        Timed("lanczos", num_probes=4, every_n_epochs=5)
    ],
}


class Classifier(L.LightningModule):
    """784-800-10."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With the weight decay of λ = 1."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1 / 60_000)


class Said(logging.Handler):
    """What the package says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, and show it."""
        if "LaplaceEvidence" in record.getMessage():
            self.lines.append(record.getMessage())
            print(f"    {record.getMessage()}", file=sys.stderr)


def measure(run: str, mnist_root: str, epochs: int) -> dict[str, Any]:
    """One fit, in this process."""
    said = Said()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).addHandler(said)
    L.seed_everything(0, verbose=False)
    loader = DataLoader(MNIST(mnist_root, transform=ToTensor()), batch_size=128, shuffle=True)
    module, callbacks = Classifier(), RUNS[run]()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - start
    bits = b"".join(part.detach().numpy().tobytes() for part in module.parameters())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    predicted = [found for line in said.lines for found in SECONDS.findall(line)]
    return {
        "run": run,
        "epochs": epochs,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "predicted": predicted[-1].replace(",", "") if predicted else "",
        "evaluations": len(callbacks[0].history) if callbacks else 0,
        "measured": callbacks[0].seconds if callbacks else "",
        "log_evidence": metrics.get("bayes/log_evidence", ""),
        "stderr": metrics.get("bayes/log_evidence_stderr", ""),
        "weights": hashlib.sha256(bits).hexdigest()[:16],
        "said": " | ".join(said.lines),
    }


def main() -> None:
    """Run them by turns, write, and print the quotients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist-root", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", default="docs/benchmarks/trainer_mnist.csv")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.mnist_root, arguments.epochs)))
        return
    rows: list[Row] = []
    path = Path(arguments.output)
    for run in (*RUNS, "plain"):
        print(run, flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--one", run]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        write_rows(path, rows, list(rows[0]))
        path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def table(rows: list[Row]) -> str:
    """Of all runs, and whether their weights are the same bits."""
    plain = [row["seconds"] for row in rows if row["run"] == "plain"]
    header = [
        "run",
        "seconds",
        "times plain",
        "evaluations",
        "the last took, s",
        "it was said, s",
        "log-evidence, nats",
    ]
    lines = [
        [
            f"`{row['run']}`",
            f"{row['seconds']:.0f}",
            f"{row['seconds'] * len(plain) / sum(plain):.2f}",
            f"{row['evaluations']}",
            f"{row['measured']:.0f}" if row["measured"] else "",
            str(row["predicted"]),
            f"{row['log_evidence']:,.0f} ± {row['stderr'] or 0:.0f}" if row["log_evidence"] else "",
        ]
        for row in rows
    ]
    same = "the same bits" if len({row["weights"] for row in rows}) == 1 else "NOT the same bits"
    return f"{markdown_table(header, lines)}\nThe weights of all runs are {same}.\n"


if __name__ == "__main__":
    main()
