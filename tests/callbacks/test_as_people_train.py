"""Ways of writing and training a module that are refused nowhere: each must give the value of the plain one."""

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import (
    GradientNoiseScale,
    LaplaceEvidence,
    NegativeLogLikelihood,
    ScalingAdvisor,
    SGDNoiseScale,
    Stability,
    laplace_evidence,
)
from lightning_bayes.callbacks.measuring import MeasuringCallback
from tests.scenarios import Module, cross_entropy, fit, loader, mlp, optimizer, tensors, trainer

SLOW = optimizer(lr=1e-3, weight_decay=0.05)


def value(tmp_path, module, data, callback=None, **kwargs):
    callback = callback or LaplaceEvidence()
    fit(tmp_path, module, data, callback, **kwargs)
    return callback.history[-1][1].log_evidence


def on_logits(module, batch):
    return F.binary_cross_entropy_with_logits(module.network(batch[0]).reshape(batch[1].shape), batch[1])


def squeezed(module, batch):
    return F.binary_cross_entropy(module.network(batch[0]).squeeze(1).clone()[:, None], batch[1])


def kept_apart(module, batch):
    return F.binary_cross_entropy(module.network(batch[0]).contiguous().unsqueeze(-1).flatten(1), batch[1])


def by_module(module, batch):
    return nn.BCELoss(reduction="sum")(module.network(batch[0]), batch[1]) / len(batch[0])


def clamped(module, batch):
    return F.binary_cross_entropy(module.network(batch[0]).clamp(1e-7, 1 - 1e-7), batch[1])


@pytest.mark.situation("Networks that end in a sigmoid")
@pytest.mark.parametrize("step", [squeezed, kept_apart, by_module, clamped])
def test_networks_that_end_in_a_sigmoid(tmp_path, step):
    body = mlp(1)
    plain = Module(copy.deepcopy(body), on_logits, SLOW)
    right = value(tmp_path, plain, loader("binary"))
    ends = Module(nn.Sequential(body, nn.Sigmoid()), step, SLOW)
    assert value(tmp_path, ends, loader("binary")) == pytest.approx(right, rel=1e-9)


def test_something_else_made_of_a_sigmoid_is_no_sigmoid(tmp_path):
    """The outputs are then the probabilities that the loss sees."""

    class Raised(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x) * 0.9 + 0.05

    module = Module(
        Raised(nn.Sequential(mlp(1), nn.Sigmoid())), lambda m, b: F.binary_cross_entropy(m(b[0]), b[1])
    )
    callback = LaplaceEvidence(prior_precision=1.0)
    fit(tmp_path, module, loader("binary"), callback)
    own = NegativeLogLikelihood(lambda p, y: -(y * p.log() + (1 - y) * (1 - p).log()).sum())
    expected = laplace_evidence(module.network.eval(), tensors("binary"), likelihood=own, prior_precision=1.0)
    assert callback.history[0][1].log_evidence == pytest.approx(expected.log_evidence, rel=1e-9)


def of_a_dict(module, batch):
    return cross_entropy(module, batch["digits"])


def of_a_list(module, batch):
    return cross_entropy(module, batch[0])


def of_a_nest(module, batch):
    return cross_entropy(module, batch["train"][0])


NESTS = {
    "dict": (lambda data: {"digits": data}, of_a_dict),
    "list": (lambda data: [data], of_a_list),
    "nest": (lambda data: {"train": [data]}, of_a_nest),
}


@pytest.mark.filterwarnings("ignore:GradientNoiseScale. B_simple is not resolved")  # of a few steps
@pytest.mark.situation("One loader in a collection")
@pytest.mark.parametrize("name", NESTS)
def test_one_loader_in_a_collection(tmp_path, name):
    pack, step = NESTS[name]
    network = mlp()
    stability = Stability(max_examples=16), Stability(max_examples=16)
    evidence = LaplaceEvidence(), LaplaceEvidence()
    plain, packed = (Module(copy.deepcopy(network), each) for each in (cross_entropy, step))
    fit(tmp_path, plain, loader(), evidence[0], stability[0])
    run = fit(
        tmp_path, packed, pack(loader()), evidence[1], stability[1], GradientNoiseScale(), SGDNoiseScale()
    )
    left, right = (callback.history[-1][1] for callback in evidence)
    assert right.log_evidence == pytest.approx(left.log_evidence, rel=1e-12) and right.num_examples == 21
    readings = [callback.history[-1][1].largest_eigenvalue for callback in stability]
    assert readings[1] == pytest.approx(readings[0], rel=1e-9)
    assert all(
        math.isfinite(run.callback_metrics[f"bayes/{key}"]) for key in ("noise_scale", "gradient_noise_trace")
    )


