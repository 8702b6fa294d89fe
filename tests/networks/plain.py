"""Networks of vectors and images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tests.networks.common import perturbed


class FunctionalConv(nn.Module):
    """Strides, paddings and groups; activations and pooling as functions."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, (1, 2), padding=(0, 1), groups=2, bias=False)
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(F.gelu(self.second(x)).mean((2, 3)))


class Residual(nn.Module):
    """Sums and in-place operations between the layers."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 4)
        self.inner = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.inner(x)
        y += x
        y.mul_(0.7)
        y = self.relu(y)
        out = self.head(y)
        out *= 1.5
        return out


class SharedWeight(nn.Module):
    """Two layers, one weight, a bias each."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.one = nn.Linear(5, 5)
        self.two = nn.Linear(5, 5)
        self.two.weight = self.one.weight
        self.head = nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class CalledTwice(nn.Module):
    """One layer, two steps of a recurrence."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.step = nn.Linear(5, 5)
        self.head = nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.step(torch.tanh(self.step(x)))))


class FunctionalReuse(nn.Module):
    """A layer's weight, used by a functional call as well."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.inner(x)), self.inner.weight)))


class Broadcast(nn.Module):
    """A layer that sees a parameter, not the examples: its output has no batch."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, 3))
        self.project = nn.Linear(3, 5)
        self.head = nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.tanh(self.project(self.query)).sum(0)
        return self.head(x * gates)


class Unpooled(nn.Module):
    """A layer whose output misses the loss beside one that makes it."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 2)
        self.aside = nn.Linear(5, 1)
        self.head = nn.Linear(5, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.head(x)


class LowRank(nn.Linear):
    """A subclass of a layer whose forward is another function."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.down = nn.Parameter(torch.randn(2, in_features))
        self.up = nn.Parameter(torch.randn(out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x @ self.down.mT @ self.up.mT


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, channels to the end and back, layer scale, residual."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.norm = perturbed(nn.LayerNorm(3))
        self.wide = nn.Linear(3, 6)
        self.narrow = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(3, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class ResNetBlock(nn.Module):
    """Two convolutions with batch norm beside a strided shortcut."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False)
        self.first_norm = perturbed(nn.BatchNorm2d(2))
        self.second = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.second_norm = perturbed(nn.BatchNorm2d(2))
        self.shortcut = nn.Sequential(nn.Conv2d(2, 2, 1, stride=2, bias=False), perturbed(nn.BatchNorm2d(2)))
        self.head = nn.Linear(2, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)), inplace=True)
        y = self.second_norm(self.second(y))
        y += self.shortcut(x)
        return self.head(F.relu(y, inplace=True).mean((2, 3)))


def linear(num_outputs: int) -> nn.Module:
    return nn.Linear(5, num_outputs)


def mlp(num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, num_outputs))


def dropout(num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, num_outputs))


def batch_norm(num_outputs: int) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 9, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, num_outputs),
    )
    return perturbed(net)


def conv1d(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=2, dilation=2),
        nn.Tanh(),
        nn.ConvTranspose1d(3, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(24, num_outputs),
    )


def one_position(num_outputs: int) -> nn.Module:
    """Convolutions that see each image at one place only."""
    return nn.Sequential(
        nn.Conv2d(2, 3, (2, 3)),
        nn.Tanh(),
        nn.Conv2d(3, 3, 1, bias=False),
        nn.Flatten(),
        nn.Linear(3, num_outputs),
    )


def conv3d(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=(0, 1, 0)),
        nn.GELU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(2, num_outputs),
    )


def transposed(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, num_outputs),
    )


def output_padding(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(2, 2, 2, stride=2, output_padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(14, num_outputs),
    )


def padded(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding="same", dilation=2),
        nn.Tanh(),
        nn.Conv2d(2, 2, (2, 3), padding=(1, 2), padding_mode="circular"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, num_outputs),
    )


def layer_norm(num_outputs: int) -> nn.Module:
    return perturbed(
        nn.Sequential(
            nn.Linear(5, 6),
            nn.LayerNorm(6),
            nn.GELU(),
            nn.Unflatten(1, (2, 3)),
            nn.LayerNorm((2, 3), bias=False),
            nn.Flatten(),
            nn.Linear(6, num_outputs),
        )
    )


def group_norm(num_outputs: int) -> nn.Module:
    return perturbed(
        nn.Sequential(
            nn.Conv2d(2, 4, 2),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, num_outputs),
        )
    )


def rms_norm(num_outputs: int) -> nn.Module:
    return perturbed(nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.SiLU(), nn.Linear(6, num_outputs)))


def instance_norm(num_outputs: int) -> nn.Module:
    return perturbed(
        nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.InstanceNorm2d(3, affine=True),
            nn.Tanh(),
            nn.Flatten(2),
            nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
            nn.Tanh(),
            nn.AvgPool1d(4),
            nn.Flatten(),
            nn.Linear(6, num_outputs),
        )
    )


def custom_layer(num_outputs: int) -> nn.Module:
    return nn.Sequential(LowRank(5, 4), nn.Tanh(), nn.Linear(4, num_outputs))


def prelu(num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, num_outputs))


def parametrized(num_outputs: int) -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, num_outputs))


def channels_first(num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, num_outputs, 2))


def pixels(num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Conv2d(2, num_outputs, (1, 2)))
