"""One rank fails on the copy under DDP, and both finish training. Run by ddp_script.py."""

import warnings

import torch
from lightning.pytorch import seed_everything

from lightning_bayes import LaplaceEvidence, Stability
from tests.callbacks.not_allowed import Small, classify, loader
from tests.scenarios import trainer


def step(module, batch):
    if not module.training and torch.distributed.get_rank() == 1:
        raise KeyError("mask")
    return classify(module, batch)


def main(folder):
    seed_everything(0, verbose=False)
    run = trainer(folder, [LaplaceEvidence(), Stability()], devices=2, strategy="ddp", max_epochs=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.fit(Small(step), loader())
    ours = [str(warning.message) for warning in seen if "nothing is measured" in str(warning.message)]
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    torch.save(
        {"ours": ours, "steps": run.global_step, "logged": logged}, f"{folder}/law-6-{run.global_rank}.pt"
    )
