"""The batch grows under DDP; results of each rank go to a file. Run by ddp_script.py."""

import warnings

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bayes import BatchSizeScheduler, SGDNoiseScale
from tests.scenarios import Regression, RegressionData, rows, trainer


class Shared(RegressionData):
    """Every second example to each replica, in their order: Lightning's own sampler would shuffle."""

    def train_dataloader(self):
        data = rows()
        sampler = DistributedSampler(data, num_replicas=2, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(data, self.batch_size, sampler=sampler)


def growing(method, folder, max_epochs=3, ckpt_path=None):
    warnings.filterwarnings("ignore")
    module = Regression()
    scheduler = BatchSizeScheduler([1, 2], factor=2, max_batch_size=48, method=method)
    saving = ModelCheckpoint(f"{folder}/{method}", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run = trainer(
        folder,
        [SGDNoiseScale(), scheduler, saving],
        max_epochs=max_epochs,
        devices=2,
        strategy="ddp",
        enable_checkpointing=True,
    )
    run.fit(module, datamodule=Shared(), ckpt_path=ckpt_path)
    name = f"{folder}/{method}-{'whole' if ckpt_path is None else 'resumed'}-{run.global_rank}.pt"
    torch.save({"weights": module.network.state_dict(), "epochs": module.epochs}, name)


def main(folder):
    for method in ("accumulate", "reload"):
        growing(method, folder)
        growing(method, folder, ckpt_path=f"{folder}/{method}/epoch=1.ckpt")
