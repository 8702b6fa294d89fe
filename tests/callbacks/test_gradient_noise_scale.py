"""GradientNoiseScale against chosen answers, torch.func, literal averages; what it logs, keeps and refuses."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import GradientNoiseScale
from lightning_bayes.callbacks.gradient_noise.metric import GradientNoiseMetric
from lightning_bayes.functional import GradientNoise, gradient_noise_scale
from tests.cases import make_case
from tests.refusals import refuses
from tests.scenarios import (
    OFFSET,
    SQUARED_NORM,
    TRACE,
    Module,
    Quadratic,
    Rich,
    collected,
    in_order,
    loader,
    mlp,
    noisy_targets,
    optimizer,
    penalised_step,
    readable_step,
    step_by_hand,
    tensors,
    trainer,
)

from .test_sgd_noise_scale import Recorder

# One small batch often does not resolve B_simple; where that is the subject, `pytest.warns` sees it nevertheless.
pytestmark = [
    pytest.mark.filterwarnings("ignore:GradientNoiseScale. B_simple is not resolved:UserWarning"),
    # Lightning says it once in a process.
    pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning"),
]

EVERY = {"every_n_steps": 1, "ema": 0.0}


def fit(tmp_path, module, data, noise, **kwargs):
    run = trainer(tmp_path, [noise], **kwargs)
    run.fit(module, data)
    return run


# Unbiased, each way


@pytest.mark.parametrize(
    ("method", "batch_size", "accumulate", "step"),
    [
        ("per_example", 8, 1, readable_step),
        ("micro_batches", 4, 2, step_by_hand),
        ("split_batch", 8, 1, step_by_hand),
    ],
)
def test_unbiased_on_a_quadratic(tmp_path, method, batch_size, accumulate, step):
    steps = 400
    noise = GradientNoiseScale(method=method, **EVERY)
    found = collected(
        tmp_path,
        noise,
        in_order(noisy_targets(8 * steps), batch_size),
        Quadratic(step),
        accumulate_grad_batches=accumulate,
    )[:: accumulate or 1]
    for name, truth in (("trace", TRACE), ("squared_norm", SQUARED_NORM)):
        values = torch.tensor([getattr(estimate, name) for estimate in found[-steps:]], dtype=torch.float64)
        error = values.std().item() / math.sqrt(len(values))
        assert len(values) == pytest.approx(steps, abs=1)
        assert abs(values.mean().item() - truth) < 4 * error
        assert error < 0.2 * truth  # so that the test can fail


def test_a_long_average_finds_the_ratio(tmp_path):
    noise = GradientNoiseScale(every_n_steps=1, ema=0.999)
    collected(tmp_path, noise, in_order(noisy_targets(8 * 400), 8))
    assert noise.status == "resolved"
    assert noise.estimate.noise_scale == pytest.approx(TRACE / SQUARED_NORM, rel=0.15)


# Exact, each way


def per_example_gradients(network, x, y, loss=F.cross_entropy):
    """torch.func's, [B, p]."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def of_one(parameters, x, y):
        return loss(functional_call(network, parameters, (x[None],)), y[None])

    gradients = vmap(grad(of_one), (None, 0, 0))(parameters, x, y)
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


@pytest.mark.parametrize(
    "network",
    ["mlp", "conv", "batch_norm", "residual", "shared_weight", "embedding", "layer_norm", "resnet_block"],
)
def test_per_example_is_torch_func(tmp_path, network):
    case = make_case(network)

    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    noise = GradientNoiseScale(per_layer=True, **EVERY)
    module = Module(case.model, step, optimizer(lr=0.0))
    expected = gradient_noise_scale(per_example_gradients(case.model.eval(), case.inputs, case.targets))
    module.train()
    fit(tmp_path, module, DataLoader(TensorDataset(case.inputs, case.targets), 7), noise)
    assert noise.estimate.trace == pytest.approx(expected.trace, rel=1e-10)
    assert noise.estimate.squared_norm == pytest.approx(expected.squared_norm, rel=1e-10)
    layers = noise.layer_estimates
    assert sum(part.trace for part in layers.values()) == pytest.approx(expected.trace, rel=1e-10)
    assert set(layers) == {name.rpartition(".")[0] for name, _ in module.named_parameters()}


