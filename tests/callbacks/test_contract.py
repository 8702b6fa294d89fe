"""What holds for every callback, whatever it measures: one table, and a test for each clause."""

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
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
from lightning_bayes.structures.base import Budget
from tests.refusals import UNSAID, refuses
from tests.scenarios import Module, N, Rich, fit, loader, optimizer, same, tensors, trainer

from . import not_allowed as no
from .not_allowed import Row, finite_of, run

pytestmark = pytest.mark.filterwarnings("ignore:GradientNoiseScale. B_simple is not resolved:UserWarning")


@dataclass(frozen=True)
class Kind:
    """A callback, as the clauses use it.

    Attributes:
        make: makes one.
        refused: what another is made with that cannot stand beside the first.
        beside: what another is made with that can; None where none can.
        held: of what it has measured, all that a resumed run must have again.
        stored: what a checkpoint may hold of it that cannot be read.
        manual: what it says of a module that optimizes manually, as `refuses` takes it.
    """

    make: Callable[..., Any]
    refused: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] | None = None
    held: Callable[[Any], Any] = lambda callback: callback.state_dict()
    stored: tuple[Any, ...] = ()
    manual: tuple[Any, ...] = ("automatic_optimization = False", UNSAID, "Remove the callback")

    @property
    def measures(self) -> bool:
        """Whether it leaves training alone from the first step to the last."""
        return self.make is not GROWING


def history(callback):
    """All but the seconds that a reading took."""
    return [(epoch, replace(reading, seconds=0.0)) for epoch, reading in callback.history]


GROWING = partial(BatchSizeScheduler, [3])
ELSEWHERE = {"log_key_prefix": "elsewhere/"}
HISTORIES = (
    {"history": [(0, {"log_evidence": 1.0, "unheard_of": 2.0})]},
    {"history": [(0, {})]},
    {"history": 3},
    {},
)
KINDS = {
    "LaplaceEvidence": Kind(
        LaplaceEvidence,
        refused={"structure": "diag"},
        beside={"structure": "diag", **ELSEWHERE},
        held=history,
        stored=HISTORIES,
        manual=("optimizes manually", UNSAID, "network="),
    ),
    "SGDNoiseScale": Kind(SGDNoiseScale, refused={"dataset_size": 50}, beside=ELSEWHERE),
    "GradientNoiseScale": Kind(
        partial(no.EVERY_STEP, per_layer=True),
        refused={"ema": 0.5},
        beside={"every_n_steps": 3, **ELSEWHERE},
        held=lambda callback: (callback.estimate, callback.layer_estimates),
        stored=({"parts": ("",), "averages": {"unheard_of": torch.zeros(3)}}, {"averages": 3}),
    ),
    "Stability": Kind(
        Stability,
        refused={"curvature": "ggn"},
        beside={"curvature": "ggn", **ELSEWHERE},
        held=history,
        stored=HISTORIES,
        manual=("optimizes manually", UNSAID, "network="),
    ),
    "ScalingAdvisor": Kind(
        no.SMALL_ADVISOR,
        refused=ELSEWHERE,
        beside={"target_batch_size": 24},
        held=lambda callback: (callback.state_dict(), callback.advice),
        stored=({"net": {"peak": "unheard_of"}}, {"net": 3}),
    ),
    "BatchSizeScheduler": Kind(GROWING),
}
MEASURING = [name for name, kind in KINDS.items() if kind.measures]
LOGGING = [name for name in MEASURING if KINDS[name].make().LOGGED]


# Training with a callback is, bit for bit, training without it.


class Model(Module):
    """Draws from three random streams, keeps metrics, hooks, buffers, and a frozen parameter."""

    def __init__(self, interval=None):
        super().__init__(Rich(), None, optimizer(momentum=0.9, nesterov=True))
        self.interval = interval
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

    def configure_optimizers(self):
        sgd = super().configure_optimizers()
        if self.interval is None:
            return sgd
        schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


class Augmented(Dataset):
    """Noise on every item that is read, from the three streams and from generators of its own."""

    def __init__(self):
        self.x, self.y = tensors(size=N)
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


