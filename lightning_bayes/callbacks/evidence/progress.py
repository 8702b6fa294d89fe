"""Shows a pass over the data in the progress bar that Lightning has on the screen."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning.pytorch import Trainer

_Item = TypeVar("_Item")


def shown_in_bar(trainer: Trainer, batches: Iterable[_Item], num_batches: int) -> Iterator[_Item]:
    """Hand the batches on, with "evidence 3/16" where the bar says "Epoch 0"; without a bar hand them on alone."""
    with bar_line(trainer) as report:
        for number, batch in enumerate(batches, start=1):
            report(f"{number}/{num_batches}")
            yield batch


@contextmanager
def bar_line(trainer: Trainer) -> Iterator[Callable[[str], object]]:
    """What shows "evidence" and a few words where the bar says "Epoch 0", which comes back; nothing without a bar."""
    bar = _training_bar(trainer)
    if bar is None:
        yield lambda text: None
        return
    describe, before = bar
    try:
        yield lambda text: describe(f"evidence {text}")
    finally:
        describe(before)


def _training_bar(trainer: Trainer) -> tuple[Callable[[str], object], str] | None:
    """What sets the description of the training bar, and the present one; None where none is shown."""
    bar: Any = trainer.progress_bar_callback
    if bar is None or not bar.is_enabled:
        return None
    line = getattr(bar, "_train_progress_bar", None)  # tqdm's; the public property raises where there is none
    if line is not None:
        return line.set_description, line.desc.removesuffix(": ")  # which the description adds
    rich, task = getattr(bar, "progress", None), getattr(bar, "train_progress_bar_id", None)
    if rich is None or task is None:
        return None
    before = next((t.description for t in rich.tasks if t.id == task), "")
    return lambda text: rich.update(task, description=text, refresh=True), before
