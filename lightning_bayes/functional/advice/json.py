"""Advice as JSON and back. The schema is in docs/scaling.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_bayes.functional.advice.advice import Advice
from lightning_bayes.functional.advice.compare import Comparison
from lightning_bayes.functional.configuration import AnyConfiguration

FORMAT = "lightning-bayes scaling advice"
VERSION = 1
# JSON has no such numbers; Python's own writer would put down what no other reader takes.
NON_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
# What a field is called in files of earlier versions: a move of SGD had no "advised" beside "exact".
EARLIER_NAMES = {"advised": "exact"}
# Fields that files of earlier versions do not have, which get their defaults; every other one must be there.
LATER_FIELDS = {"reduction", "averaged_batches", "safe", "limited_by"}


@dataclass(frozen=True)
class SavedAdvice:
    """What a file of advice holds.

    Attributes:
        configurations: the run's own, by parameter groups; what makes the file a reference for later runs.
        advice: one entry per set of parameter groups with the same values; none where nothing was targeted.
        comparisons: with a reference, one entry per set of parameter groups.
    """

    configurations: Mapping[str, AnyConfiguration]
    advice: tuple[Advice[Any], ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def to_json(self) -> str:
        """The file's text: valid JSON, non-finite numbers as the strings "Infinity", "-Infinity" and "NaN"."""
        document = {"format": FORMAT, "version": VERSION, **_encode(self)}
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
            saved: SavedAdvice = _decode(SavedAdvice, document)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected scaling advice as documented, but a part is missing: {error!r}."
            ) from error
        return saved


def _encode(value: Any) -> Any:
    """Dataclasses as dicts of their fields, with what their readers would otherwise have to compute."""
    if is_dataclass(value):
        names = [*(field.name for field in fields(value)), *getattr(value, "SAVED_TOO", ())]
        return {name: _encode(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in NON_FINITE.items() if str(number) == str(value))
    return value


def _decode(kind: Any, value: Any) -> Any:
    """A value of the annotated type.

    Raises:
        LookupError: If a field is missing.
        TypeError: If the value is of another type.
    """
    members = _members(kind)
    records = [get_origin(one) or one for one in members if is_dataclass(get_origin(one) or one)]
    if value is None and type(None) in members:
        return None
    shape = _shape(members, records)
    if not isinstance(value, shape):
        raise TypeError(f"expected a JSON {'object' if shape is Mapping else 'array'}, got {value!r}")
    if isinstance(value, Mapping) and records:
        # Two kinds of configuration are told apart by their optimizer.
        record = records[0]
        if len(records) > 1:
            record = {one.optimizer: one for one in records}[value["optimizer"]]
        entry = {**{name: value[old] for name, old in EARLIER_NAMES.items() if old in value}, **value}
        hints = get_type_hints(record)
        names = [
            field.name for field in fields(record) if field.name in entry or field.name not in LATER_FIELDS
        ]
        return record(**{name: _decode(hints[name], entry[name]) for name in names})
    if isinstance(value, Mapping):
        return {key: _decode(get_args(kind)[1], item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_decode(get_args(kind)[0], item) for item in value)
    return NON_FINITE.get(value, value) if isinstance(value, str) and float in members else value


def _shape(members: list[Any], records: list[Any]) -> type:
    """What JSON has in the place of such a value: an object, an array, or anything that stands by itself."""
    if records or any(get_origin(one) is Mapping for one in members):
        return Mapping
    return list if any(get_origin(one) is tuple for one in members) else object


def _members(kind: Any) -> list[Any]:
    """What a value of the annotated type may be: the members of a union, for a variable those of its bound."""
    if isinstance(kind, TypeVar):
        return _members(kind.__bound__)
    if get_origin(kind) in (Union, UnionType):
        return [member for one in get_args(kind) for member in _members(one)]
    return [kind]
