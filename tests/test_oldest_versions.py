"""The constraints that the suite is also run with are the oldest versions that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([a-z0-9-]+)==([0-9.]+?)(?:\.post\d+)?(?:\s|$)", re.MULTILINE)
BOUND = re.compile(r"([a-z0-9-]+)>=([0-9.]+)")


def release(version):
    """Its numbers, without zeros at the end: 2.4 is 2.4.0."""
    return tuple(int(part) for part in re.sub(r"(\.0)+$", "", version).split("."))


def test_every_declared_bound_is_the_version_that_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["test"]
    bounds = dict(BOUND.fullmatch(requirement).groups() for requirement in declared)
    assert len(bounds) > 15
    pins = dict(PIN.findall((ROOT / ".ci" / "oldest.txt").read_text()))
    tested = {name: release(pins[name]) for name in bounds}
    assert tested == {name: release(bound) for name, bound in bounds.items()}
