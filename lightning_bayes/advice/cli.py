"""`python -m lightning_bayes advise`: the advice of ScalingAdvisor without a Trainer."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console

from lightning_bayes.advice.cli_options import OPTIONS, PROGRAM, parser
from lightning_bayes.advice.optimizer_groups import ParameterGroup
from lightning_bayes.advice.references import Reference, comparisons_with, read_reference
from lightning_bayes.advice.table import advice_renderable
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
from lightning_bayes.functional.advice.trainer_check import with_trainer_check
from lightning_bayes.functional.check import SOLUTION

TARGETS = ("target_batch_size", "target_learning_rate", "target_momentum", "target_dataset_size")
ONLY_SGD = ("momentum", "dampening", "nesterov", "target_momentum", "largest_eigenvalue")
ONLY_ADAM = ("betas", "eps")
LOSS = ("reduction", "averaged_batches")
NEGATIVE = re.compile(r"-(?:\.?\d|inf|nan)", re.IGNORECASE)


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
        known = {name or "reference": value for name, value in reference.groups.items()}
        whole = {name: value for name, value in known.items() if not isinstance(value, int | float)}
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
