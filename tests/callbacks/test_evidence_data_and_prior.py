"""Which examples count, and which prior the optimizer's weight decay stands for."""

import functools
import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_bayes import LaplaceEvidence
from lightning_bayes.callbacks.trainer.training_set import check_stream
from tests.scenarios import (
    DECAY,
    Module,
    N,
    cross_entropy,
    disagreements,
    fit,
    loader,
    mlp,
    optimizer,
    reference,
    tensors,
)

PART = [2, 3, 5, 7, 11, 13, 17]


def dataset():
    return TensorDataset(*tensors())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset())

    def __len__(self):
        return N


LOADERS = {
    "drop_last": (lambda: loader(drop_last=True, shuffle=True), range(N)),
    "shuffle": (lambda: loader(shuffle=True), range(N)),
    "one batch": (lambda: loader(batch_size=N), range(N)),
    "subset": (lambda: DataLoader(Subset(dataset(), PART), 4, shuffle=True), PART),
    "subset sampler": (lambda: DataLoader(dataset(), 4, sampler=SubsetRandomSampler(PART)), PART),
    "random sampler": (
        lambda: DataLoader(dataset(), 4, sampler=RandomSampler(range(N), num_samples=8)),
        range(N),
    ),
    "batch sampler": (
        lambda: DataLoader(dataset(), batch_sampler=BatchSampler(SubsetRandomSampler(PART), 3, True)),
        PART,
    ),
    "list of batches": (lambda: DataLoader(dataset(), batch_sampler=[PART[:4], PART[4:]]), PART),
    "iterable with a length": (lambda: DataLoader(Stream(), 4), range(N)),
}


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")  # Lightning's advice
@pytest.mark.parametrize("name", LOADERS)
def test_examples_that_count(tmp_path, name):
    make, indices = LOADERS[name]
    callback, module = LaplaceEvidence(), Module(mlp(), cross_entropy)
    fit(tmp_path, module, make(), callback)
    x, y = tensors()
    expected = reference(module.network, (x[list(indices)], y[list(indices)]))
    assert expected.num_examples == len(indices)
    assert disagreements(callback.history[0][1], expected) == {}


@pytest.mark.parametrize(
    ("kwargs", "shuffle", "count"),
    [
        ({"overfit_batches": 1}, False, 8),
        ({"limit_train_batches": 2}, False, 16),
        ({"limit_train_batches": 2}, True, N),  # in time all are drawn
        ({"max_steps": 1}, False, N),
    ],
    ids=str,
)
def test_examples_that_training_never_reaches(tmp_path, kwargs, shuffle, count):
    callback, module = LaplaceEvidence(), Module(mlp(), cross_entropy)
    fit(tmp_path, module, loader(shuffle=shuffle), callback, **kwargs)
    x, y = tensors()
    assert disagreements(callback.history[0][1], reference(module.network, (x[:count], y[:count]))) == {}


def test_max_examples_is_the_same_subset_each_epoch(tmp_path):
    callback = LaplaceEvidence(max_examples=9, prior_precision=2.0)
    module = Module(mlp(), cross_entropy, optimizer(lr=0.0))
    fit(tmp_path, module, loader(shuffle=True), callback, max_epochs=2)
    (_, first), (_, second) = callback.history
    assert first.num_examples == 9
    assert first.log_evidence == second.log_evidence


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batch_size_of_the_evaluation_does_not_matter(tmp_path, batch_size):
    callback, module = LaplaceEvidence(batch_size=batch_size), Module(mlp(), cross_entropy)
    fit(tmp_path, module, loader(), callback)
    assert disagreements(callback.history[0][1], reference(module.network, tensors())) == {}


def test_fast_dev_run_is_a_rehearsal(tmp_path):
    callback = LaplaceEvidence(max_examples=100)
    fit(tmp_path, Module(mlp(), cross_entropy), loader(data=tensors(size=50)), callback, fast_dev_run=True)
    assert callback.history[0][1].num_examples == 8  # the one batch that a dry run trains on
    callback = LaplaceEvidence()
    data = loader(data=tensors(size=50), shuffle=True)
    fit(tmp_path, Module(mlp(), cross_entropy), data, callback, fast_dev_run=True)
    assert callback.history[0][1].num_examples == 32


