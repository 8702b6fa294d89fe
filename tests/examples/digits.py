"""Small stand-ins for the digits, and a preset that takes seconds."""

import torch

from examples.smith_le_2018.data import Digits
from examples.smith_le_2018.evidence_presets import EvidencePreset
from examples.smith_le_2018.presets import Preset

TINY = Preset(
    name="tiny",
    seeds=2,
    num_examples=64,
    learning_rate=0.2,
    momentum=0.9,
    training_time=2,
    batch_sizes=(2, 8, 64),
    around=(4, 6, 8, 12),
    learning_rates=(0.1, 0.2, 0.4),
    too_large=(0.8,),
    longer=0.2,
    momenta=(0.8, 0.9),
    by_num_examples={64: (4, 6, 8), 128: (8, 12, 16)},
    small_batch=8,
    prior_precisions=(0.0, 1.0),
    points=4,
    evidence=EvidencePreset(
        logistic_seeds=2,
        logistic_examples=20,
        logistic_precisions=(0.1, 10.0),
        lightning_precision=10.0,
        net_seeds=2,
        net_examples=20,
        net_hidden=20,
        net_precisions=(1.0, 10.0),
        random_precisions=(1.0,),
        sharpness_batches=(5, 20),
        sharpness_rate=0.1,
        sharpness_loss=0.5,
        sharpness_precision=1.0,
        langevin_seeds=2,
        langevin_precisions=(1000.0,),
        langevin_chains=4,
        langevin_times=2.0,
    ),
)


def sparse_images(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in float64 of which some pixels are zero throughout, as the corners of MNIST are."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 784, generator=generator, dtype=torch.float64)
    images[:, torch.rand(784, generator=generator) < 0.3] = 0
    return images, torch.randint(10, (size,), generator=generator)


def made_digits(size: int = 60) -> Digits:
    """Images without any meaning, for what does not depend on it."""
    images, labels = sparse_images(size)
    return Digits("made", (images * 255).byte(), labels, (images[:20] * 255).byte(), labels[:20])
