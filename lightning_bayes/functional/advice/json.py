"""Advice as JSON and back. The schema is in docs/scaling.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_bayes.functional.adam_scaling import AdamConfiguration
from lightning_bayes.functional.advice.adam_advice import AdamAdvice, AdamMove
from lightning_bayes.functional.advice.advise import Advice
from lightning_bayes.functional.advice.compare import Comparison, Restoration
from lightning_bayes.functional.check import Check
from lightning_bayes.functional.configuration import Configuration
from lightning_bayes.functional.scaling import Move

FORMAT = "lightning-bayes scaling advice"
VERSION = 1
# JSON has no such numbers; Python's own writer would put down what no other reader takes.
NON_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
DATA = (Configuration, AdamConfiguration, Advice, AdamAdvice, Move, AdamMove, Check, Comparison, Restoration)


@dataclass(frozen=True)
class SavedAdvice:
    """What a file of advice holds.

    Attributes:
        configurations: the run's own, by parameter groups; what makes the file a reference for later runs.
        advice: one entry per set of parameter groups with the same values; none where nothing was targeted.
        comparisons: with a reference, one entry per set of parameter groups.
    """

    configurations: Mapping[str, Configuration | AdamConfiguration]
    advice: tuple[Advice | AdamAdvice, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def to_json(self) -> str:
        """The file's text: valid JSON, non-finite numbers as the strings "Infinity", "-Infinity" and "NaN"."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "configurations": {name: _encode(entry) for name, entry in self.configurations.items()},
            "advice": [_encode(advice) for advice in self.advice],
            "comparisons": [_encode(comparison) for comparison in self.comparisons],
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> SavedAdvice:
        """What `to_json` wrote.

        Args:
            text: the file's text.

        Returns:
            An equal object.

        Raises:
            ValueError: if the text is not JSON, or not of this format and version.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected scaling advice as JSON, but got what is no JSON: {error}.") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(
                f'Expected scaling advice as JSON with "format": "{FORMAT}", as ScalingAdvisor and'
                " `python -m lightning_bayes advise --json` write it, but got other JSON."
            )
        if document.get("version") != VERSION:
            raise ValueError(
                f"Expected scaling advice of version {VERSION}, but got {document.get('version')!r}: read it with"
                " the release of lightning-bayes that wrote it."
            )
        try:
            return SavedAdvice(
                {name: _configuration(entry) for name, entry in document["configurations"].items()},
                tuple(_advice(entry) for entry in document["advice"]),
                tuple(_comparison(entry) for entry in document["comparisons"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected scaling advice as documented, but a part is missing: {error!r}."
            ) from error


def _encode(value: Any) -> Any:
    """Dataclasses as dicts, with what their readers would otherwise have to compute."""
    if isinstance(value, DATA):
        entry = {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
        return entry | {name: _encode(extra) for name, extra in _computed(value).items()}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value


def _computed(value: Any) -> dict[str, Any]:
    if isinstance(value, Configuration | AdamConfiguration):
        kind = "adam" if isinstance(value, AdamConfiguration) else "sgd"
        return {"optimizer": kind, "noise_scale": value.noise_scale}
    if isinstance(value, Advice | AdamAdvice):
        kind = "adam" if isinstance(value, AdamAdvice) else "sgd"
        return {"optimizer": kind, "summary": value.summary, "verdict": value.verdict}
    if isinstance(value, Move | AdamMove):
        return {"verdict": value.verdict, "range": value.range}
    if isinstance(value, Comparison):
        return {"differs": value.differs, "summary": value.summary}
    return {}


def _number(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _configuration(entry: Mapping[str, Any]) -> Any:
    names = ("learning_rate", "batch_size", "dataset_size")
    common = {name: _number(entry[name]) for name in names}
    # Files from before the reduction was written are taken to be of means, as they were then.
    common |= {name: entry[name] for name in ("reduction", "averaged_batches") if name in entry}
    if entry["optimizer"] == "adam":
        return AdamConfiguration(**common, betas=tuple(entry["betas"]), eps=entry["eps"])
    others = {name: entry[name] for name in ("momentum", "dampening", "nesterov")}
    return Configuration(**common, **others)


def _maybe(entry: Mapping[str, Any] | None) -> Any:
    return None if entry is None else _configuration(entry)


def _checks(entry: Sequence[Mapping[str, Any]]) -> tuple[Check, ...]:
    return tuple(
        Check(
            **{
                name: value if name in ("name", "sentence") else _number(value)
                for name, value in check.items()
            }
        )
        for check in entry
    )


def _advice(entry: Mapping[str, Any]) -> Advice | AdamAdvice:
    rest = {name: entry[name] for name in ("equation", "name", "targets")} | {"notes": tuple(entry["notes"])}
    present, unchanged = _configuration(entry["present"]), _maybe(entry["unchanged"])
    if entry["optimizer"] == "adam":
        adam = tuple(
            AdamMove(
                move["solved_for"],
                _maybe(move["advised"]),
                tuple(move["why"]),
                _maybe(move["linear"]),
                _checks(move["checks"]),
                _maybe(move.get("safe")),
                tuple(move.get("limited_by", ())),
            )
            for move in entry["moves"]
        )
        return AdamAdvice(present=present, unchanged=unchanged, moves=adam, **rest)
    sgd = tuple(
        Move(
            move["solved_for"],
            _maybe(move["exact"]),
            _maybe(move["linear"]),
            tuple(move["why"]),
            _checks(move["checks"]),
            _maybe(move.get("safe")),
            tuple(move.get("limited_by", ())),
        )
        for move in entry["moves"]
    )
    return Advice(present=present, unchanged=unchanged, moves=sgd, **rest)


def _comparison(entry: Mapping[str, Any]) -> Comparison:
    restorations = tuple(
        Restoration(change["quantity"], _number(change["value"]), _number(change["noise_scale"]))
        for change in entry["restorations"]
    )
    return Comparison(
        _configuration(entry["present"]),
        _maybe(entry["reference"]),
        _number(entry["reference_noise_scale"]),
        restorations,
        _maybe(entry["expected"]),
        entry["name"],
        entry["source"],
    )