def summed(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


def weighted(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 3.0]).double())


def ignoring(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1].where(batch[0][:, 0] > -0.5, -100))


@pytest.mark.parametrize("step", [summed, weighted, ignoring])
def test_the_mean_is_the_gradient_of_the_loss_as_it_is_returned(tmp_path, step):
    module = Module(mlp(), step, optimizer(lr=0.0))
    x, y = tensors()
    gradient = torch.autograd.grad(step(module, (x, y)), list(module.parameters()))
    noise = GradientNoiseScale(**EVERY)
    fit(tmp_path, module, loader(batch_size=21), noise)
    mean = noise.estimate.squared_norm + noise.estimate.trace / 21
    assert mean == pytest.approx(sum(g.square().sum().item() for g in gradient), rel=1e-10)


def literal_micro_batches(y, sizes, nominal=None):
    """From the gradients of micro-batches, as McCandlish et al. write it."""
    gradients = [(OFFSET - part).mean(0) / 2 for part in y.split(sizes)]
    size = len(sizes) / sum(1 / size for size in sizes)
    small = sum(g.square().sum().item() for g in gradients) / len(sizes)
    large = (sum(gradients) / len(sizes)).square().sum().item()
    whole = len(sizes) * size
    squared_norm = (whole * large - size * small) / (whole - size)
    return (small - large) / (1 / size - 1 / whole), squared_norm


def test_micro_batches_by_hand(tmp_path):
    # 4 + 4 + 4, then an incomplete group of 4 + 2, whose loss Lightning divides by 3 all the same.
    y = noisy_targets(18)
    noise = GradientNoiseScale(method="micro_batches", **EVERY)
    found = collected(tmp_path, noise, in_order(y, 4), Quadratic(step_by_hand), accumulate_grad_batches=3)
    for estimate, (part, sizes) in zip(
        [found[0], found[-1]], [(y[:12], [4, 4, 4]), (y[12:], [4, 2])], strict=True
    ):
        trace, squared_norm = literal_micro_batches(part, sizes)
        assert estimate.trace == pytest.approx(trace, rel=1e-10)
        assert estimate.squared_norm == pytest.approx(squared_norm, rel=1e-10)


def test_micro_batches_see_gradients_before_clipping_and_skip_a_step_without_loss(tmp_path):
    y = noisy_targets(24)

    def sometimes(module, batch):
        return None if torch.equal(batch[1], y[4:8]) else step_by_hand(module, batch)

    noise = GradientNoiseScale(method="micro_batches", **EVERY)
    found = collected(
        tmp_path,
        noise,
        in_order(y, 4),
        Quadratic(sometimes),
        accumulate_grad_batches=3,
        gradient_clip_val=1e-3,
    )
    first = literal_micro_batches(torch.cat([y[:4], y[8:12]]), [4, 4])
    second = literal_micro_batches(y[12:], [4, 4, 4])
    assert (found[0].trace, found[0].squared_norm) == pytest.approx(first, rel=1e-10)
    assert (found[-1].trace, found[-1].squared_norm) == pytest.approx(second, rel=1e-10)


def test_split_batch_by_hand(tmp_path):
    y = noisy_targets(18)
    noise = GradientNoiseScale(method="split_batch", **EVERY)
    (found,) = collected(tmp_path, noise, in_order(y, 18), Quadratic(step_by_hand))
    assert (found.trace, found.squared_norm) == pytest.approx(
        literal_micro_batches(y[:16], [4, 4, 4, 4]), rel=1e-10
    )


