"""`python -m lightning_bayes advise`: the advice of ScalingAdvisor without a Trainer."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from rich.console import Console
from typing_extensions import override

from lightning_bayes.advice.optimizer_groups import ParameterGroup
from lightning_bayes.advice.references import Reference, comparisons_with, read_reference
from lightning_bayes.advice.table import advice_renderable
from lightning_bayes.functional import AdamConfiguration, Configuration, SavedAdvice, advise
from lightning_bayes.functional._validation import count, positive
from lightning_bayes.functional.advice.trainer_check import with_trainer_check
from lightning_bayes.functional.check import SOLUTION
from lightning_bayes.functional.configuration import AnyConfiguration

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
NEGATIVE = re.compile(r"-(?:\.?\d|inf|nan)", re.IGNORECASE)


def number(text: str) -> int | float:
    """A whole number as such: 1e5 is one too."""
    value = float(text)
    return int(value) if value.is_integer() else value


class Option(NamedTuple):
    """An option of the command.

    Attributes:
        flag: as it is typed.
        help: what it is.
        settings: of argparse.
        only: the kind of optimizer that it means something to, "sgd" or "adam"; empty for both.
    """

    flag: str
    help: str
    settings: Mapping[str, Any]
    only: str = ""


# What the command calls each optimizer: its name, and the decay rates that torch gives it.
OPTIMIZERS: dict[str, tuple[str, tuple[float, ...]]] = {
    "sgd": ("SGD", ()),
    "adam": ("Adam", (0.9, 0.999)),
    "adamw": ("AdamW", (0.9, 0.999)),
    "rmsprop": ("RMSprop", (0.99,)),
}


def _real(metavar: str) -> dict[str, Any]:
    return {"type": float, "metavar": metavar}


def _whole(metavar: str) -> dict[str, Any]:
    return {"type": number, "metavar": metavar}


# By the arguments of the formulas, whose errors name them.
RUN = {
    "learning_rate": Option("--lr", "(peak) learning rate", _real("LR")),
    "batch_size": Option("--batch-size", "examples per optimizer step, on all devices together", _whole("B")),
    "dataset_size": Option("--dataset-size", "training examples", _whole("N")),
    "momentum": Option("--momentum", "SGD's momentum (default: 0)", _real("M"), "sgd"),
    "dampening": Option("--dampening", "SGD's dampening (default: 0)", _real("D"), "sgd"),
    "nesterov": Option("--nesterov", "Nesterov's momentum", {"action": "store_true", "default": None}, "sgd"),
    "optimizer": Option(
        "--optimizer",
        "default: sgd; with --reference, that of the reference",
        {"choices": tuple(OPTIMIZERS)},
    ),
    "betas": Option(
        "--betas",
        "Adam's betas or RMSprop's alpha (default: 0.9 0.999; 0.99 for rmsprop)",
        {**_real("BETA"), "nargs": "+"},
        "adam",
    ),
    "reduction": Option(
        "--reduction",
        "of the loss over the examples of a batch (default: mean)",
        {"choices": ("mean", "sum")},
    ),
    "averaged_batches": Option(
        "--averaged-batches",
        "with --reduction sum: accumulated batches x devices, whose sums a step averages (default: 1)",
        _whole("K"),
    ),
    "eps": Option("--eps", "Adam's or RMSprop's eps (default: 1e-8)", _real("EPS"), "adam"),
}
TARGETS = {
    "target_batch_size": Option("--target-batch-size", "examples per optimizer step wanted", _whole("B")),
    "target_learning_rate": Option("--target-lr", "learning rate wanted", _real("LR")),
    "target_momentum": Option("--target-momentum", "momentum wanted; SGD only", _real("M"), "sgd"),
    "target_dataset_size": Option("--target-dataset-size", "training examples wanted", _whole("N")),
}
LAYOUT = {"replicas": Option("--devices", "data-parallel devices that are to share a batch", _whole("K"))}
MEASURED = {
    "gradient_noise_scale": Option(
        "--gradient-noise-scale", "B_simple in examples (callback GradientNoiseScale)", _real("B")
    ),
    "largest_eigenvalue": Option(
        "--largest-eigenvalue",
        "of the Hessian of the mean loss (callback Stability; divide what it logs of a summed loss by the examples of"
        " a training_step); SGD only",
        _real("H"),
        "sgd",
    ),
    "ema_decay": Option("--ema-decay", "decay of an average of the weights", _real("RHO")),
}
KNOWN_GOOD = {
    "reference": Option(
        "--reference",
        "a known-good run to compare with, and to start from where --lr is not given: scaling_advice.json, a log"
        " directory or a checkpoint",
        {"metavar": "PATH"},
    )
}
GROUPS = {
    "the run as it is (or --reference alone)": RUN,
    "what is to change (at least one, or --reference)": TARGETS | LAYOUT,
    "what is known beside it: each makes a check possible": MEASURED | KNOWN_GOOD,
}
OPTIONS = {name: option for group in GROUPS.values() for name, option in group.items()}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog=PROGRAM, description="Noise scale and scaling advice without a Trainer.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "advise",
        help="what keeps the noise of training when batch size, learning rate, momentum or data change",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, options in GROUPS.items():
        group = command.add_argument_group(title)
        for name, option in options.items():
            group.add_argument(option.flag, dest=name, help=option.help, **option.settings)
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 where what is asked for is impossible, with the reason on stderr. Wrong input exits
        with 2 and one line on stderr, as argparse does.
    """
    command = parser()
    parsed = vars(command.parse_args(_with_negatives(sys.argv[1:] if argv is None else argv)))
    try:
        saved = _saved({name: parsed[name] for name in OPTIONS if parsed[name] is not None})
    except ValueError as error:
        command.exit(2, f"{PROGRAM} advise: {_with_options(str(error))}\n")
    if parsed["json"]:
        sys.stdout.write(saved.to_json() + "\n")
    else:
        Console().print(advice_renderable(saved.advice, saved.comparisons))
    status = 0
    for piece in saved.advice:
        if all(move.verdict == "impossible" for move in piece.moves):
            status, reasons = 1, [check.sentence for check in piece.checks if check.name == SOLUTION]
            sys.stderr.write(f"{PROGRAM} advise: {_with_options(reasons[0])}\n")
    return status