def trained(tmp_path, callbacks, interval=None, **kwargs):
    """Everything that training leaves behind."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    model = Model(interval)
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function from settings to what training leaves behind without a callback; run once for each."""
    results = {}

    def of(**settings):
        key = repr(settings)
        if key not in results:
            results[key] = trained(tmp_path_factory.mktemp("alone"), [], **settings)
        return results[key]

    return of


def observers():
    return [
        LaplaceEvidence(),
        SGDNoiseScale(logging_interval="step"),
        ScalingAdvisor(target_batch_size=12),
        Stability(sharpness=True),
    ]


def reread_evidence():
    """By passes over the data for each product, of vectors for what the largest rows leave."""
    callback = LaplaceEvidence("lanczos", num_probes=2)
    budget = Budget(stored_bytes=0.0, kept_bytes=16.0 * 6**2)  # room for a few selected rows
    callback.method = replace(callback.method, budget=budget)
    callback._evaluation = replace(callback._evaluation, method=callback.method)
    return [callback]


BY_NAME = {"network": "network", "likelihood": "classification"}
REFERENCE = {"learning_rate": 0.1, "batch_size": 6, "dataset_size": N, "momentum": 0.9}
ACCUMULATED = {"accumulate_grad_batches": 2}
UNPERTURBED: dict[str, tuple[Callable[[], list[Any]], dict[str, Any]]] = {
    **{
        f"all, {settings}": (observers, settings)
        for settings in (
            {},
            ACCUMULATED,
            {"gradient_clip_val": 0.1},
            {"precision": "64-true"},
            {"max_steps": 7},
            {"interval": "step"},
        )
    },
    **{
        f"evidence, {options}": (lambda options=options: [LaplaceEvidence(**options)], {})
        for options in (
            {"structure": "kron", "max_examples": 10, **BY_NAME},
            {"subset_of_weights": "last_layer", "prior_precision": "optimize_per_parameter"},
            {"curvature": "hessian_positive"},
            {"structure": "lanczos"},
        )
    },
    "evidence, lanczos, rows read again": (reread_evidence, {}),
    **{
        f"stability, {options}": (lambda options=options: [Stability(**options)], {})
        for options in ({}, {"curvature": "ggn"}, {"sharpness": True}, {"max_examples": 12, **BY_NAME})
    },
    **{
        f"SGD's noise, {options}, {settings}": (
            lambda options=options: [SGDNoiseScale(**options)],
            {"interval": "epoch", **settings},
        )
        for options in ({}, {"logging_interval": "step"})
        for settings in ({}, {"accumulate_grad_batches": 3})
    },
    "reference": (
        lambda: [ScalingAdvisor(target_batch_size=12, reference=REFERENCE, ema_decay=0.9)],
        {},
    ),
    **{
        f"gradient noise, {method}, {settings}": (
            lambda method=method: [GradientNoiseScale(every_n_steps=2, method=method, per_layer=True)],
            ACCUMULATED | settings,
        )
        for method in ("per_example", "split_batch", "micro_batches")
        for settings in (
            {},
            {"gradient_clip_val": 0.1},
            {"precision": "64-true"},
            {"precision": "bf16-mixed"},
        )
    },
    **{
        f"before the batch grows, {schedule}": (lambda schedule=schedule: [BatchSizeScheduler(schedule)], {})
        for schedule in ([], [3], {100: 5.0})
    },
}


def has_measured(callback, epochs):
    if isinstance(callback, LaplaceEvidence | Stability):
        return len(callback.history) == epochs
    if isinstance(callback, GradientNoiseScale):
        return callback.estimate is not None
    if isinstance(callback, ScalingAdvisor):
        return bool(callback.advice) and not any(one.differs for one in callback.comparisons)
    return True


