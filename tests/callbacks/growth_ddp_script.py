"""Run by test_batch_growth_distributed.py in processes of its own; results of each rank go to a file.

Usage: python -m tests.callbacks.growth_ddp_script <folder>
"""

import sys
import warnings

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bayes import BatchSizeScheduler, SGDNoiseScale
from tests.callbacks.growth_models import Data, Net, dataset, trainer


class Shared(Data):
    """Every second example to each replica, in their order: Lightning's own sampler would shuffle."""

    def train_dataloader(self):
        data = dataset()
        sampler = DistributedSampler(data, num_replicas=2, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(data, self.batch_size, sampler=sampler)


def main(method, folder, max_epochs=3, ckpt_path=None):
    warnings.filterwarnings("ignore")
    module = Net()
    growing = BatchSizeScheduler([1, 2], factor=2, max_batch_size=48, method=method)
    saving = ModelCheckpoint(f"{folder}/{method}", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run = trainer(
        folder,
        SGDNoiseScale(),
        growing,
        saving,
        max_epochs=max_epochs,
        devices=2,
        strategy="ddp",
        enable_checkpointing=True,
    )
    run.fit(module, datamodule=Shared(), ckpt_path=ckpt_path)
    name = f"{folder}/{method}-{'whole' if ckpt_path is None else 'resumed'}-{run.global_rank}.pt"
    torch.save({"weights": module.network.state_dict(), "epochs": module.epochs}, name)


if __name__ == "__main__":
    for way in ("accumulate", "reload"):  # in one pair of processes: starting them is what takes the time
        main(way, sys.argv[1])
        main(way, sys.argv[1], ckpt_path=f"{sys.argv[1]}/{way}/epoch=1.ckpt")