@pytest.mark.filterwarnings("ignore:GradientNoiseScale. B_simple is not resolved")  # of a few steps
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(5)])
def test_weight_averaging_is_said_and_its_extra_pass_is_no_epoch(tmp_path, norm):
    network = nn.Sequential(nn.Linear(4, 5), norm(), nn.Tanh(), nn.Linear(5, 3))
    noise, gradients, evidence = SGDNoiseScale(), GradientNoiseScale(every_n_steps=1), LaplaceEvidence()
    data = DataLoader(TensorDataset(*tensors(size=24)), 8)
    with pytest.warns(UserWarning, match="LaplaceEvidence: StochasticWeightAveraging averages weights"):
        run = fit(
            tmp_path,
            Module(network, cross_entropy),
            data,
            StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1, annealing_epochs=1),
            noise,
            gradients,
            evidence,
            max_epochs=3,
        )
    assert run.callback_metrics["bayes/noise_scale"].item() == pytest.approx(0.1 * (24 / 8 - 1), rel=1e-6)
    assert math.isfinite(gradients.estimate.trace)


def test_a_compiled_training_step(tmp_path):
    network = mlp()
    right = value(tmp_path, Module(copy.deepcopy(network), cross_entropy), loader())
    module = Module(network, cross_entropy)
    module.training_step = torch.compile(module.training_step, backend="eager")
    assert value(tmp_path, module, loader()) == pytest.approx(right, rel=1e-9)


@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule")  # of so few steps
def test_under_the_profiler_of_torch(tmp_path):
    network = mlp()
    right = value(tmp_path, Module(copy.deepcopy(network), cross_entropy), loader())
    assert value(tmp_path, Module(network, cross_entropy), loader(), profiler="pytorch") == pytest.approx(
        right, rel=1e-9
    )


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_keys_to_compare_runs_by(tmp_path, decay):
    """`log_evidence` is at the run's own prior; the best prior's is at least that, and equal where it was fitted."""
    module = Module(mlp(), cross_entropy, optimizer(weight_decay=decay))
    run = fit(tmp_path, module, loader(), LaplaceEvidence())
    own, best, optimized = (
        run.callback_metrics[f"bayes/{key}"].item()
        for key in ("log_evidence", "log_evidence_best_prior", "prior_optimized")
    )
    assert optimized == (decay == 0.0)
    assert best == pytest.approx(own, rel=1e-5) if optimized else best > own


class _MultiProcessingLauncher:
    """By its name that of Lightning, which spawn, fork and notebooks use."""


HOLDERS = [LaplaceEvidence(), Stability(), GradientNoiseScale(), ScalingAdvisor(target_batch_size=16)]


@pytest.mark.parametrize("callback", HOLDERS, ids=lambda callback: type(callback).__name__)
@pytest.mark.parametrize("spawns", [True, False])
def test_where_results_are_when_the_processes_have_ended(tmp_path, caplog, callback, spawns):
    run = trainer(tmp_path, [callback])
    if spawns:
        run.strategy._launcher = _MultiProcessingLauncher()
    with caplog.at_level("INFO"):
        callback.on_fit_start(run, Module(mlp(), cross_entropy))
    lines = [line for line in caplog.messages if "in processes that end with fit" in line]
    assert len(lines) == spawns
    assert all(f"`{callback.HELD}`" in line and hasattr(callback, callback.HELD) for line in lines)


def test_measuring_callbacks_share_one_guard():
    for kind in (LaplaceEvidence, SGDNoiseScale, GradientNoiseScale, Stability):
        assert issubclass(kind, MeasuringCallback) and kind.LOGGED
