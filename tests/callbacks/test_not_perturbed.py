"""Training with the callbacks is, bit for bit, training without them."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bayes import (
    BatchSizeScheduler,
    GradientNoiseScale,
    LaplaceEvidence,
    ScalingAdvisor,
    SGDNoiseScale,
    Stability,
)

from .evidence_models import Module, N, Rich, fit, loader, optimizer, tensors


class Model(Module):
    """Draws from three random streams, keeps metrics, hooks, buffers, and a frozen parameter."""

    def __init__(self):
        super().__init__(Rich(), None, optimizer(momentum=0.9, nesterov=True))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.frozen = nn.Linear(2, 2)
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))
        self.draws, self.calls = [], 0
        self.network.head.register_forward_hook(self.count)

    def on_train_start(self):
        self.network.drop.eval()  # a mode of its own

    def count(self, *_):
        self.calls += 1

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.steps += 1
        self.draws.append((torch.rand(()).item(), np.random.rand(), random.random()))
        loss = F.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y) + 0 * self.draws[-1][0]
        self.accuracy(self(x).softmax(1), y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


class Augmented(Dataset):
    """Noise on every item that is read, from the three streams and from generators of its own."""

    def __init__(self):
        self.x, self.y = tensors(size=21)
        own_torch, own_numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.transforms = {
            "closure": [lambda: torch.rand((), generator=own_torch), partial(own_numpy.normal, size=())],
            "legacy": (np.random.RandomState(1).normal, random.Random(1).random),
        }

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.randn(4, dtype=torch.float64) * random.random() * np.random.rand()
        for transforms in self.transforms.values():
            for transform in transforms:
                noise += float(transform())
        return self.x[index] + 0.01 * noise, self.y[index]


def trained(tmp_path, callbacks, **kwargs):
    """Everything that training leaves behind."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    model = Model()
    generator = torch.Generator().manual_seed(7)
    data = DataLoader(Augmented(), batch_size=6, shuffle=True, generator=generator)
    run = fit(tmp_path, model, data, *callbacks, max_epochs=3, **kwargs)
    return {
        "weights and buffers": dict(model.state_dict()),
        "optimizer": run.optimizers[0].state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "loader": generator.get_state(),
        "metric": [model.accuracy.tp, model.accuracy.fp, model.accuracy.update_count],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "hooks": [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        "attributes": sorted(vars(model)),
        "calls": model.calls,
        "draws": model.draws,
        "logged": {k: v for k, v in run.logged_metrics.items() if not k.startswith("bayes/")},
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def observers():
    return [
        LaplaceEvidence(),
        SGDNoiseScale(logging_interval="step"),
        ScalingAdvisor(target_batch_size=12),
        Stability(sharpness=True),
    ]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "64-true"},
        {"max_steps": 7},
    ],
    ids=str,
)
def test_bit_identical(tmp_path, kwargs):
    # The noisy training_step of this model is meant: it warns, and is nevertheless left alone.
    with pytest.warns(UserWarning, match="draws random numbers"):
        with_callbacks = trained(tmp_path / "a", observers(), **kwargs)
    without = trained(tmp_path / "b", [], **kwargs)
    assert [name for name in without if not same(with_callbacks[name], without[name])] == []


def test_bit_identical_with_the_network_read_directly(tmp_path):
    callback = LaplaceEvidence("kron", likelihood="classification", network="network", max_examples=10)
    with_callback = trained(tmp_path / "a", [callback])
    without = trained(tmp_path / "b", [])
    assert len(callback.history) == 3
    assert [name for name in without if not same(with_callback[name], without[name])] == []


@pytest.mark.parametrize("schedule", [[], [3], {100: 5.0}], ids=str)
def test_bit_identical_until_the_batch_grows(tmp_path, schedule):
    with_callback = trained(tmp_path / "a", [BatchSizeScheduler(schedule)])
    without = trained(tmp_path / "b", [])
    assert [name for name in without if not same(with_callback[name], without[name])] == []


STABILITY = {
    "hessian": {},
    "ggn": {"curvature": "ggn"},
    "sharpness": {"sharpness": True},
    "network": {"network": "network", "likelihood": "classification", "max_examples": 12},
}


