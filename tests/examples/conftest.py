"""Fixtures for the example of Smith & Le: what its command leaves behind, and pools that start fast."""

import contextlib
import io
from multiprocessing import get_context
from pathlib import Path

import pytest

from examples.smith_le_2018 import cli, sweep, trials
from tests.examples.digits import TINY


@pytest.fixture(scope="session")
def tiny_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of every figure at tiny settings, to be read only, and what the command printed."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setitem(cli.PRESETS, "quick", TINY)
        cli.main(["all", "--results", str(folder), "--workers", "1"])
    return folder, printed.getvalue()


@pytest.fixture
def forked_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools whose processes need not import torch each: forked from a server that has done nothing else."""
    server = get_context("forkserver")
    server.set_forkserver_preload(["tests.examples.preloaded"])
    for module in (sweep, trials):
        monkeypatch.setattr(module, "get_context", lambda method: server)
