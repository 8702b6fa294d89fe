"""The fast loop of the paper's sweeps, held to a Lightning run with this package's callbacks."""

from dataclasses import replace
from itertools import islice

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.smith_le_2018.engine import Run, Trained, train
from examples.smith_le_2018.model import DigitClassifier, ShuffledBatches, network
from lightning_bayes import LaplaceEvidence, SGDNoiseScale
from tests.examples.digits import made_digits, sparse_images

STEPS = 48


def lightning_weights(run: Run, images, labels, callbacks) -> list[torch.Tensor]:
    module = DigitClassifier(
        network(run.seed, hidden=30).double(), run.learning_rate, run.momentum, run.weight_decay
    )
    loader = DataLoader(
        TensorDataset(images, labels),
        batch_sampler=ShuffledBatches(run.num_examples, run.batch_size, run.seed),
    )
    trainer = L.Trainer(
        max_steps=run.steps,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return [part.detach() for part in module.net.parameters()]


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("batch_size", [7, 50], ids=["last batch left out", "full batch"])
def test_same_trajectory_as_lightning_with_callbacks(batch_size, weight_decay):
    run = Run(50, batch_size, 0.1, 0.9, weight_decay, STEPS, seed=3)
    images, labels = sparse_images(run.num_examples)
    noise = SGDNoiseScale(dataset_size=50)  # the last batch that is left out is another in each epoch
    evidence = LaplaceEvidence(structure="diag", prior_precision=1.0, every_n_epochs=4)
    expected = lightning_weights(run, images, labels, [noise, evidence])
    trained = Trained(network(run.seed, hidden=30), images, labels, run)
    batches = ShuffledBatches(run.num_examples, run.batch_size, run.seed)
    done = 0
    while done < run.steps:
        for indices in islice(batches.epoch(), run.steps - done):
            trained.step(indices)
            done += 1
    assert evidence.history
    for ours, theirs in zip(trained.full_weights(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    moved = network(run.seed, hidden=30)[0].weight.detach() - trained.full_weights()[0]
    assert moved.abs().max() > 0.01
    assert bool((moved[:, (images == 0).all(0)] == 0).all()) == (weight_decay == 0)


def test_noise_scale_is_that_of_the_callback():
    run = Run(50, 7, 0.1, 0.9, 0.0, 5, seed=0)
    images, labels = sparse_images(run.num_examples)
    noise = SGDNoiseScale(dataset_size=50)  # the last batch that is left out is another in each epoch
    module = DigitClassifier(network(0, hidden=30).double(), run.learning_rate, run.momentum)
    loader = DataLoader(TensorDataset(images, labels), batch_sampler=ShuffledBatches(50, 7, 0))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[noise],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    # An epoch draws 7 batches of 7, each from all 50.
    assert trainer.callback_metrics["bayes/noise_scale"].item() == pytest.approx(run.noise_scale, rel=1e-6)


def test_a_longer_run_passes_through_a_shorter_one():
    short, long = Run(40, 8, 0.05, 0.9, 0.0, 30, seed=1), Run(40, 8, 0.05, 0.9, 0.0, 60, seed=1)
    digits = made_digits()
    assert train(digits, long, [30])[0] == train(digits, short)[0]


def test_a_run_that_overflows_ends_as_a_guess():
    found = train(made_digits(), Run(40, 4, 1e30, 0.9, 0.0, 300, seed=0), [100])
    assert [measured.step for measured in found] == [100, 300]
    assert all(measured.test_loss == float("inf") for measured in found)
    assert found[0] == replace(found[1], step=100)


def test_batches_leave_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    network(5)
    list(ShuffledBatches(50, 7, 5))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_epoch_draws_without_replacement_and_anew():
    order = ShuffledBatches(50, 7, seed=2)
    first, second = ([index for batch in order for index in batch] for _ in range(2))
    assert len(first) == len(set(first)) == 49
    assert first != second
