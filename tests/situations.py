"""What people's training runs do, and what came of each: docs/situations.md, from the tests' own outcome.

    pytest -m situation --situations=docs/situations.md

A test that is marked `situation("title")` adds a line for each of its parameters, once it has passed: supported,
where its numbers are those of an independent reference, or refused, with the message that it has noted by `refused`.
"""

from collections import defaultdict
from pathlib import Path

import pytest

MESSAGES: list[str] = []
"""Of the test that runs, what it was told; a test may be refused more than once."""
LONGEST = 240


def refused(message: str) -> None:
    """Note what a user is told in the situation that is tested."""
    MESSAGES.append(message)


def note(item: pytest.Item) -> None:
    """Hand what a test has seen to the process that writes the table."""
    marker = item.get_closest_marker("situation")
    if marker is not None:
        name = getattr(item, "callspec").id if hasattr(item, "callspec") else item.name  # noqa: B009
        item.user_properties.append(("situation", [*marker.args, name, MESSAGES[0] if MESSAGES else ""]))
    MESSAGES.clear()


class Table:
    """The lines that come in, test by test; written at the end.

    Args:
        path: Of the Markdown.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one test, of whichever process."""
        if report.when == "call" and report.passed:
            for key, value in report.user_properties:
                if key == "situation":
                    title, name, message = value
                    self._lines[title][name] = message

    def pytest_sessionfinish(self) -> None:
        """Write the table."""
        number = sum(map(len, self._lines.values()))
        told = sum(bool(message) for lines in self._lines.values() for message in lines.values())
        parts = [
            "# What is supported, and what is refused\n",
            f"Written by the tests, `pytest -m situation --situations=docs/situations.md`. {number} situations: "
            f"{number - told} give a number that is held against an independent one, {told} are refused with a "
            'message; training goes on after it, unless `on_error="raise"`.\n',
        ]
        for title in sorted(self._lines):
            parts.append(f"## {title}\n\n| situation | what comes of it |\n|---|---|")
            parts += [
                f"| {name} | {_outcome(message)} |" for name, message in sorted(self._lines[title].items())
            ]
            parts.append("")
        self._path.write_text("\n".join(parts), encoding="utf-8")


def _outcome(message: str) -> str:
    if not message:
        return "supported"
    text = " ".join(message.split()).replace("|", "\\|")
    return f"refused: {text if len(text) <= LONGEST else text[:LONGEST] + '…'}"
