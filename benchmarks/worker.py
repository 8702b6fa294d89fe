"""One candidate on one model in a process of its own: value, time beside a gradient pass, peak memory.

evidence.py starts it; the result goes to a file as JSON.
"""

import copy
import json
import os
import resource
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from models import MODELS, Trained, gradient_pass, trained
from peers import CANDIDATES
from torch import nn

WARM_UP_EXAMPLES = 16
GRADIENT_PASSES = 3


def work(job: dict[str, Any], answer: str, log: str) -> None:
    """Run one job; what a candidate raises is its result, and what it prints goes to the log."""
    with Path(log).open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    data = trained(MODELS[job["model"]], job["mnist_root"])
    dtype = getattr(torch, job["dtype"])
    data = replace(data, net=data.net.to(dtype), x=data.x.to(dtype))
    limit = int(job["memory_gb"] * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        result = measure(data, CANDIDATES[job["candidate"]].run)
    except Exception as error:
        lines = str(error).strip().splitlines()
        result = {"status": f"raises: {type(error).__name__}: {lines[0] if lines else ''}"}
        traceback.print_exc()
    result["parameters"] = sum(p.numel() for p in data.net.parameters())
    result["num_examples"] = len(data.x)
    Path(answer).write_text(json.dumps(result))


Run = Callable[[Trained], float | tuple[float, float] | None]


def measure(data: Trained, run: Run) -> dict[str, object]:
    """Value, seconds, seconds of a gradient pass, and what the candidate adds to the resident set."""
    warm_up(data, run)
    before = [seconds(lambda: gradient_pass(data)) for _ in range(GRADIENT_PASSES)]
    fresh = copy_of(data)
    resident = reset_peak()
    start = time.perf_counter()
    answer = run(fresh)
    elapsed = time.perf_counter() - start
    peak = peak_bytes() - resident
    after = [seconds(lambda: gradient_pass(data)) for _ in range(GRADIENT_PASSES)]
    unit = statistics.median(before + after)
    value, stderr = answer if isinstance(answer, tuple) else (answer, None)
    return {
        "status": "ok",
        "value": value,
        "stderr": stderr,
        "seconds": elapsed,
        "gradient_seconds": unit,
        "gradient_passes": elapsed / unit,
        "peak_mb": peak / 1e6,
    }


def warm_up(data: Trained, run: Run) -> None:
    """Imports, thread pools and first calls, on a few examples; an error here is the candidate's."""
    few = min(WARM_UP_EXAMPLES, len(data.x))
    run(copy_of(replace(data, x=data.x[:few], y=data.y[:few])))
    gradient_pass(data)


def copy_of(data: Trained) -> Trained:
    """The same with a network of its own: BackPACK and ASDL leave hooks behind."""
    net: nn.Module = copy.deepcopy(data.net)
    return replace(data, net=net)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def reset_peak() -> int:
    """Resident set now; the peak starts again from it where the system can do that (Linux)."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Largest resident set since the last reset, else since the start."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
