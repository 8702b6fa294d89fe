"""The built wheel, used once: imported from where it was installed, typed, and right on a known number."""

import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import lightning_bayes
from lightning_bayes import laplace_evidence
from lightning_bayes.functional import sgd_noise_scale

home = Path(lightning_bayes.__file__).parent
if "site-packages" not in home.parts or not (home / "py.typed").exists():
    raise SystemExit(f"not the installed wheel, or no py.typed beside it: {home}")
if version("lightning-bayes") != lightning_bayes.__version__:
    raise SystemExit("the version is written in two places")

# One weight, one example at x = 1 with variance 1 and prior precision 1: y = 0 has density N(0; 0, 2).
line = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
torch.nn.init.zeros_(line.weight)
data = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
evidence = laplace_evidence(line, data, likelihood=lightning_bayes.Gaussian(sigma=1.0))
if not math.isclose(evidence.log_evidence, -0.5 * math.log(2 * math.pi * 2), rel_tol=1e-12):
    raise SystemExit(f"wrong evidence: {evidence}")
if not math.isclose(sgd_noise_scale(0.1, 32, 1000, 0.9), 30.25):
    raise SystemExit("wrong noise scale")
command = [sys.executable, "-m", "lightning_bayes", "advise", "--lr", "0.1", "--batch-size", "32"]
command += ["--dataset-size", "1000", "--target-batch-size", "64", "--json"]
(advice,) = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)["advice"]
if not math.isclose(advice["moves"][0]["linear"]["learning_rate"], 0.2):
    raise SystemExit(f"wrong advice: {advice}")
print("wheel", lightning_bayes.__version__, "works")
