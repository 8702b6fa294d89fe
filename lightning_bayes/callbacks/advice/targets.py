"""What a Trainer cannot have of the targets of a ScalingAdvisor, and what can be done about it."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_bayes.callbacks.trainer.loaders import training_loader
from lightning_bayes.callbacks.trainer.training_set import known_length


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
