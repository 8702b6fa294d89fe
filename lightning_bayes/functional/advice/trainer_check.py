"""How a Trainer makes up a batch: loader, accumulation, replicas."""

from __future__ import annotations

from dataclasses import replace

from lightning_bayes.functional._validation import count
from lightning_bayes.functional.advice.advice import Advice, Move
from lightning_bayes.functional.advice.advise import RULES
from lightning_bayes.functional.advice.rule import Rule
from lightning_bayes.functional.check import Check
from lightning_bayes.functional.configuration import Configuration, ConfigurationType, Targets


def trainer_check(
    batch_size: float,
    *,
    loader_batch_size: int | None = None,
    accumulate_grad_batches: int = 1,
    replicas: int = 1,
) -> Check:
    """Whether and how a Trainer can take batches of a given size.

    B = loader's batch size x accumulated batches x replicas

    Args:
        batch_size: B, examples per optimizer step; rounded to a whole number.
        loader_batch_size: batch size of the DataLoader of one replica, at present; None if unknown.
        accumulate_grad_batches: at present.
        replicas: data-parallel processes, each with a DataLoader of its own.

    Returns:
        The check "trainer". Its value is the number of batches to accumulate, with the loader as it is or, at 1,
        with a new batch size of the loader.

    Raises:
        ValueError: naming the argument that is not a whole number of at least 1.
    """
    count("accumulate_grad_batches", accumulate_grad_batches)
    replicas = count("replicas", replicas)
    whole = max(1, round(batch_size))
    if whole % replicas:
        below = whole - whole % replicas
        choice = f"{below} or {below + replicas}" if below else str(replicas)
        return Check(
            "trainer",
            False,
            whole / replicas,
            None,
            f"A batch of {whole} does not divide among {replicas} replicas: take {choice}.",
        )
    share = whole // replicas
    each = f" on each of the {replicas} devices" if replicas > 1 else ""
    if loader_batch_size is None or share % count("loader_batch_size", loader_batch_size):
        sentence = (
            f"The Trainer can: DataLoader(batch_size={share}){each}, or a divisor of it and accumulation."
        )
        return Check("trainer", False, 1, None, sentence, action=True)
    accumulated = share // loader_batch_size
    if accumulated == accumulate_grad_batches:
        return Check("trainer", True, accumulated, None, "The Trainer stays as it is.", action=True)
    sentence = (
        f"The Trainer can: accumulate_grad_batches={accumulated} with the DataLoader's"
        f" batch_size={loader_batch_size}{each}{_spread(share) if replicas == 1 else ''}."
    )
    return Check("trainer", False, accumulated, None, sentence, action=True)


def with_trainer_check(
    advice: Advice[ConfigurationType],
    *,
    loader_batch_size: int | None = None,
    accumulate_grad_batches: int = 1,
    replicas: int = 1,
) -> Advice[ConfigurationType]:
    """The advice with `trainer_check` added to each move that has a solution."""
    moves = []
    for move in advice.moves:
        changed = move
        if move.advised is not None:
            added = trainer_check(
                move.advised.batch_size,
                loader_batch_size=loader_batch_size,
                accumulate_grad_batches=accumulate_grad_batches,
                replicas=replicas,
            )
            if isinstance(move.advised, Configuration) and move.advised.reduction == "sum":
                added = _summed_check(added, move.advised, replicas)
            limits = (*move.limited_by, added.name) if added.status == "fails" else move.limited_by
            changed = replace(move, checks=(added, *move.checks), limited_by=limits)
        if move.safe is not None and max(1, round(move.safe.batch_size)) % replicas:
            changed = replace(changed, safe=_divisible(advice, move, replicas))
        moves.append(changed)
    return replace(advice, moves=tuple(moves))


def _divisible(
    advice: Advice[ConfigurationType], move: Move[ConfigurationType], replicas: int
) -> ConfigurationType | None:
    """The largest move within one that is safe whose batch divides among replicas; None where there is none."""
    target, present = advice.targets.get("batch_size"), advice.present
    if move.solved_for != "learning_rate" or target is None or move.safe is None:
        return None
    whole = max(1, round(move.safe.batch_size))
    grows = target > present.batch_size
    batch = whole - whole % replicas if grows else whole - whole % replicas + replicas
    if (batch <= present.batch_size) if grows else (batch >= present.batch_size):
        return None
    rule: Rule[ConfigurationType] = RULES[present.optimizer]
    return rule.solve(present, Targets(**{**advice.targets, "batch_size": batch}), move.solved_for)  # type: ignore[arg-type]


def _summed_check(check: Check, solution: Configuration, replicas: int) -> Check:
    """How a Trainer takes a batch whose loss is summed: what it averages over is part of the learning rate."""
    whole, averaged = max(1, round(solution.batch_size)), solution.averaged_batches
    if whole % replicas or check.passed:  # it does not divide, or nothing changes
        return check
    if whole % averaged == 0 and averaged % replicas == 0:
        each = f" on each of the {replicas} devices" if replicas > 1 else ""
        sentence = (
            f"The Trainer can: DataLoader(batch_size={whole // averaged}){each} and"
            f" accumulate_grad_batches={averaged // replicas}, for which the learning rate is; with k times the"
            " batches averaged, on a batch of the loader that is smaller by as much, it is k times as large."
        )
        return replace(check, value=averaged // replicas, sentence=sentence, passed=False, action=True)
    rate = solution.learning_rate * replicas / averaged
    sentence = (
        f"The Trainer can: DataLoader(batch_size={whole // replicas}) on each of the {replicas} devices without"
        f" accumulation, where the learning rate of the sum is {rate:.6g}."
    )
    return replace(check, value=1, sentence=sentence, passed=False, action=True)


def _spread(batch_size: int) -> str:
    """The other way to a larger batch: the most of 8, 4 and 2 devices that it divides among."""
    for devices in (8, 4, 2):
        if batch_size % devices == 0:
            return f"; or devices={devices} with batch_size={batch_size // devices} in the DataLoader of each"
    return ""
