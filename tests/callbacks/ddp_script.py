"""Run by test_distributed.py in processes of its own: fits under DDP, results of each rank to files.

Usage: python -m tests.callbacks.ddp_script <folder>
"""

import sys
import warnings
from dataclasses import asdict

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from lightning_bayes import LaplaceEvidence, ScalingAdvisor, SGDNoiseScale, Stability
from tests.callbacks import growth_ddp_script, law_6_ddp_script, noise_ddp_script
from tests.scenarios import Module, Rich, cross_entropy, loader, tensors, trainer


def logging_step(module, batch):
    loss = cross_entropy(module, batch)
    module.log("loss", loss, on_epoch=True, sync_dist=True)
    module.all_gather(loss)
    return loss


def summed(module, batch):
    return 0.0 + F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


CASES = {
    "uneven": (logging_step, lambda: loader(batch_size=4, shuffle=True), {}),
    "drop_last": (logging_step, lambda: loader(batch_size=4, shuffle=True, drop_last=True), {}),
    "sum": (summed, lambda: loader(batch_size=4), {}),
    "overhead": (logging_step, lambda: loader(batch_size=4), {"max_overhead": 0.001}),
    "refused": (
        logging_step,
        lambda: DataLoader(TensorDataset(*tensors()), 4, sampler=SubsetRandomSampler(range(10))),
        {"on_error": "raise"},
    ),
}


def observe(case, folder):
    warnings.filterwarnings("ignore")
    step, make, options = CASES[case]
    torch.manual_seed(0)
    callback, module = LaplaceEvidence(**options), Module(Rich(), step)
    stability = Stability()
    checkpoint = ModelCheckpoint(f"{folder}/{case}", "{epoch}", monitor="bayes/log_evidence", mode="max")
    advisor = ScalingAdvisor(target_batch_size=16)
    run = trainer(
        folder,
        [callback, SGDNoiseScale(), advisor, stability, checkpoint],
        logger=CSVLogger(folder, name=case, version=0),
        devices=2,
        strategy="ddp",
        max_epochs=2,
        enable_checkpointing=True,
        num_nodes=1,
    )
    error = None
    try:
        run.fit(module, make())
    except ValueError as caught:
        error = str(caught)
    torch.save(
        {
            "stability": [(epoch, asdict(reading)) for epoch, reading in stability.history],
            "history": [(epoch, asdict(evidence)) for epoch, evidence in callback.history],
            "weights": module.state_dict(),
            "logged": {name: value.item() for name, value in run.callback_metrics.items()},
            "steps": run.global_step,
            "error": error,
            "log_dir": f"{folder}/{case}/version_0",
            "advice": [
                (asdict(one.present), [asdict(check) for check in one.checks]) for one in advisor.advice
            ],
        },
        f"{folder}/{case}-{run.global_rank}.pt",
    )


def main(folder):
    for case in CASES:
        observe(case, folder)


if __name__ == "__main__":
    # All in one pair of processes: starting them is what takes the time.
    for script in (main, growth_ddp_script.main, noise_ddp_script.main, law_6_ddp_script.main):
        script(sys.argv[1])
