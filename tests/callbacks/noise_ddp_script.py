"""Gradient noise under DDP; results of each rank go to a file. Run by ddp_script.py."""

import os
import warnings
from dataclasses import astuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_bayes import GradientNoiseScale
from tests.scenarios import (
    Module,
    Quadratic,
    collected,
    in_order,
    noisy_targets,
    readable_step,
    step_by_hand,
    tensors,
)

STEPS, SIZE = 100, 8
"""Optimizer steps, and examples in each."""
CASES = {
    # method, micro-batches of a step in one process, in each of two
    "per_example": ("per_example", 1, 1),
    "per_example accumulated": ("per_example", 2, 2),
    "split_batch": ("split_batch", 1, 1),
    "replicas": ("micro_batches", 2, 1),
    "replicas and accumulation": ("micro_batches", 4, 2),
}


TWO = {"devices": 2, "strategy": "ddp", "num_nodes": 1, "use_distributed_sampler": False}


def every_other(data, replicas):
    """In order; Lightning's own sampler shuffles."""
    return (
        None if replicas == 1 else DistributedSampler(data, 2, int(os.environ.get("LOCAL_RANK", "0")), False)
    )


def run(folder, case, replicas):
    """Estimates after every batch. The examples of a micro-batch are the same in both cases."""
    method, alone, each = CASES[case]
    accumulate = alone if replicas == 1 else each
    y = noisy_targets(STEPS * SIZE)
    groups = alone if method == "micro_batches" else each
    size = SIZE // groups
    if replicas == 1 and method == "micro_batches":
        # Two processes take every other example: bring what one of them sees together.
        y = y.reshape(-1, size, 2, 4).transpose(1, 2).reshape(-1, 4)
    noise = GradientNoiseScale(every_n_steps=1, ema=0.0, method=method)
    per_process = SIZE // accumulate // (1 if replicas == 1 else 2)
    found = collected(
        folder,
        noise,
        in_order(y, per_process, sampler=every_other(y, replicas)),
        Quadratic(readable_step if method == "per_example" else step_by_hand),
        accumulate_grad_batches=accumulate,
        **(TWO if replicas == 2 else {}),
    )
    return [astuple(estimate) for estimate in found[::accumulate]]


def trained(folder, method, replicas):
    """Averages over a run that learns, with a net of several layers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    module = Module(network, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    noise = GradientNoiseScale(every_n_steps=2, ema=0.9, method=method, per_layer=True)
    dataset = TensorDataset(*tensors(size=48))
    data = DataLoader(dataset, 8 // replicas, sampler=every_other(dataset, replicas))
    collected(
        folder,
        noise,
        data,
        module,
        max_epochs=3,
        **(TWO if replicas == 2 else {}),
    )
    return {name: astuple(noise) for name, noise in {"": noise.estimate, **noise.layer_estimates}.items()}


def main(folder):
    warnings.filterwarnings("ignore")
    found = {case: run(folder, case, 2) for case in CASES}
    found["trained"] = trained(folder, "per_example", 2)
    torch.save(found, f"{folder}/noise-{torch.distributed.get_rank()}.pt")
