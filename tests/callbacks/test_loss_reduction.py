"""The noise scale and advice of losses that training_step sums over its examples, and of those that it does not."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import ScalingAdvisor, SGDNoiseScale, Stability
from lightning_bayes.callbacks.trainer.loss_reduction import reduction_of
from tests.scenarios import trainer

N, BATCH = 60, 8  # an incomplete batch of 4 at the end of an epoch

SUMS = {
    "mse": lambda o, y: F.mse_loss(o, y, reduction="sum"),
    "bce": lambda o, y: F.binary_cross_entropy_with_logits(o, (y > 0).to(o), reduction="sum"),
    "cross entropy": lambda o, y: F.cross_entropy(o, (y[:, 0] > 0).long(), reduction="sum"),
    "half of it": lambda o, y: 0.5 * F.mse_loss(o, y, reduction="sum"),
    "by hand": lambda o, y: (o - y).square().sum(),
    "module": nn.MSELoss(reduction="sum"),
}
MEANS = {
    "mse": F.mse_loss,
    "bce": lambda o, y: F.binary_cross_entropy_with_logits(o, (y > 0).to(o)),
    "by hand": lambda o, y: (o - y).square().mean(),
    # A sum over the outputs of an example is none over examples.
    "over outputs": lambda o, y: F.mse_loss(o, y, reduction="none").sum(1).mean(),
    "divided by the batch": lambda o, y: F.mse_loss(o, y, reduction="sum") / len(o),
    "beside a penalty": lambda o, y: F.mse_loss(o, y) + o.square().mean(),
    "no example counts alone": lambda o, y: torch.cdist(o, y).logsumexp((0, 1)),
}


class Net(L.LightningModule):
    def __init__(self, loss, optimizers=None):
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 2)), loss
        self.optimizers_of = optimizers or (lambda module: torch.optim.SGD(module.parameters(), lr=1e-3))
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizers_of(self)


def loader(size=N):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(size, 4, generator=generator), torch.randn(size, 2, generator=generator))
    return DataLoader(data, batch_size=BATCH, shuffle=True)


def fit(tmp_path, module, callbacks, *, size=N, **kwargs):
    run = trainer(tmp_path, callbacks, **kwargs)
    run.fit(module, loader(size))
    return run


@pytest.mark.parametrize("name", SUMS)
def test_sums(tmp_path, name):
    advisor = ScalingAdvisor(target_batch_size=12)
    run = fit(tmp_path, Net(SUMS[name]), [SGDNoiseScale(), advisor])
    # The loss of 8 examples is 8 times their mean.
    g = 8e-3 * (N / 8 - 1)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(g)
    (advice,) = advisor.advice
    assert (advice.present.reduction, advice.present.learning_rate) == ("sum", 1e-3)
    assert advice.exact.learning_rate == pytest.approx(g / (N / 12 - 1) / 12)


@pytest.mark.parametrize("name", MEANS)
def test_what_is_no_sum_over_examples_is_a_mean(tmp_path, name):
    advisor = ScalingAdvisor(target_batch_size=12)
    run = fit(tmp_path, Net(MEANS[name]), [SGDNoiseScale(), advisor])
    g = 1e-3 * (N / 8 - 1)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(g)
    assert advisor.advice[0].exact.learning_rate == pytest.approx(g / (N / 12 - 1))


def test_accumulation_averages_the_sums(tmp_path):
    """Lightning divides the loss of each of k batches by k: B = 16 examples, of which a step counts 8."""
    advisor = ScalingAdvisor(target_batch_size=24)
    run = fit(tmp_path, Net(SUMS["mse"]), [SGDNoiseScale(), advisor], accumulate_grad_batches=2, max_epochs=2)
    g = 8e-3 * (N / 16 - 1)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(g)
    # 24 examples in two batches of 12.
    assert advisor.advice[0].exact.learning_rate == pytest.approx(g / (N / 24 - 1) / 12)


def test_each_parameter_group(tmp_path):
    def groups(module):
        parts = [
            {"params": module.net[0].parameters(), "lr": 2e-3},
            {"params": module.net[2].parameters(), "momentum": 0.75},
        ]
        return torch.optim.SGD(parts, lr=1e-3)

    run = fit(tmp_path, Net(SUMS["bce"], groups), [SGDNoiseScale()])
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    unit = 8 * (N / 8 - 1)
    assert found == {  # logged in float32
        "bayes/noise_scale-SGD/pg1": pytest.approx(2e-3 * unit),
        "bayes/noise_scale-SGD/pg2": pytest.approx(1e-3 * unit / 0.25),
    }


def test_adam_has_the_noise_of_its_learning_rate(tmp_path):
    advisor = ScalingAdvisor(target_batch_size=12)
    adam = Net(SUMS["mse"], lambda module: torch.optim.Adam(module.parameters(), lr=1e-3))
    run = fit(tmp_path, adam, [SGDNoiseScale(), advisor])
    assert float(run.callback_metrics["bayes/adam_noise_scale"]) == pytest.approx(1e-3 / 8**0.5)
    # eps is beside a gradient that is b times as large: eps sqrt(kappa) in place of eps / sqrt(kappa).
    assert advisor.advice[0].advised.eps == pytest.approx(1e-8 * 1.5**0.5)


def test_stability_is_that_of_the_loss_that_is_stepped_on(tmp_path):
    """h of the summed loss beside the learning rate of the sum, as of the mean beside that of the mean."""
    found = []
    for loss, rate in ((SUMS["mse"], 1e-3), (lambda o, y: F.mse_loss(o, y) * 2, 8e-3)):

        def sgd(module, rate=rate):
            return torch.optim.SGD(module.parameters(), lr=rate)

        advisor = ScalingAdvisor(target_batch_size=6)
        L.seed_everything(0, verbose=False)
        fit(
            tmp_path, Net(loss, sgd), [Stability(), advisor], size=64
        )  # whole batches: the steps are the same
        checks = {check.name: check for check in advisor.advice[0].checks}
        found.append((checks["stability"].value / checks["stability"].limit, checks["variance"].value))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_run_that_is_known_to_work_is_compared_in_one_unit(tmp_path):
    good = {"learning_rate": 8e-3, "batch_size": 8, "dataset_size": N}
    first = ScalingAdvisor(target_batch_size=12)
    run = fit(tmp_path, Net(SUMS["mse"]), [first])
    run.save_checkpoint(tmp_path / "sum.ckpt")
    for reference in (tmp_path / "sum.ckpt", good | {"reduction": "mean"}, {**good, "learning_rate": 1e-3}):
        advisor = ScalingAdvisor(reference=reference)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="ScalingAdvisor: The noise scale")
            fit(tmp_path, Net(SUMS["mse"]), [advisor])
        assert not advisor.comparisons[0].differs
    advisor = ScalingAdvisor(
        reference={"learning_rate": 1e-3, "batch_size": 8, "dataset_size": N, "reduction": "mean"}
    )
    with pytest.warns(UserWarning, match=r"0\.125 in the reference|learning rate 0\.000125"):
        fit(tmp_path, Net(SUMS["mse"]), [advisor])


def weights(tmp_path, callbacks, **kwargs):
    L.seed_everything(3, verbose=False)
    module = Net(SUMS["by hand"], lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9))
    fit(tmp_path, module, callbacks, max_epochs=2, **kwargs)
    return [*module.state_dict().values(), torch.get_rng_state(), torch.tensor(module.steps)]


def test_training_is_not_perturbed(tmp_path):
    callbacks = [SGDNoiseScale(), ScalingAdvisor(target_batch_size=12)]
    plain, watched = weights(tmp_path, []), weights(tmp_path, callbacks)
    assert all(map(torch.equal, plain, watched))


def test_a_step_that_cannot_be_run_on_a_copy_is_taken_for_a_mean(tmp_path):
    class Strict(Net):
        def training_step(self, batch, batch_idx):
            if not self.training:
                raise RuntimeError("in training only")
            return super().training_step(batch, batch_idx)

    run = fit(tmp_path, Strict(SUMS["mse"]), [SGDNoiseScale()])
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(1e-3 * (N / 8 - 1))


def test_each_fit_has_its_own_loss(tmp_path):
    run = trainer(tmp_path, [SGDNoiseScale()])
    for loss, expected in ((SUMS["mse"], "sum"), (MEANS["mse"], "mean"), (SUMS["bce"], "sum")):
        run.fit_loop.epoch_progress.reset()
        run.fit(Net(loss), loader())
        assert reduction_of(run) == expected


class Normed(Net):
    def __init__(self, loss):
        super().__init__(loss, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_pass_for_the_statistics_of_batch_norm_is_no_epoch(tmp_path, accumulate):
    advisor = ScalingAdvisor(target_batch_size=24)
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    run = fit(
        tmp_path,
        Normed(MEANS["mse"]),
        [averaging, SGDNoiseScale(logging_interval="step"), advisor],
        max_epochs=3,
        accumulate_grad_batches=accumulate,
    )
    batch = 8 * accumulate
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(1.0 * (N / batch - 1))
    assert advisor.advice[0].present.batch_size == batch
    assert not any("changed during the run" in note for note in advisor.advice[0].notes)


def test_a_step_without_gradients_is_none(tmp_path):
    """The first training_steps return None: Lightning announces the steps all the same."""

    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.trainer.current_epoch == 1 else loss

    class Slow(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.optimizers[0].param_groups[0]["lr"] = (1e-3, 5e-3)[trainer.current_epoch]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `None`")
        run = fit(tmp_path, Skipping(MEANS["mse"]), [Slow(), SGDNoiseScale()], max_epochs=2)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(1e-3 * (N / 8 - 1))