def test_dropout_is_off_and_batch_norm_uses_running_statistics(tmp_path):
    module = Module(Rich(), lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), optimizer(lr=0.0))
    expected = gradient_noise_scale(per_example_gradients(module.network.eval(), *tensors()))
    module.train()
    noise = GradientNoiseScale(**EVERY)
    fit(tmp_path, module, loader(batch_size=21), noise)
    assert noise.estimate.trace == pytest.approx(expected.trace, rel=1e-10)


def test_a_step_whose_last_micro_batch_has_no_loss_is_passed_over(tmp_path):
    y = noisy_targets(16)

    def sometimes(module, batch):
        return None if torch.equal(batch[1], y[12:]) else step_by_hand(module, batch)

    noise = GradientNoiseScale(method="micro_batches", **EVERY)
    found = collected(tmp_path, noise, in_order(y, 4), Quadratic(sometimes), accumulate_grad_batches=2)
    assert found[-1] == found[0]


# Following the module


class Changing(Module):
    """Coefficients, a buffer and a frozen layer that change in each epoch; a list that grows with every step."""

    def __init__(self):
        super().__init__(mlp(), None, lambda module: torch.optim.SGD(module.parameters(), lr=0.05))
        self.register_buffer("shift", torch.zeros(3).double())
        self.scale, self.schedule, self.losses = 1.0, {"power": [1]}, []
        self.temperature = torch.ones(1).double()  # no buffer
        self.network[0].requires_grad_(False)

    def logits(self, network, x):
        return self.scale / self.temperature * network(x) ** self.schedule["power"][0] + self.shift

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.logits(self.network, batch[0]), batch[1])
        self.losses.append(loss)
        return loss

    def on_train_epoch_start(self):
        self.scale += 0.5
        self.temperature = self.temperature * 0.7
        self.schedule["power"][0] = 1 + self.current_epoch % 2
        self.shift = self.shift + torch.arange(3.0).double()
        if self.current_epoch == 2:
            self.network[0].requires_grad_(True)


def test_the_copy_follows_the_module(tmp_path):
    module = Changing()
    expected, x, y = [], *tensors()

    class Literal(GradientNoiseScale):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            parameters = [p for p in pl_module.network.parameters() if p.requires_grad]
            rows = [
                torch.autograd.grad(
                    F.cross_entropy(pl_module.logits(pl_module.network, x[i : i + 1]), y[i : i + 1]),
                    parameters,
                )
                for i in range(21)
            ]
            expected.append(
                gradient_noise_scale(torch.stack([torch.cat([g.flatten() for g in r]) for r in rows]))
            )
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            source = self._step._source
            assert len(source._copy.reader.network.losses) <= len(module.losses) + 2

    noise = Literal(**EVERY)
    found = collected(tmp_path, noise, loader(batch_size=21), module, max_epochs=4)
    assert len(module.losses) == 4
    assert [e.trace for e in found] == pytest.approx([e.trace for e in expected], rel=1e-9)


# Averages


def test_averages_are_adam_s(tmp_path):
    y = noisy_targets(64)
    single = collected(tmp_path, GradientNoiseScale(**EVERY), in_order(y, 8))
    averaged = collected(tmp_path, GradientNoiseScale(every_n_steps=1, ema=0.8), in_order(y, 8))
    for step, estimate in enumerate(averaged):
        weights = [0.8 ** (step - i) for i in range(step + 1)]
        for name in ("trace", "squared_norm"):
            mean = sum(w * getattr(s, name) for w, s in zip(weights, single, strict=False)) / sum(weights)
            assert getattr(estimate, name) == pytest.approx(mean, rel=1e-10)
        ratio = estimate.trace / estimate.squared_norm
        assert estimate.noise_scale == pytest.approx(ratio, nan_ok=True) or estimate.squared_norm <= 0


