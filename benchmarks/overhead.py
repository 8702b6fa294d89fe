"""What the callbacks on noise add to the training step of a 784-800-10 net at B = 64.

    python benchmarks/overhead.py [--rounds 200] [--out docs/benchmarks]

One fit, one process, one thread, float32 SGD with momentum through the Lightning Trainer, random data from memory.
The candidates take turns within the fit, as many steps each as lie between two measurements, in a new random order in
each round, so that what else the machine does falls on all of them; each is set against the plain steps of the same
round. Time is that of the whole loop, loading included: wall time, and processor time of the process, which minds
its neighbours less. The table has medians over the rounds and their quartiles. What a callback's own hooks take is
measured apart, by Lightning's SimpleProfiler in a second fit: it resolves what is too small for a comparison.

Writes `overhead.csv`, with every round, and `overhead.md`.
"""

import argparse
import csv
import logging
import random
import statistics
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import GradientNoiseScale, SGDNoiseScale

SEED, BATCH_SIZE, STEPS_PER_EPOCH = 0, 64, 500
BLOCK = GradientNoiseScale().every_n_steps  # one measurement in each turn
PLAIN = "plain"
TARGETS = {
    "SGDNoiseScale()": 0.01,
    "GradientNoiseScale()": 0.10,
    "GradientNoiseScale(every_n_steps=1)": 1.20,
}
"""What a candidate may add, as a share of the plain step."""
COLUMNS = ("wall_ms", "cpu_ms")


def candidates() -> dict[str, L.Callback]:
    """New callbacks, by name."""
    return {
        "a callback that does nothing": L.Callback(),
        "SGDNoiseScale()": SGDNoiseScale(),
        "GradientNoiseScale()": GradientNoiseScale(),
        "GradientNoiseScale(every_n_steps=1)": GradientNoiseScale(every_n_steps=1, log_key_prefix="each/"),
    }


class Digits(L.LightningModule):
    """The net of the paper's figures."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(28 * 28, 800), nn.ReLU(), nn.Linear(800, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Turns(L.Callback):
    """Gives each candidate its steps, and takes the time."""

    def __init__(self, others: dict[str, L.Callback]) -> None:
        self.others = others
        self.random = random.Random(SEED)
        self.order: list[str] = []
        self.round = -1
        self.current = ""  # all of them: the first block is there to make plans
        self.whole = False  # an epoch began in this block, which takes time of its own
        self.rows: list[dict[str, object]] = []
        self.start = (0.0, 0.0)

    def on_train_epoch_start(self, *_: object) -> None:
        """Leave this block out."""
        self.whole = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """At the end of a block, note its time and hand over."""
        if trainer.global_step % BLOCK:
            return
        wall, cpu = (now - start for now, start in zip(self._now(), self.start, strict=True))
        if self.whole and self.current:
            times = {"wall_ms": f"{wall * 1e3 / BLOCK:.4f}", "cpu_ms": f"{cpu * 1e3 / BLOCK:.4f}"}
            self.rows.append({"candidate": self.current, "round": self.round} | times)
        if not self.order:
            self.round += 1
            self.order = self.random.sample([PLAIN, *self.others], 1 + len(self.others))
        self.current = self.order.pop()
        own = [self.others[self.current]] if self.current != PLAIN else []
        trainer.callbacks = [self, *own]  # a new list: the Trainer is going through the old one
        self.whole, self.start = True, self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def fit(callbacks: list[L.Callback], steps: int, profiler: SimpleProfiler | None = None) -> None:
    """Train for some steps."""
    torch.manual_seed(SEED)
    size = BATCH_SIZE * STEPS_PER_EPOCH
    data = TensorDataset(torch.randn(size, 784), torch.randint(10, (size,)))
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=callbacks,
        profiler=profiler,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), DataLoader(data, BATCH_SIZE, shuffle=True))


def seconds_in_hooks(steps: int = 300) -> dict[str, float]:
    """Each candidate's seconds per step in its own hooks, the first measurement left out."""
    found = {}
    for name, callback in candidates().items():
        profiler = SimpleProfiler()
        fit([callback], steps, profiler)
        durations = [
            sorted(times)[:-1]  # the longest of each hook is that of the first step
            for key, times in profiler.recorded_durations.items()
            if key.startswith(f"[Callback]{callback.state_key}.") and len(times) >= steps
        ]
        found[name] = sum(map(sum, durations)) / (steps - 1)
    return found


def added(rows: list[dict[str, object]], name: str, column: str) -> list[float]:
    """What a candidate adds to the plain steps of the same round, as a share of them."""
    plain = {row["round"]: float(str(row[column])) for row in rows if row["candidate"] == PLAIN}
    own = {row["round"]: float(str(row[column])) for row in rows if row["candidate"] == name}
    return [own[turn] / plain[turn] - 1 for turn in own.keys() & plain.keys()]


def table(rows: list[dict[str, object]], hooks: dict[str, float]) -> str:
    """The results as Markdown."""
    plain = {
        column: statistics.median(float(str(row[column])) for row in rows if row["candidate"] == PLAIN)
        for column in COLUMNS
    }
    lines = [
        f"Plain step: {plain['wall_ms']:.2f} ms (processor time {plain['cpu_ms']:.2f} ms), medians. What each adds "
        f"to it: medians of {1 + max(int(str(row['round'])) for row in rows)} rounds (quartiles in brackets), "
        f"{torch.get_num_threads()} thread, seed {SEED}, torch {torch.__version__}, lightning {L.__version__}.",
        "",
        "| callback | processor time | wall time | in its own hooks | target |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, seconds in hooks.items():
        cells = []
        for column in ("cpu_ms", "wall_ms"):
            low, median, high = statistics.quantiles(added(rows, name, column), n=4)
            cells.append(f"{100 * median:+.1f} % ({100 * low:+.1f} .. {100 * high:+.1f})")
        share = 100 * seconds * 1e3 / plain["wall_ms"]
        target = f"below {100 * TARGETS[name]:.0f} %" if name in TARGETS else ""
        label = f"`{name}`" if name in TARGETS else name
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {share:.2f} % | {target} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    torch.set_num_threads(1)
    turns = Turns(candidates())
    fit([turns, *turns.others.values()], BLOCK * (1 + arguments.rounds * (1 + len(turns.others))))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "overhead.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(turns.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(turns.rows)
    text = table(turns.rows, seconds_in_hooks())
    (arguments.out / "overhead.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