@pytest.mark.parametrize("options", STABILITY)
def test_bit_identical_with_stability(tmp_path, options):
    callback = Stability(**STABILITY[options])
    with_callback = trained(tmp_path / "a", [callback])
    without = trained(tmp_path / "b", [])
    assert len(callback.history) == 3
    assert [name for name in without if not same(with_callback[name], without[name])] == []


def test_bit_identical_beside_a_reference(tmp_path):
    reference = {"learning_rate": 0.1, "batch_size": 6, "dataset_size": 21, "momentum": 0.9}
    callback = ScalingAdvisor(target_batch_size=12, reference=reference, ema_decay=0.9)
    with_callback = trained(tmp_path / "a", [callback])
    without = trained(tmp_path / "b", [])
    assert callback.advice and not callback.comparisons[0].differs
    assert [name for name in without if not same(with_callback[name], without[name])] == []


@pytest.mark.filterwarnings("ignore:GradientNoiseScale. B_simple is not resolved:UserWarning")
@pytest.mark.parametrize("method", ["per_example", "split_batch", "micro_batches"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"gradient_clip_val": 0.1}, {"precision": "64-true"}, {"precision": "bf16-mixed"}], ids=str
)
def test_bit_identical_with_gradient_noise(tmp_path, method, kwargs):
    noise = GradientNoiseScale(every_n_steps=2, method=method, per_layer=True)
    with_callback = trained(tmp_path / "a", [noise], accumulate_grad_batches=2, **kwargs)
    without = trained(tmp_path / "b", [], accumulate_grad_batches=2, **kwargs)
    assert noise.estimate is not None
    assert [name for name in without if not same(with_callback[name], without[name])] == []


def test_the_comparison_sees_one_bit(tmp_path):
    state = trained(tmp_path, [])
    other = copy.deepcopy(state)
    other["weights and buffers"]["network.head.bias"].view(torch.int64)[0] ^= 1
    assert not same(state, other)


@pytest.mark.parametrize("batch_size", [7, 21])
def test_batch_given_to_the_step_is_not_touched(tmp_path, batch_size):
    def step(module, batch):
        x, y = batch
        seen.append(x.sum().item())
        x.zero_()
        return F.cross_entropy(module(x), y)

    seen = []
    x, y = tensors()
    data = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    fit(tmp_path, Module(Rich(), step), data, LaplaceEvidence())
    assert all(value != 0 for value in seen)


def test_samplers_keep_their_state(tmp_path):
    def order(callbacks):
        torch.manual_seed(0)
        seen = []

        def step(module, batch):
            if module.trainer.__class__ is type(module.trainer):  # the copy's Trainer is a stand-in
                seen.append(batch[1].tolist())
            return F.cross_entropy(module(batch[0]), batch[1])

        x, _ = tensors(size=12)
        weights = torch.utils.data.WeightedRandomSampler(torch.ones(12), 12, generator=torch.Generator())
        data = loader(data=(x, torch.arange(12) % 3), batch_size=4, sampler=weights)
        fit(tmp_path, Module(Rich(), step), data, *callbacks, max_epochs=3)
        return seen

    assert order([LaplaceEvidence()]) == order([])
    assert order([Stability()]) == order([])


class Half(torch.utils.data.Sampler):
    """Draws half of the examples from the global generator."""

    def __iter__(self):
        return iter(torch.randperm(N)[: N // 2].tolist())

    def __len__(self):
        return N // 2


@pytest.mark.parametrize("callback", [LaplaceEvidence, Stability])
def test_a_sampler_of_the_users_own_is_not_drawn_from(tmp_path, callback):
    def seen(callbacks):
        torch.manual_seed(0)

        def step(module, batch):
            return F.cross_entropy(module(batch[0]), batch[1])

        module = Module(Rich(), step)
        fit(tmp_path, module, loader(batch_size=5, sampler=Half()), *callbacks, max_epochs=2)
        return [p.detach().clone() for p in module.parameters()]

    assert same(seen([callback()]), seen([]))
