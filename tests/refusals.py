"""Refusals are asserted by what they name: the argument, the value that was given, and the remedy."""

from collections.abc import Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import pytest
import torch

from lightning_bayes import LaplaceEvidence
from tests import situations
from tests.scenarios import loader, trainer

Words = str | Sequence[str]


class Unsaid(Enum):
    """A value that a message need not repeat; by its name in the names of tests."""

    UNSAID = "unsaid"


UNSAID = Unsaid.UNSAID


def named(message: str, argument: Words, got: Any = UNSAID, remedy: Words = ()) -> None:
    """Assert that a message names an argument or another subject, the value as it prints, and the remedy.

    Of each there may be several words, which stand anywhere and are no pattern.
    """
    for words in (argument, remedy):
        for word in (words,) if isinstance(words, str) else words:
            assert word in message, message
    if got is not UNSAID:
        assert f"got {got!r}" in message, message


@contextmanager
def refuses(argument: Words, got: Any = UNSAID, remedy: Words = (), error: type[BaseException] = ValueError):
    """The block ends in `error`, whose message names these."""
    with pytest.raises(error) as raised:
        yield raised
    situations.refused(str(raised.value))
    named(str(raised.value), argument, got, remedy)


def fit_refuses(tmp_path, module, argument, got=UNSAID, remedy=(), *, data=None, callback=None, **kwargs):
    """Under on_error="raise", fit ends in a ValueError that names these, before anything has changed."""
    callbacks = callback if isinstance(callback, list) else [callback or LaplaceEvidence()]
    for each in callbacks:
        each.on_error = "raise"
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer(tmp_path, callbacks, **kwargs)
    with refuses(argument, got, remedy):
        run.fit(module, loader() if data is None else data)
    assert run.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
