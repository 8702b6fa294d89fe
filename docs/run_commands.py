"""Puts the output of the commands in a page below them: `python docs/run_commands.py docs/scaling.md`."""

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

from lightning_bayes.advice.cli import main

BLOCK = re.compile(
    r"```console\n\$ python -m lightning_bayes (?P<arguments>(?:.*\\\n)*.*)\n(?P<output>(?:.*\n)*?)```\n"
)


def refreshed(page: str) -> str:
    """The page with the output of each command as it is now, in 80 columns."""
    return BLOCK.sub(
        lambda match: f"```console\n$ python -m lightning_bayes {match[1]}\n{_output(match[1])}```\n", page
    )


def _output(arguments: str) -> str:
    printed = io.StringIO()
    os.environ["COLUMNS"] = "80"
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        contextlib.suppress(SystemExit),
    ):
        main(shlex.split(arguments.replace("\\\n", " ")))
    return "".join(
        f"{line.rstrip()}\n" for line in printed.getvalue().strip("\n").splitlines() if line.strip()
    )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")
