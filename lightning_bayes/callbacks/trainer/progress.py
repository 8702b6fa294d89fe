"""Shows a pass over the data in the progress bar that Lightning has on the screen."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning.pytorch import Trainer

_Item = TypeVar("_Item")


def shown_in_bar(trainer: Trainer, batches: Iterable[_Item], num_batches: int) -> Iterator[_Item]:
    """Hand the batches on, with "evidence 3/16" where the bar says "Epoch 0"; without a bar hand them on alone."""
    with _described(trainer) as describe:
        for number, batch in enumerate(batches, start=1):
            describe(f"evidence {number}/{num_batches}")
            yield batch


@contextmanager
def _described(trainer: Trainer) -> Iterator[Callable[[str], None]]:
    """What sets the description of the training bar, which is restored on exit."""
    bar: Any = trainer.progress_bar_callback
    if bar is None or not bar.is_enabled:
        yield lambda text: None
        return
    line = getattr(bar, "_train_progress_bar", None)  # tqdm's; the public property raises where there is none
    rich, task = getattr(bar, "progress", None), getattr(bar, "train_progress_bar_id", None)
    if line is not None:
        before = line.desc
        try:
            yield line.set_description
        finally:
            line.set_description_str(before)
    elif rich is not None and task is not None:
        before = next((t.description for t in rich.tasks if t.id == task), "")
        try:
            yield lambda text: rich.update(task, description=text, refresh=True)
        finally:
            rich.update(task, description=before, refresh=True)
    else:
        yield lambda text: None
