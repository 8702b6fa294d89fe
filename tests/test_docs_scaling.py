"""The page on scaling shows what the commands print and the schema of what is saved."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

from lightning_bayes.functional import (
    AdamConfiguration,
    Check,
    Configuration,
    advise,
    advise_adam,
    compare,
    trainer_check,
)

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "scaling.md").read_text(encoding="utf-8")


def test_output_is_that_of_the_commands(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    spec = importlib.util.spec_from_file_location("run_commands", DOCS / "run_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.BLOCK.findall(PAGE)) >= 3
    # Else: python docs/run_commands.py docs/scaling.md
    assert module.refreshed(PAGE) == PAGE


def test_the_warning_is_that_of_the_advisor():
    good = Configuration(0.1, 256, 50_000, 0.9)
    comparison = compare(Configuration(0.1, 512, 50_000, 0.9), good, name="SGD", source="as given")
    assert f"ScalingAdvisor: {comparison.summary}" in " ".join(PAGE.split())


def test_every_check_is_explained():
    sgd = advise(Configuration(0.1, 256, 5000, 0.9), target_learning_rate=0.2, target_dataset_size=6000)
    adam = advise_adam(AdamConfiguration(1e-3, 256, dataset_size=5000), target_batch_size=512)
    outside = advise_adam(AdamConfiguration(1e-3, 256), target_batch_size=5120)
    checks = [*sgd.checks, *adam.checks, *outside.checks, trainer_check(64)]
    explained = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert {check.name for check in checks} <= explained
    for name in [field.name for field in fields(Check)]:
        assert f'"{name}"' in PAGE
