"""Imports run one way: examples -> callbacks -> laplace -> curvature -> functional -> torch."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_bayes"
RANKS = {
    "functional": 0,
    "curvature": 1,
    "advising": 1,
    "evidence": 1,
    "options": 2,
    "intake": 2,
    "pairs": 2,
    "totals": 2,
    "prior_choice": 2,
    "evaluation": 2,
    "laplace": 2,
    "curve": 2,
    "refitting": 2,
    "stability": 2,
    "eigenvalue": 2,
    "callbacks": 3,
    "__main__": 3,
    "examples": 4,
}
"""A module may import modules of its own rank and below; `evidence` is the plain result of `laplace`."""
ALLOWED_IN_FUNCTIONAL = sys.stdlib_module_names | {"torch"}


SOURCES = [path for folder in (PACKAGE, "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


def part_of(module: str) -> str | None:
    """Layer of a dotted name, None for what is outside."""
    first, *rest = module.split(".")
    if first == PACKAGE:
        return rest[0] if rest else None
    return first if first == "examples" else None


def imports_of(source: str, module: str) -> set[str]:
    """Dotted names of everything that is imported anywhere in a module, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{parent}.{alias.name}" for alias in node.names}
    return found


def violations(source: str, module: str) -> list[str]:
    """What a module imports that it must not."""
    wrong = []
    layer = part_of(module)
    for name in sorted(imports_of(source, module)):
        top, target = name.split(".")[0], part_of(name)
        if layer in RANKS and target in RANKS and RANKS[target] > RANKS[layer]:
            wrong.append(f"{module} imports {name}, which is above it")
        if layer in RANKS and layer != "examples" and top == PACKAGE and target not in RANKS:
            wrong.append(f"{module} imports {name}, the package that imports it")
        if top in ("lightning", "pytorch_lightning", "torchmetrics") and layer not in (
            "callbacks",
            "examples",
        ):
            wrong.append(f"{module} imports {name} outside callbacks/")
        if top == "backpack" and module != f"{PACKAGE}.curvature.derivatives":
            wrong.append(f"{module} imports {name} outside derivatives.py")
        if layer == "functional" and top != PACKAGE and top not in ALLOWED_IN_FUNCTIONAL:
            wrong.append(f"{module} imports {name}: functional/ needs torch and the standard library only")
    return wrong


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_imports_run_one_way(path):
    # A package's relative imports start from itself, so its module keeps the last part of its name here.
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert violations(path.read_text(encoding="utf-8"), module) == []


def test_every_module_has_a_layer():
    parts = {dotted(path).split(".")[1] for path in (ROOT / PACKAGE).rglob("*.py") if dotted(path) != PACKAGE}
    assert parts <= RANKS.keys()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.evidence", "from lightning_bayes.curvature.base import Curvature"),
        ("functional.evidence", "from ..curvature.base import Curvature"),
        ("functional.evidence", "import numpy"),
        ("curvature.full", "from lightning_bayes.laplace import laplace_evidence"),
        ("curvature.full", "def f():\n    import lightning_bayes.callbacks.laplace_evidence"),
        ("curvature.full", "from .. import callbacks"),
        ("curvature.full", "from lightning_bayes import laplace_evidence"),
        ("curvature.full", "from backpack import extend"),
        ("laplace", "import lightning as L"),
        ("laplace", "from lightning.pytorch import Trainer"),
        ("callbacks.laplace_evidence", "from examples.quickstart import main"),
    ],
)
def test_an_arrow_that_runs_back_is_seen(module, source):
    assert violations(source, f"{PACKAGE}.{module}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("curvature.derivatives", "from backpack.core.derivatives.linear import LinearDerivatives"),
        ("curvature.full", "from lightning_bayes.functional.evidence import weight_penalty"),
        ("curvature.full", "from .base import Curvature"),
        (
            "callbacks.laplace_evidence",
            "import lightning as L\nfrom lightning_bayes.options import check_options",
        ),
    ],
)
def test_an_arrow_that_runs_down_is_not(module, source):
    assert violations(source, f"{PACKAGE}.{module}") == []