# The noisy training_step of the model is meant: evidence warns of it, and leaves the run alone nevertheless.
@pytest.mark.filterwarnings("ignore:.*draws random numbers:UserWarning")
@pytest.mark.parametrize("name", UNPERTURBED)
def test_training_is_not_perturbed(tmp_path, alone, name):
    make, settings = UNPERTURBED[name]
    callbacks = make()
    watched, without = trained(tmp_path, callbacks, **settings), alone(**settings)
    assert all(has_measured(callback, 2 if "max_steps" in settings else 3) for callback in callbacks)
    assert [what for what in without if not same(watched[what], without[what])] == []


def test_the_comparison_sees_one_bit(alone):
    state = alone()
    other = copy.deepcopy(state)
    other["weights and buffers"]["network.head.bias"].view(torch.int64)[0] ^= 1
    assert not same(state, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [7, 21])
def test_batch_given_to_the_step_is_not_touched(tmp_path, kind, batch_size):
    def step(module, batch):
        x, y = batch
        seen.append((module.training, x.sum().item()))
        x.zero_()
        return F.cross_entropy(module(x), y)

    seen = []
    data = DataLoader(TensorDataset(*tensors()), batch_size=batch_size)
    fit(tmp_path, Module(Rich(), step), data, KINDS[kind].make())
    # GradientNoiseScale runs its copy twice on the first batch.
    copies = kind != "GradientNoiseScale"
    assert all(value != 0 for in_training, value in seen if in_training or copies)


class AllButOne(torch.utils.data.Sampler):
    """Draws from the global generator."""

    def __iter__(self):
        return iter(torch.randperm(N)[: N - 1].tolist())

    def __len__(self):
        return N - 1


SAMPLERS = {
    "weighted": lambda: torch.utils.data.WeightedRandomSampler(torch.ones(N), N, generator=torch.Generator()),
    "the user's own": AllButOne,
}


@pytest.mark.filterwarnings("ignore:.* draws :UserWarning")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_are_not_drawn_from(tmp_path, kind, sampler):
    def left_behind(*callbacks):
        torch.manual_seed(0)
        seen = []

        def step(module, batch):
            if module.trainer.__class__ is type(module.trainer):  # the copy's Trainer is a stand-in
                seen.append(batch[1].tolist())
            return F.cross_entropy(module(batch[0]), batch[1])

        module = Module(Rich(), step)
        data = loader(batch_size=6, sampler=SAMPLERS[sampler]())
        fit(tmp_path, module, data, *callbacks, max_epochs=2)
        return seen, [p.detach().clone() for p in module.parameters()]

    assert same(left_behind(KINDS[kind].make()), left_behind())


# A resumed run is the one that was not interrupted, in weights and in what the callback has measured.


def resumable(kind):
    """The callback, beside another of its kind where one can be."""
    callback = [kind.make()]
    return callback if kind.beside is None else [*callback, kind.make(**kind.beside)]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_uninterrupted(tmp_path, kind):
    kind = KINDS[kind]

    def go_on(epochs, ckpt_path=None):
        callbacks = resumable(kind)
        fitted, module, ours = run(
            tmp_path, Row("", kind.make, "", ""), *callbacks, epochs=epochs, ckpt_path=ckpt_path
        )
        assert ours == []
        return fitted, {
            "weights": dict(module.state_dict()),
            "optimizer": fitted.optimizers[0].state_dict(),
            "logged": dict(fitted.callback_metrics),
            "held": [kind.held(callback) for callback in callbacks],
        }

    _, whole = go_on(5)
    first, half = go_on(2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    # Nothing but plain types.
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"].keys() >= {
        callback.state_key for callback in first.callbacks if callback.state_dict()
    }
    _, resumed = go_on(5, tmp_path / "half.ckpt")
    assert [what for what in whole if not same(resumed[what], whole[what])] == []
    assert not same(half["weights"], whole["weights"])


@pytest.mark.parametrize(
    ("kind", "stored"), [(name, stored) for name, kind in KINDS.items() for stored in kind.stored], ids=str
)
def test_checkpoint_of_another_version(tmp_path, kind, stored):
    kind = KINDS[kind]
    row, callback = Row("resumed", kind.make, "", ""), kind.make()
    fitted, *_ = run(tmp_path, row, callback)
    path = tmp_path / "of_another.ckpt"
    fitted.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["callbacks"][callback.state_key] = stored
    torch.save(checkpoint, path)
    resumed = kind.make()
    fitted, _, ours = run(tmp_path, row, resumed, epochs=2, ckpt_path=path)
    assert fitted.current_epoch == 2
    assert len(ours) <= 1, ours
    assert finite_of(fitted, resumed), ours