def groups(module):
    weights = [p for name, p in module.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    return torch.optim.SGD(
        [
            {"params": weights[:1], "weight_decay": DECAY},
            {"params": weights[1:], "weight_decay": 3 * DECAY},
            {"params": biases, "weight_decay": 0.0},
        ],
        lr=0.1,
    )


def test_decays_of_parameter_groups(tmp_path, caplog):
    callback, module = LaplaceEvidence(), Module(mlp(), cross_entropy, groups)
    with caplog.at_level(logging.INFO):
        run = fit(tmp_path, module, loader(), callback)
    evidence = callback.history[0][1]
    expected = reference(
        module.network,
        tensors(),
        precision={"0.weight": N * DECAY, "2.weight": 3 * N * DECAY},
    )
    assert disagreements(evidence, expected) == {}
    assert evidence.fixed_parameters == ("network.0.bias", "network.2.bias")
    assert "['network.0.bias', 'network.2.bias'] have no weight decay" in caplog.text
    # Logged in float32, one key each.
    assert run.callback_metrics["bayes/prior_precision/1"] == pytest.approx(N * DECAY, rel=1e-6)
    assert run.callback_metrics["bayes/prior_precision/2"] == pytest.approx(3 * N * DECAY, rel=1e-6)


def test_prior_given_as_a_number(tmp_path):
    callback, module = LaplaceEvidence(prior_precision=0.7), Module(mlp(), cross_entropy)
    fit(tmp_path, module, loader(), callback)
    assert disagreements(callback.history[0][1], reference(module.network, tensors(), precision=0.7)) == {}


def test_prior_given_by_patterns(tmp_path):
    callback = LaplaceEvidence(prior_precision={"*.0.bias": 0.0, "*.bias": 0.5, "*": 2.0})
    module = Module(mlp(), cross_entropy, optimizer(weight_decay=0.0))
    fit(tmp_path, module, loader(), callback)
    precision = {"0.weight": 2.0, "2.weight": 2.0, "2.bias": 0.5}
    expected = reference(module.network, tensors(), precision=precision)
    assert disagreements(callback.history[0][1], expected) == {}
    assert callback.history[0][1].fixed_parameters == ("network.0.bias",)


def test_weight_decay_is_read_at_each_epoch(tmp_path):
    class Scheduled(Module):
        def on_train_epoch_start(self):
            self.optimizers().param_groups[0]["weight_decay"] = DECAY * (1 + self.current_epoch)

    callback = LaplaceEvidence()
    fit(tmp_path, Scheduled(mlp(), cross_entropy), loader(), callback, max_epochs=2)
    assert [e.prior_precision for _, e in callback.history] == pytest.approx([N * DECAY, 2 * N * DECAY])


DECOUPLED = {"AdamW": torch.optim.AdamW}
if "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters:  # newer PyTorch's
    DECOUPLED["Adam, decoupled"] = functools.partial(torch.optim.Adam, decoupled_weight_decay=True)


@pytest.mark.parametrize("make", DECOUPLED.values(), ids=DECOUPLED)
def test_decoupled_decay_is_called_an_approximation(tmp_path, make):
    callback = LaplaceEvidence()
    module = Module(mlp(), cross_entropy, lambda m: make(m.parameters(), lr=0.01, weight_decay=DECAY))
    with pytest.warns(UserWarning, match=r"AdamW\) is not a Gaussian prior.*Give prior_precision="):
        fit(tmp_path, module, loader(), callback)
    assert callback.history[0][1].prior_precision == pytest.approx(N * DECAY)


def test_frozen_parameters_are_left_out_and_named_once(tmp_path, caplog):
    module = Module(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), cross_entropy)
    module.network[0].requires_grad_(False)
    callback = LaplaceEvidence()
    with caplog.at_level(logging.INFO):
        fit(tmp_path, module, loader(), callback, max_epochs=2)
    assert caplog.text.count("['network.0.weight', 'network.0.bias'] are left out: frozen") == 1
    evidence = callback.history[1][1]
    assert evidence.num_parameters == 5 * 3 + 3
    assert evidence.fixed_parameters == ("network.0.weight", "network.0.bias")
    assert disagreements(evidence, reference(module.network, tensors())) == {}


@pytest.mark.parametrize("replicas", [2, 8])
def test_a_stream_under_several_processes_names_the_way_out(replicas):
    """Its shard cannot be told from the whole."""
    stream = type(
        "Stream", (IterableDataset,), {"__iter__": lambda self: iter(()), "__len__": lambda self: 8}
    )()
    several = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": replicas})
    trainer = SimpleNamespace(strategy=several)
    with pytest.raises(
        ValueError, match=rf"Stream is an IterableDataset that {replicas} processes.*map-style"
    ):
        check_stream(trainer, DataLoader(stream))
    check_stream(trainer, DataLoader(TensorDataset(torch.zeros(3))))
    check_stream(SimpleNamespace(strategy=SimpleNamespace()), DataLoader(stream))