def test_metric_alone():
    metric = GradientNoiseMetric(0.5, 2)
    assert metric.total() is None
    assert metric.parts() == []
    metric.update([GradientNoise.of(1.0, -1.0), GradientNoise.of(2.0, 3.0)])
    metric.update([GradientNoise.of(4.0, 2.0), GradientNoise.of(2.0, 3.0)])
    assert metric.total().trace == pytest.approx((1 + 2 * 4) / 3 + 2)
    assert metric.parts()[0].squared_norm == pytest.approx((-1 + 2 * 2) / 3)
    trace, squared_norm, ratio = metric.compute().tolist()
    assert ratio == pytest.approx(trace / squared_norm)
    again = GradientNoiseMetric(0.5, 2)
    again.load_state_dict(metric.state_dict())
    assert again.total() == metric.total()
    assert metric.sums.dtype == torch.float64


def test_a_checkpoint_in_memory_stays_what_it_is(tmp_path):
    """Several runs may go on from one."""
    first, data = GradientNoiseScale(**EVERY), loader(batch_size=8)

    def module():
        return Module(mlp(), lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))

    fit(tmp_path, module(), data, first, max_epochs=1)
    saved = first.state_dict()
    again, untrained = GradientNoiseScale(**EVERY), GradientNoiseScale(**EVERY)
    again.load_state_dict(saved)
    again._metric.update([GradientNoise.of(4.0, 2.0)])
    assert again.estimate != first.estimate
    untrained.load_state_dict(saved)
    assert untrained.estimate == first.estimate


# What is logged


def test_keys_per_step_and_per_epoch(tmp_path):
    recorder = Recorder()
    noise = GradientNoiseScale(every_n_steps=2, per_layer=True, log_key_prefix="x/")
    run = trainer(tmp_path, [noise], logger=recorder, log_every_n_steps=2)
    run.fit(Quadratic(), in_order(noisy_targets(48) - 3, 8))
    keys = {
        "x/gradient_noise_trace",
        "x/gradient_squared_norm",
        "x/gradient_noise_scale",
        "x/gradient_noise_scale/linear",
    }
    assert {key for key in run.callback_metrics if key.startswith("x/")} == keys
    steps = [step for step, _ in recorder.values("x/gradient_noise_scale")]
    assert steps == [1, 3, 5, 5]  # the last is the epoch's
    value = float(run.callback_metrics["x/gradient_noise_trace"])
    assert value == pytest.approx(noise.estimate.trace, rel=1e-6)


def test_checkpoint_and_early_stopping_can_monitor_it(tmp_path):
    key = "bayes/gradient_noise_scale"
    best = ModelCheckpoint(tmp_path, monitor=key, mode="max", filename="{epoch}")
    stop = EarlyStopping(monitor=key, mode="max", patience=1)
    run = trainer(
        tmp_path,
        [GradientNoiseScale(every_n_steps=1), best, stop],
        enable_checkpointing=True,
        max_epochs=3,
    )
    run.fit(Quadratic(), in_order(noisy_targets(48) - 3, 8))
    assert best.best_model_score.item() > 0


def test_not_resolved_is_nan_with_its_reason_once(tmp_path):
    noise = GradientNoiseScale(every_n_steps=1, ema=0.0)
    assert noise.status == "not measured yet"
    assert noise.estimate is None
    y = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) + OFFSET  # opposite gradients
    with pytest.warns(UserWarning, match="not resolved: the averaged squared norm") as record:
        run = trainer(tmp_path, [noise], max_epochs=3)
        run.fit(Quadratic(), in_order(y.expand(2, 4), 2))
    assert len([w for w in record if "not resolved" in str(w.message)]) == 1
    assert math.isnan(run.callback_metrics["bayes/gradient_noise_scale"])
    assert run.callback_metrics["bayes/gradient_squared_norm"] < 0
    assert "not resolved" in noise.status


# Which way