# Two of one kind that would be taken for each other are refused.


@pytest.mark.parametrize("kind", KINDS)
def test_twice_is_refused(tmp_path, kind):
    pair = [KINDS[kind].make(), KINDS[kind].make(**KINDS[kind].refused)]

    class WithCallbacks(no.Small):
        # Lightning refuses two that share their state when they are given to the Trainer itself, but not these.
        def configure_callbacks(self):
            return pair

    module = WithCallbacks()
    before = copy.deepcopy(module.state_dict())
    fitting = trainer(tmp_path, [], enable_checkpointing=True)
    with refuses(kind, remedy="emove"):
        fitting.fit(module, no.loader())
    assert fitting.global_step == 0
    assert same(dict(module.state_dict()), dict(before))


# Every key can be monitored, whether or not there is a value.


def monitors(folder, keys):
    stopping = [EarlyStopping(key, patience=9, check_finite=False) for key in keys]
    return [*stopping, *(ModelCheckpoint(folder / str(index), monitor=key) for index, key in enumerate(keys))]


@pytest.mark.parametrize("step", [no.classify, no.absolute, no.regression], ids=lambda step: step.__name__)
@pytest.mark.parametrize("kind", LOGGING)
def test_every_key_can_be_monitored(tmp_path, kind, step):
    """A regression has no ratio, Adam no SGD noise scale, a run that cannot be read nothing at all."""
    make = KINDS[kind].make
    keys = [f"bayes/{name}" for name in make().LOGGED]
    row = Row("monitored", make, "", "", module=no.scheduled(step, keys))
    fitted, _, _ = run(tmp_path, row, make(), *monitors(tmp_path, keys), epochs=2)
    assert fitted.current_epoch == 2


@pytest.mark.parametrize("kind", LOGGING)
def test_early_stopping_on_a_key_that_is_off(tmp_path, kind):
    make = KINDS[kind].make
    row = Row("stopped", make, "", "", module=no.Manual)
    if kind != "SGDNoiseScale":
        row = Row("stopped", make, "", "", module=no.stepping(no.fails_in_eval(KeyError("mask"))))
    key = f"bayes/{make().ALWAYS_LOGGED[0]}"
    _, _, ours = run(tmp_path, row, make(), EarlyStopping(key, patience=9), epochs=3)
    assert f"EarlyStopping monitors {key}" in ours[0][1]
    assert "check_finite=False" in ours[0][1]
    stopping = EarlyStopping(key, patience=9, check_finite=False)
    fitted, _, ours = run(tmp_path, row, make(), stopping, epochs=3)
    assert fitted.current_epoch == 3
    assert "check_finite" not in ours[0][1]


# What is not allowed is one warning that ends the measuring, or an error where that is wanted; test_not_allowed.py
# goes through what there is.


@pytest.mark.parametrize("kind", MEASURING)
def test_on_error_is_checked_at_construction(kind):
    with refuses("`on_error`", "maybe", remedy='"warn" or "raise"'):
        KINDS[kind].make(on_error="maybe")


@pytest.mark.parametrize("kind", KINDS)
def test_on_error(tmp_path, kind):
    make = KINDS[kind].make
    row = Row("manual", make, "", "", module=no.Manual)
    if KINDS[kind].measures:
        _, bare, _ = run(tmp_path, row)
        callback = make()
        fitted, module, ours = run(tmp_path, row, callback)
        assert [(step, text.startswith(f"{kind}: nothing is measured")) for step, text in ours] == [(0, True)]
        assert same(dict(module.state_dict()), dict(bare.state_dict()))
        assert callback.is_off and not finite_of(fitted, callback)
        make = partial(make, on_error="raise")
    with refuses(*KINDS[kind].manual):
        run(tmp_path, row, make())
