"""The evidence by this package, laplace-torch, curvlinops and dense torch: value, error, time and memory.

    python benchmarks/evidence.py [--models logistic lenet] [--repeats 3] [--mnist-root DIR]
                                  [--output-dir docs/benchmarks] [--resume] [--summary]

Same model, data, prior (λ = 1) and batches for all, in one run. Every candidate has a process of its own, so
that peak memory is its own and what it raises is a row of the table; the candidates take turns over the
repeats. Time is given in gradient passes: forward and backward of the summed loss over the whole training
set in the same batches, measured around the candidate in its own process. Imports and first calls are warmed
up on 16 examples and do not count. Each value is computed once in float64 as well, untimed in the summary.

Writes evidence.csv, evidence.md and evidence.png to the output folder; models that were not run keep their rows, and
with --candidates so do the others of each model.
Each result is noted in the temporary folder as well; `--resume` takes up a run that was broken off, with the
same settings, where it ended. `--summary` reads the CSV and prints the tables alone. Needs `.[benchmark]`.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from figure import draw
from markdown import write_markdown
from models import MODELS, SEED, trained
from peers import CANDIDATES, PRIOR_PRECISION, candidates_of
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from summary import print_summary
from table import Row, add_errors, read_rows, versions, write_rows
from worker import work

# Each process is forked from one that has imported the libraries but computed nothing: own memory, no waiting.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["torch.func", "lightning_bayes", "laplace", "curvlinops", "backpack.custom_module.graph_utils"]
)


@dataclass(frozen=True)
class Job:
    """One run of one candidate."""

    model: str
    candidate: str
    dtype: str
    repeat: int


def main() -> None:
    """Run, write, and print."""
    arguments = parse()
    folder = Path(arguments.output_dir)
    table = folder / "evidence.csv"
    rows = read_rows(table) if table.exists() else []
    if arguments.run:
        folder.mkdir(parents=True, exist_ok=True)
        for own in run_all(arguments):
            again = {run_of(row) for row in own} if arguments.candidates else None
            kept = (
                row
                for row in rows
                if row["model"] != own[0]["model"] or (again is not None and run_of(row) not in again)
            )
            rows = [*kept, *own]
            write_rows(table, add_errors(rows))  # model by model: what there is stays if the rest fails
    draw(rows, folder / "evidence.png")
    write_markdown(rows, folder / "evidence.md")
    print_summary(rows)


def run_of(row: Row) -> tuple[str, ...]:
    """What a row is a run of, whichever the repeat."""
    return tuple(str(row[name]) for name in ("model", "library", "backend", "structure", "dtype"))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(MODELS)
    parser.add_argument("--models", nargs="+", choices=names, help="default: all that there are data for")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=45, help="seconds that a candidate may take")
    parser.add_argument("--memory", type=float, default=0.8 * memory_gb(), help="GiB of address space")
    parser.add_argument("--mnist-root", help="60,000 digits, in torchvision's MNIST layout")
    parser.add_argument("--output-dir", default="docs/benchmarks")
    parser.add_argument("--resume", action="store_true", help="keep the results of a run that was broken off")
    parser.add_argument(
        "--summary", dest="run", action="store_false", help="only print and draw what is there"
    )
    arguments = parser.parse_args()
    if arguments.models is None:
        arguments.models = [n for n in names if MODELS[n].num_examples <= 5000 or arguments.mnist_root]
    return arguments


def memory_gb() -> float:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def run_all(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one model after the other, with a line of progress."""
    jobs = {name: list(jobs_of(name, arguments)) for name in arguments.models}
    constant = versions() | {
        "seed": SEED,
        "threads": arguments.threads,
        "prior_precision": PRIOR_PRECISION,
        "limit_seconds": arguments.limit,
        "memory_limit_gb": round(arguments.memory, 1),
    }
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    hopeless: set[tuple[str, str]] = set()
    notes = Notes(arguments)
    with Progress(*columns) as progress:
        task = progress.add_task("evidence", total=sum(map(len, jobs.values())))
        for model, its_jobs in jobs.items():
            progress.update(task, description=f"{model}: training")
            trained(MODELS[model], arguments.mnist_root)
            rows: list[Row] = []
            for job in its_jobs:
                line = f"{job.model}: {job.candidate} {job.dtype} ({job.repeat + 1})"
                progress.update(task, description=line)
                key = (job.model, job.candidate)
                if key not in hopeless:  # what raises once raises again, in float64 as well
                    result = notes.known(job) or notes.add(job, run_job(job, arguments))
                    if result["status"] != "ok":
                        hopeless.add(key)
                        progress.console.print(f"{line} {result['status']}", markup=False, highlight=False)
                    rows.append(settings(job) | constant | result)
                progress.advance(task)
            yield rows