def _with_negatives(argv: Sequence[str]) -> list[str]:
    """The arguments with negative numbers joined to their options: argparse takes -1e-3 and -inf for options."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and NEGATIVE.match(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _with_options(message: str) -> str:
    """An error of the formulas, in one line, with the names of options for those of arguments."""
    for name, option in OPTIONS.items():
        message = message.replace(f"`{name}`", option.flag)
    return " ".join(message.replace("Expected argument ", "expected ").split())


def _saved(given: Mapping[str, Any]) -> SavedAdvice:
    """What is asked for, as it would be saved."""
    reference = read_reference(given["reference"]) if "reference" in given else None
    configurations = _configurations(given, reference)
    targets = _named(given, TARGETS)
    if not targets and reference is None:
        flags = ", ".join(option.flag for option in TARGETS.values())
        raise ValueError(
            f"nothing is to change: give at least one of {flags}, or --reference to compare with"
        )
    if not targets and "learning_rate" not in given:
        raise ValueError(
            "--reference alone has nothing to be compared with: give --lr and the rest, or a target"
        )
    advice = []
    for name, configuration in configurations.items() if targets else ():
        piece = advise(configuration, name=name, **targets, **_named(given, MEASURED))
        advice.append(with_trainer_check(piece, **_named(given, LAYOUT)) if "replicas" in given else piece)
    comparisons = []
    if reference is not None and "learning_rate" in given:
        groups = [ParameterGroup(name, configuration) for name, configuration in configurations.items()]
        comparisons = comparisons_with(reference, groups)
    return SavedAdvice(configurations, tuple(advice), tuple(comparisons))


def _named(given: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    return {name: given[name] for name in options if name in given}


def _configurations(given: Mapping[str, Any], reference: Reference | None) -> dict[str, AnyConfiguration]:
    """The run as it is: from the options, or the reference where it is given alone."""
    values = _named(given, RUN)
    optimizer = values.get("optimizer", "adam" if reference is not None and reference.adaptive else "sgd")
    other, kind = "sgd", "SGD only, and the optimizer is Adam-like"
    if optimizer == "sgd":
        other, kind = "adam", "Adam and RMSprop only: add --optimizer adam"
    wrong = [OPTIONS[name].flag for name in given if OPTIONS[name].only == other]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: for {kind}")
    if reference is None or values:
        return {OPTIMIZERS[optimizer][0]: _configuration(values, optimizer)}
    known = {name or "reference": value for name, value in reference.groups.items()}
    whole = {name: value for name, value in known.items() if not isinstance(value, int | float)}
    if not whole:
        raise ValueError(
            f"{reference.source} holds a noise scale and no configuration: give --lr, --batch-size and the rest"
        )
    return whole


def _configuration(values: dict[str, Any], optimizer: str) -> AnyConfiguration:
    """The run that the options describe."""
    needed = ("learning_rate", "batch_size", "dataset_size")[: 3 if optimizer == "sgd" else 2]
    missing = [OPTIONS[name].flag for name in needed if name not in values]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    # A schedule passes through 0, what is given here does not.
    positive("learning_rate", values["learning_rate"])
    if "averaged_batches" in values and values.get("reduction") != "sum":
        raise ValueError("--averaged-batches goes with --reduction sum: for a mean it does not matter")
    if values.get("dampening") and not values.get("momentum"):
        raise ValueError("--dampening needs --momentum: torch.optim.SGD ignores it without")
    sizes = {name for name in ("batch_size", "dataset_size", "averaged_batches") if name in values}
    values = {
        name: count(name, x) if name in sizes else x for name, x in values.items() if name != "optimizer"
    }
    if optimizer == "sgd":
        return Configuration(**values)
    return AdamConfiguration(**values | {"betas": tuple(values.get("betas", OPTIMIZERS[optimizer][1]))})
