"""Imports run down a list of folders: a folder may import itself and what stands below it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_bayes"
FOLDERS = [  # from the top down
    {"callbacks"},
    {"callbacks/gradient_noise", "callbacks/growth", "callbacks/advice", "callbacks/evidence"},
    {"callbacks/trainer"},
    {"advice"},
    {"evidence"},
    {"loss_curvature"},
    {"structures", "structures/bracket", "structures/lanczos"},
    {"row_storage"},
    {"rows"},
    {"priors"},
    {"capture", "capture/any_loss"},
    {"likelihoods"},
    {"numerics"},
    {"functional/advice"},
    {"functional"},
    {"errors"},
]
RANKS = {folder: -rank for rank, folders in enumerate(FOLDERS) for folder in folders}
ENTRIES = {f"{PACKAGE}.__main__", f"{PACKAGE}.functional.__init__"}
"""Hand on what lies in folders above them."""
ALLOWED_IN_FUNCTIONAL = sys.stdlib_module_names | {"torch"}
LARGEST_FOLDER, LONGEST_MODULE = 16, 300
SHARED_NAMES = {"__init__", "checks", "base"}
"""Names that files of several folders may have."""

PATHS = sorted((ROOT / PACKAGE).rglob("*.py"))


def folder_of(module: str) -> str | None:
    """The folder that a dotted name lies in, None for the package itself and for what is outside."""
    first, *rest = module.split(".")
    if first != PACKAGE:
        return None
    inside = [f"{'/'.join(rest[:depth])}" for depth in range(len(rest), 0, -1)]
    return next((folder for folder in inside if folder in RANKS), None)


def imports_of(source: str, module: str) -> set[str]:
    """Dotted names of everything that is imported anywhere in a module, relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{parent}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, module: str) -> list[str]:
    """What a module imports that it must not."""
    wrong = []
    own = folder_of(module)
    for name in sorted(imports_of(source, module)):
        top, target = name.split(".")[0], folder_of(name)
        if own is not None and top == PACKAGE and target is None:
            wrong.append(f"{module} imports {name}, the package that imports it")
        if own is not None and target is not None and RANKS[target] > RANKS[own] and module not in ENTRIES:
            wrong.append(f"{module} imports {name}, which is above it")
        if (
            top in ("lightning", "pytorch_lightning", "torchmetrics")
            and (own or "").split("/")[0] != "callbacks"
        ):
            wrong.append(f"{module} imports {name} outside callbacks/")
        if top == "backpack" and own != "rows":
            wrong.append(f"{module} imports {name} outside rows/")
        if (own or "").split("/")[0] == "functional" and top != PACKAGE and top not in ALLOWED_IN_FUNCTIONAL:
            wrong.append(f"{module} imports {name}: functional/ needs torch and the standard library only")
    return wrong


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", PATHS, ids=dotted)
def test_imports_run_one_way(path):
    assert violations(path.read_text(encoding="utf-8"), dotted(path)) == []


def test_every_folder_has_a_rank():
    folders = {str(path.parent.relative_to(ROOT / PACKAGE)) for path in PATHS} - {"."}
    assert folders == RANKS.keys() - {"errors"}


def test_no_folder_is_a_heap():
    modules = [path for path in PATHS if path.stem != "__init__"]
    sizes = {folder: sum(path.parent == folder for path in modules) for folder in {p.parent for p in modules}}
    assert {folder: size for folder, size in sizes.items() if size > LARGEST_FOLDER} == {}


def test_no_module_is_long():
    lengths = {dotted(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PATHS}
    assert {module: length for module, length in lengths.items() if length > LONGEST_MODULE} == {}


def test_a_name_is_one_file():
    """A formula in functional/ may have the name of what uses it."""
    stems = [path.stem for path in PATHS if folder_of(dotted(path)) != "functional"]
    assert {stem for stem in stems if stems.count(stem) > 1} <= SHARED_NAMES


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.evidence", "from lightning_bayes.structures.base import Curvature"),
        ("functional.evidence", "from ..structures.base import Curvature"),
        ("functional.evidence", "import numpy"),
        ("structures.full", "from lightning_bayes.evidence.laplace import laplace_evidence"),
        ("structures.full", "def f():\n    import lightning_bayes.callbacks.laplace_evidence"),
        ("structures.full", "from .. import callbacks"),
        ("structures.full", "from lightning_bayes import laplace_evidence"),
        ("structures.full", "from backpack import extend"),
        ("callbacks.trainer.restore", "from lightning_bayes.callbacks.growth import schedule"),
        ("evidence.laplace", "import lightning as L"),
        ("evidence.laplace", "from lightning.pytorch import Trainer"),
        ("callbacks.laplace_evidence", "from lightning_bayes import Evidence"),
    ],
)
def test_an_arrow_that_runs_back_is_seen(module, source):
    assert violations(source, f"{PACKAGE}.{module}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rows.layers", "from backpack.core.derivatives.linear import LinearDerivatives"),
        ("structures.full", "from lightning_bayes.functional.evidence import weight_penalty"),
        ("structures.full", "from .base import Curvature"),
        (
            "callbacks.laplace_evidence",
            "import lightning as L\nfrom lightning_bayes.evidence.options import Method",
        ),
    ],
)
def test_an_arrow_that_runs_down_is_not(module, source):
    assert violations(source, f"{PACKAGE}.{module}") == []


def test_no_variable_is_called_found():
    """It says that something was looked for, and not what it is."""
    names = {
        (dotted(path), node.lineno)
        for path in PATHS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Name) and node.id == "found")
        or (isinstance(node, ast.arg) and node.arg == "found")
    }
    assert names == set()
