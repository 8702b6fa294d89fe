"""Scripts in processes of their own: forking after OpenMP has started can hang."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_script(module: str, folder: Path) -> None:
    """Run a script of this folder, which saves what it found into `folder`."""
    result = subprocess.run(
        [sys.executable, "-m", f"tests.callbacks.{module}", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