@pytest.mark.parametrize(
    ("step", "accumulate", "method"),
    [
        (readable_step, 1, "per_example"),
        (readable_step, 2, "per_example"),
        (step_by_hand, 1, "per_example"),
        (penalised_step, 1, "split_batch"),
        (penalised_step, 2, "micro_batches"),
    ],
)
def test_auto(tmp_path, step, accumulate, method, caplog):
    noise, told = GradientNoiseScale(**EVERY), GradientNoiseScale(method=method, **EVERY)
    with caplog.at_level("INFO"):
        found = collected(
            tmp_path,
            noise,
            in_order(noisy_targets(32), 8),
            Quadratic(step),
            accumulate_grad_batches=accumulate,
        )
    assert ("no example is on" in caplog.text) == (step is penalised_step)
    assert found == collected(
        tmp_path, told, in_order(noisy_targets(32), 8), Quadratic(step), accumulate_grad_batches=accumulate
    )


def test_batch_norm_without_running_statistics_has_no_examples(tmp_path, caplog):
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    module = Module(network, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    with caplog.at_level("INFO"):
        noise = GradientNoiseScale()
        fit(tmp_path, module, loader(batch_size=20, drop_last=True), noise)
    assert "mixes the examples" in caplog.text
    assert noise.estimate is not None


def test_a_batch_that_cannot_be_measured_is_skipped(tmp_path):
    def step(module, batch):
        if module.global_step == 2 and isinstance(batch[1], torch.Tensor):
            return penalised_step(module, batch)
        return readable_step(module, batch)

    noise = GradientNoiseScale(method="per_example", **EVERY)
    with pytest.warns(UserWarning, match="a batch could not be measured; training goes on"):
        found = collected(tmp_path, noise, in_order(noisy_targets(40), 8), Quadratic(step))
    assert found[2] == found[1]
    assert found[3] != found[2]


def test_nan_gradients_are_not_averaged_in(tmp_path):
    y = noisy_targets(40)
    y[9] = torch.nan
    noise = GradientNoiseScale(method="split_batch", **EVERY)
    found = collected(tmp_path, noise, in_order(y, 8))
    assert found[1] == found[0]
    assert all(math.isfinite(estimate.trace) for estimate in found)


def test_an_incomplete_batch_of_one_is_passed_over(tmp_path):
    found = collected(tmp_path, GradientNoiseScale(**EVERY), in_order(noisy_targets(9), 8))
    assert found[0] == found[1]


def test_a_loss_by_hand_has_the_noise_of_the_same_loss(tmp_path):
    by_hand, readable = (
        collected(tmp_path, GradientNoiseScale(**EVERY), in_order(noisy_targets(32), 8), Quadratic(step))
        for step in (step_by_hand, readable_step)
    )
    assert [its.trace for its in by_hand] == pytest.approx([its.trace for its in readable], rel=1e-9)


# What is refused


class Closures(Quadratic):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "arguments", "batch_size", "subject", "remedy"),
    [
        (Closures, {}, 8, "LBFGS", "Use another optimizer"),
        (Quadratic, {}, 1, "batches of 2 examples or more", ()),
        (Quadratic, {"method": "micro_batches"}, 8, "two micro-batches or more", ()),
        (lambda: Quadratic(penalised_step), {"method": "per_example"}, 8, "no example is on", ()),
    ],
)
def test_refused_before_the_first_step(tmp_path, module, arguments, batch_size, subject, remedy):
    run = trainer(tmp_path, [GradientNoiseScale(**arguments, on_error="raise")])
    with refuses(subject, remedy=remedy):
        run.fit(module(), in_order(noisy_targets(16), batch_size))
    assert run.global_step == 0


def test_a_batch_that_cannot_be_cut(tmp_path):
    data = [(torch.ones(8, 1).double(), noisy_targets(8), torch.zeros(3))]
    run = trainer(tmp_path, [GradientNoiseScale(method="split_batch", on_error="raise")])
    with refuses("cannot be cut into parts"):
        run.fit(Quadratic(lambda m, b: step_by_hand(m, b[:2])), DataLoader(data, batch_size=None))


def test_two_with_one_prefix(tmp_path):
    trainer(tmp_path, [GradientNoiseScale(), GradientNoiseScale(log_key_prefix="x/")])
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, [GradientNoiseScale(), GradientNoiseScale(ema=0.5)])
