"""The options of `python -m lightning_bayes advise`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from typing_extensions import override

PROGRAM = "python -m lightning_bayes"
DESCRIPTION = """\
Which learning rate goes with another batch size (or which batch size with another
learning rate, and what momentum or a larger dataset ask for), so that the noise of
training stays: g = lr (N/B - 1)(1 - d)/(1 - m) for SGD, the square-root rule for Adam."""
EXAMPLES = """\
examples:
  from one GPU to eight:
    python -m lightning_bayes advise --lr 0.1 --batch-size 256 --dataset-size 50000
        --momentum 0.9 --target-batch-size 2048 --devices 8
  is this run as noisy as the one that worked?
    python -m lightning_bayes advise --lr 0.2 --batch-size 512 --dataset-size 50000
        --reference lightning_logs/version_0/scaling_advice.json
  what would that run have to become at another batch size?
    python -m lightning_bayes advise --reference scaling_advice.json
        --target-batch-size 2048"""
# The formulas name their arguments; here these are options.
OPTIONS = {
    "learning_rate": "--lr",
    "batch_size": "--batch-size",
    "dataset_size": "--dataset-size",
    "replicas": "--devices",
    "betas": "--betas",
    "eps": "--eps",
    "momentum": "--momentum",
    "dampening": "--dampening",
    "nesterov": "--nesterov",
    "gradient_noise_scale": "--gradient-noise-scale",
    "largest_eigenvalue": "--largest-eigenvalue",
    "ema_decay": "--ema-decay",
    "reference": "--reference",
    "reduction": "--reduction",
    "averaged_batches": "--averaged-batches",
    "target_learning_rate": "--target-lr",
    "target_batch_size": "--target-batch-size",
    "target_momentum": "--target-momentum",
    "target_dataset_size": "--target-dataset-size",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    top = Parser(prog=PROGRAM, description="Noise scale and scaling advice without a Trainer.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "advise",
        help="what keeps the noise of training when batch size, learning rate, momentum or data change",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _present_options(command.add_argument_group("the run as it is (or --reference alone)"))
    _target_options(command.add_argument_group("what is to change (at least one, or --reference)"))
    _check_options(command.add_argument_group("what is known beside it: each makes a check possible"))
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return top


def number(text: str) -> int | float:
    """A whole number as such: 1e5 is one too."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _present_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lr", dest="learning_rate", type=float, metavar="LR", help="(peak) learning rate")
    group.add_argument(
        "--batch-size", type=number, metavar="B", help="examples per optimizer step, on all devices together"
    )
    group.add_argument("--dataset-size", type=number, metavar="N", help="training examples")
    group.add_argument("--momentum", type=float, metavar="M", help="SGD's momentum (default: 0)")
    group.add_argument("--dampening", type=float, metavar="D", help="SGD's dampening (default: 0)")
    group.add_argument("--nesterov", action="store_true", default=None, help="Nesterov's momentum")
    group.add_argument(
        "--optimizer",
        choices=("sgd", "adam", "adamw", "rmsprop"),
        help="default: sgd; with --reference, that of the reference",
    )
    group.add_argument(
        "--betas",
        type=float,
        nargs="+",
        metavar="BETA",
        help="Adam's betas or RMSprop's alpha (default: 0.9 0.999; 0.99 for rmsprop)",
    )
    group.add_argument(
        "--reduction",
        choices=("mean", "sum"),
        help="of the loss over the examples of a batch (default: mean)",
    )
    group.add_argument(
        "--averaged-batches",
        type=number,
        metavar="K",
        help="with --reduction sum: accumulated batches x devices, whose sums a step averages (default: 1)",
    )
    group.add_argument("--eps", type=float, metavar="EPS", help="Adam's or RMSprop's eps (default: 1e-8)")


def _target_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target-batch-size", type=number, metavar="B", help="examples per optimizer step wanted"
    )
    group.add_argument(
        "--target-lr", dest="target_learning_rate", type=float, metavar="LR", help="learning rate wanted"
    )
    group.add_argument("--target-momentum", type=float, metavar="M", help="momentum wanted; SGD only")
    group.add_argument("--target-dataset-size", type=number, metavar="N", help="training examples wanted")
    group.add_argument(
        "--devices",
        dest="replicas",
        type=number,
        metavar="K",
        help="data-parallel devices that are to share a batch",
    )


def _check_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gradient-noise-scale",
        type=float,
        metavar="B",
        help="B_simple in examples (callback GradientNoiseScale)",
    )
    group.add_argument(
        "--largest-eigenvalue",
        type=float,
        metavar="H",
        help="of the Hessian of the mean loss (callback Stability; divide what it logs of a summed loss by the"
        " examples of a training_step); SGD only",
    )
    group.add_argument("--ema-decay", type=float, metavar="RHO", help="decay of an average of the weights")
    group.add_argument(
        "--reference",
        metavar="PATH",
        help="a known-good run to compare with, and to start from where --lr is not given: scaling_advice.json, a log"
        " directory or a checkpoint",
    )
