"""Refusals are asserted by what they name: the argument, the value that was given, and the remedy."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lightning_bayes import LaplaceEvidence
from tests.scenarios import loader, trainer

UNSAID = object()
"""A value that a message need not repeat."""


def named(message: str, argument: str = "", got: Any = UNSAID, remedy: str | tuple[str, ...] = ()) -> None:
    """Assert that a message names an argument or subject, `got` as it prints, and every part of the remedy.

    Arguments of the package stand in backticks; `argument` is looked for as it is given.
    """
    assert argument in message, message
    if got is not UNSAID:
        assert f"got {got if isinstance(got, type) else repr(got)}" in message, message
    for words in (remedy,) if isinstance(remedy, str) else remedy:
        assert words in message, message


@contextmanager
def refuses(
    argument: str = "",
    got: Any = UNSAID,
    remedy: str | tuple[str, ...] = (),
    error: type[BaseException] = ValueError,
):
    """The block ends in `error`, whose message names these."""
    with pytest.raises(error) as raised:
        yield raised
    named(str(raised.value), argument, got, remedy)


def fit_refuses(tmp_path, module, argument="", got=UNSAID, remedy=(), *, data=None, callback=None, **kwargs):
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