def jobs_of(name: str, arguments: argparse.Namespace) -> Iterator[Job]:
    """The candidates take turns; then each once in float64."""
    chosen = [
        candidate.name
        for candidate in candidates_of(MODELS[name])
        if arguments.candidates is None or candidate.name in arguments.candidates
    ]
    for repeat in range(min(arguments.repeats, MODELS[name].repeats)):
        # Back and forth: a machine that becomes slower does not always meet the same ones last.
        for candidate in chosen if repeat % 2 == 0 else reversed(chosen):
            yield Job(name, candidate, "float32", repeat)
    if MODELS[name].float64:
        for candidate in chosen:
            if CANDIDATES[candidate].structure != "GEMM + Cholesky":
                yield Job(name, candidate, "float64", 0)


class Notes:
    """What has been measured, in the temporary folder, for as long as the settings stay the same."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._path = Path(tempfile.gettempdir()) / "lightning-bayes-benchmarks" / "run.jsonl"
        self._settings = json.dumps([versions(), SEED, arguments.threads, arguments.limit, arguments.memory])
        self._found: dict[str, Row] = {}
        if not arguments.resume:
            self._path.unlink(missing_ok=True)
        elif self._path.exists():
            lines = map(json.loads, self._path.read_text().splitlines())
            self._found = {key: result for settings, key, result in lines if settings == self._settings}

    def known(self, job: Job) -> Row | None:
        """The result of a job that was run before."""
        return self._found.get(repr(job))

    def add(self, job: Job, result: Row) -> Row:
        """Note a result and return it."""
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps([self._settings, repr(job), result]) + "\n")
        return result


def limit_of(job: Job, arguments: argparse.Namespace) -> float:
    """Seconds that a job may take; exact values of a large model, and near ones, are waited for."""
    ours = ("lightning-bayes full", "lightning-bayes tolerance", "lightning-bayes lanczos")
    exact = job.candidate.startswith(ours)
    return max(arguments.limit, MODELS[job.model].patience) if exact else float(arguments.limit)


def settings(job: Job) -> Row:
    """What was run."""
    candidate = CANDIDATES[job.candidate]
    return {
        "model": job.model,
        "library": candidate.library,
        "backend": candidate.backend,
        "structure": candidate.structure,
        "dtype": job.dtype,
        "repeat": job.repeat,
        "batch_size": MODELS[job.model].batch_size,
        "note": candidate.note,
    }


def run_job(job: Job, arguments: argparse.Namespace) -> Row:
    """Run the worker; whatever becomes of it is a result."""
    request = {
        "model": job.model,
        "candidate": job.candidate,
        "dtype": job.dtype,
        "threads": arguments.threads,
        "mnist_root": arguments.mnist_root,
        "memory_gb": arguments.memory,
    }
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log.txt"
        process = PROCESSES.Process(target=work, args=(request, str(answer), str(log)))
        process.start()
        process.join(limit_of(job, arguments))
        if process.is_alive():
            process.kill()
            process.join()
            return {"status": "over the limit"}
        if answer.exists():
            return dict(json.loads(answer.read_text()))
        if process.exitcode is not None and process.exitcode < 0:
            return {"status": f"raises: killed by signal {-process.exitcode}"}
        raise RuntimeError(f"The worker failed outside its candidate: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
