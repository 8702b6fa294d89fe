"""`python -m lightning_bayes advise`: the advice of ScalingAdvisor without a Trainer."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from rich.console import Console
from typing_extensions import override

from lightning_bayes.advising.parameter_groups import ParameterGroup
from lightning_bayes.advising.references import Reference, comparisons_with, read_reference
from lightning_bayes.advising.table import advice_renderable
from lightning_bayes.functional import (
    AdamAdvice,
    AdamConfiguration,
    Advice,
    Configuration,
    SavedAdvice,
    advise,
    advise_adam,
)
from lightning_bayes.functional._validation import count, positive
from lightning_bayes.functional.check import SOLUTION
from lightning_bayes.functional.layout import with_trainer_check

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
TARGETS = ("target_batch_size", "target_learning_rate", "target_momentum", "target_dataset_size")
ONLY_SGD = ("momentum", "dampening", "nesterov", "target_momentum", "largest_eigenvalue")
ONLY_ADAM = ("betas", "eps")
LOSS = ("reduction", "averaged_batches")
NEGATIVE = re.compile(r"-(?:\.?\d|inf|nan)", re.IGNORECASE)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 where what is asked for is impossible, with the reason on stderr. Wrong input exits
        with 2 and one line on stderr, as argparse does.
    """
    command = parser()
    given = vars(command.parse_args(_with_negatives(sys.argv[1:] if argv is None else argv)))
    try:
        saved = _saved(given)
    except ValueError as error:
        command.exit(2, f"{PROGRAM} advise: {_with_options(str(error))}\n")
    if given["json"]:
        sys.stdout.write(saved.to_json() + "\n")
    else:
        Console().print(advice_renderable(saved.advice, saved.comparisons))
    impossible = [
        piece for piece in saved.advice if all(move.verdict == "impossible" for move in piece.moves)
    ]
    for piece in impossible:
        reason = next(check.sentence for check in piece.checks if check.name == SOLUTION)
        sys.stderr.write(f"{PROGRAM} advise: {_with_options(reason)}\n")
    return 1 if impossible else 0


def _with_negatives(argv: Sequence[str]) -> list[str]:
    """The arguments with negative numbers joined to their options: argparse takes -1e-3 and -inf for options."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and NEGATIVE.match(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _saved(given: Mapping[str, object]) -> SavedAdvice:
    """What is asked for, as it would be saved."""
    reference = None if given["reference"] is None else read_reference(str(given["reference"]))
    configurations = _configurations(given, reference)
    targets = {name: given[name] for name in TARGETS if given[name] is not None}
    if not targets and reference is None:
        options = ", ".join(OPTIONS[name] for name in TARGETS)
        raise ValueError(
            f"nothing is to change: give at least one of {options}, or --reference to compare with"
        )
    if not targets and given["learning_rate"] is None:
        raise ValueError(
            "--reference alone has nothing to be compared with: give --lr and the rest, or a target"
        )
    measured = {
        name: given[name] for name in ("gradient_noise_scale", "ema_decay") if given[name] is not None
    }
    advice = []
    if targets:
        for name, configuration in configurations.items():
            advice.append(_advice(name, configuration, targets | measured, given))
    comparisons = []
    if reference is not None and given["learning_rate"] is not None:
        groups = [ParameterGroup(name, configuration) for name, configuration in configurations.items()]
        comparisons = comparisons_with(reference, groups)
    return SavedAdvice(configurations, tuple(advice), tuple(comparisons))


def _advice(
    name: str,
    configuration: Configuration | AdamConfiguration,
    arguments: Mapping[str, object],
    given: Mapping[str, object],
) -> Advice | AdamAdvice:
    layout = {} if given["replicas"] is None else {"replicas": given["replicas"]}
    if isinstance(configuration, AdamConfiguration):
        adam = advise_adam(configuration, name=name, **arguments)  # type: ignore[arg-type]
        return with_trainer_check(adam, **layout) if layout else adam  # type: ignore[arg-type]
    sgd = advise(configuration, name=name, largest_eigenvalue=given["largest_eigenvalue"], **arguments)  # type: ignore[arg-type]
    return with_trainer_check(sgd, **layout) if layout else sgd  # type: ignore[arg-type]


def _configurations(
    given: Mapping[str, object], reference: Reference | None
) -> dict[str, Configuration | AdamConfiguration]:
    """The run as it is: from the options, or the reference where it is given alone."""
    own = ("learning_rate", "batch_size", "dataset_size", "optimizer", *ONLY_SGD[:3], *ONLY_ADAM, *LOSS)
    options = [OPTIONS.get(name, f"--{name}") for name in own if given[name] is not None]
    if reference is not None and not options:
        known = {name or "reference": found for name, found in reference.groups.items()}
        whole = {name: found for name, found in known.items() if not isinstance(found, int | float)}
        if not whole:
            raise ValueError(
                f"{reference.source} holds a noise scale and no configuration: give --lr, --batch-size and the rest"
            )
        _refuse(given, reference.adaptive)
        return whole
    optimizer = given["optimizer"]
    if optimizer is None:
        optimizer = "adam" if reference is not None and reference.adaptive else "sgd"
    adaptive = optimizer != "sgd"
    needed = ("learning_rate", "batch_size") if adaptive else ("learning_rate", "batch_size", "dataset_size")
    missing = [OPTIONS[name] for name in needed if given[name] is None]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    _refuse(given, adaptive)
    names = ("learning_rate", "batch_size", "dataset_size", *(ONLY_ADAM if adaptive else ONLY_SGD[:3]), *LOSS)
    values = {name: given[name] for name in names if given[name] is not None}
    positive(
        "learning_rate", values["learning_rate"]
    )  # a schedule passes through 0, what is given here does not
    if "averaged_batches" in values and values.get("reduction") != "sum":
        raise ValueError("--averaged-batches goes with --reduction sum: for a mean it does not matter")
    for name in ("batch_size", "dataset_size", "averaged_batches"):
        if name in values:
            values[name] = count(name, values[name])
    if values.get("dampening") and not values.get("momentum"):
        raise ValueError("--dampening needs --momentum: torch.optim.SGD ignores it without")
    if not adaptive:
        return {"SGD": Configuration(**values)}  # type: ignore[arg-type]
    default = (0.99,) if optimizer == "rmsprop" else (0.9, 0.999)
    values["betas"] = tuple(values.get("betas", default))  # type: ignore[arg-type]
    return {{"adam": "Adam", "adamw": "AdamW"}.get(str(optimizer), "RMSprop"): AdamConfiguration(**values)}  # type: ignore[arg-type]


def _refuse(given: Mapping[str, object], adaptive: bool) -> None:
    """Options of one kind of optimizer mean nothing to the other."""
    wrong = [OPTIONS[name] for name in (ONLY_SGD if adaptive else ONLY_ADAM) if given[name] is not None]
    if wrong:
        kind = (
            "SGD only, and the optimizer is Adam-like"
            if adaptive
            else "Adam and RMSprop only: add --optimizer adam"
        )
        raise ValueError(f"{', '.join(wrong)}: for {kind}")


def _with_options(message: str) -> str:
    """An error of the formulas, in one line, with the names of options for those of arguments."""

    def option(match: re.Match[str]) -> str:
        return OPTIONS.get(match[1], match[0])

    return " ".join(re.sub(r"`(\w+)`", option, message).replace("Expected argument ", "expected ").split())
