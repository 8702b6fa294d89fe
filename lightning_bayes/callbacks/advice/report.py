"""Where advice goes: the terminal, loggers, a file; and what to say of targets that a Trainer cannot have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lightning_bayes.advice.log_directories import ADVICE_FILE
from lightning_bayes.advice.table import advice_renderable, advice_text, flat_keys
from lightning_bayes.callbacks.trainer.training_set import known_length, training_loader
from lightning_bayes.functional import SavedAdvice


def emit(trainer: Trainer, saved: SavedAdvice, prefix: str, directory: str | None, number: int) -> None:
    """Prints advice, logs it as text and hyper-parameters, and saves it as JSON; on rank zero.

    Args:
        trainer: at the end of fit.
        saved: the advice.
        prefix: of the keys.
        directory: of the file; None for none.
        number: of the advisor among those of the Trainer, from 0; it keeps their files apart.
    """
    if not trainer.is_global_zero:
        return
    console = Console()
    console.print(advice_renderable(saved.advice, saved.comparisons))
    path = None if directory is None else _saved(trainer, saved, directory, number)
    if path is not None:
        console.print(f"Saved: {path}", soft_wrap=True, highlight=False, markup=False)
    text = advice_text(saved.advice, saved.comparisons)
    flat = flat_keys(saved, f"{prefix}advice")
    for logger in trainer.loggers:
        try:
            # Not every logger takes text; TensorBoard's does, whichever Lightning package made it.
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if callable(add_text):
                # As a code block: TensorBoard renders text as Markdown.
                add_text(f"{prefix}advice", f"```\n{text}\n```", trainer.global_step)
            _log_hyperparams(logger, flat)
        except (
            Exception
        ) as error:  # whatever a tracking server says: it must not end a fit that has succeeded
            rank_zero_warn(
                f"ScalingAdvisor: {type(logger).__name__} did not take the advice as text and hyper-parameters"
                f" ({type(error).__name__}: {error}). It is in `advisor.advice`"
                + ("." if path is None else f" and in {path}.")
            )


def _saved(trainer: Trainer, saved: SavedAdvice, directory: str, number: int) -> str | None:
    """The file that the advice was written to; None, with a warning, where it could not be."""
    try:
        return _save(saved, _of_this_run(trainer, directory), number)
    except Exception as error:  # a full disk, a directory without rights, a remote store that does not answer
        rank_zero_warn(
            f"ScalingAdvisor: {ADVICE_FILE} could not be written in {directory!r} ({type(error).__name__}: {error})."
            " The advice was printed and is in `advisor.advice`; `Trainer(default_root_dir=...)` or the logger's"
            " `save_dir` names another directory."
        )
        return None


def _of_this_run(trainer: Trainer, directory: str) -> str:
    """The directory itself where the logger keeps runs apart in it, else one below it, as for checkpoints."""
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or getattr(logger, "log_dir", None) is not None:  # TensorBoard and CSV: .../version_0
        return directory
    # MLflow and W&B share one `save_dir` among all runs; their version is the run's id.
    version = logger.version
    parts = [logger.name, f"version_{version}" if isinstance(version, int) else version]
    names = [str(part).replace("/", "_") for part in parts if part not in (None, "")]
    return "/".join([str(directory).rstrip("/"), *names])


def _save(saved: SavedAdvice, directory: str, number: int) -> str:
    """Writes a file that is not there yet: another run's advice is never overwritten."""
    # Lightning's loggers write to remote directories too.
    files = get_filesystem(directory)
    files.makedirs(directory, exist_ok=True)
    text = saved.to_json() + "\n"
    while True:
        name = ADVICE_FILE if number == 0 else ADVICE_FILE.replace(".json", f"-{number}.json")
        path = f"{str(directory).rstrip('/')}/{name}"
        number += 1
        if "://" not in path:
            try:
                with Path(path).open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                continue
            return path
        if not files.exists(path):
            with files.open(path, "w", encoding="utf-8") as file:
                file.write(text)
            return path


def _log_hyperparams(logger: Any, flat: Mapping[str, float | str]) -> None:
    present = getattr(logger, "hparams", None)
    if not any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):
        logger.log_hyperparams(dict(flat))
        return
    # TensorBoard shows the hyper-parameters that it is given first and no later ones, and would log `hp_metric` = -1
    # anew. Where the user has some, ours join them in `logger.hparams` alone: empty metrics write no event.
    scales = {key: value for key, value in flat.items() if "/present/" in key and key.endswith("noise_scale")}
    logger.log_hyperparams(dict(flat), {} if present else scales)


def way_to_more_examples(trainer: Trainer, examples: int, wanted: int) -> str:
    """What to do where a target batch does not fit: names the flag that leaves so few examples, where one does."""
    smaller = f"take a target_batch_size below {examples}"
    limits = {
        "fast_dev_run": getattr(trainer, "fast_dev_run", 0),
        "overfit_batches": getattr(trainer, "overfit_batches", 0),
        "limit_train_batches": getattr(trainer, "limit_train_batches", None),
    }
    # Under `fast_dev_run` Lightning sets the other two itself, and by default the last is 1.0.
    flag = next((name for name, value in limits.items() if value and value != 1.0), None)
    if flag is None and limits["limit_train_batches"] == 1 and isinstance(limits["limit_train_batches"], int):
        flag = "limit_train_batches"
    whole = known_length(getattr(training_loader(trainer), "dataset", None))
    if flag is not None and whole is not None and examples < wanted <= whole:
        leaves = f"Trainer({flag}={limits[flag]!r}) leaves {examples} of {whole} examples"
        return f"{leaves}: remove `{flag}`, or {smaller}."
    return f"Give target_dataset_size={wanted} or more beside it, if there will be so many examples, or {smaller}."
