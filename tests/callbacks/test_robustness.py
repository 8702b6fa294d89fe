"""Ways to train that once gave a wrong number, a disturbed run or an error too late."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bayes import LaplaceEvidence, laplace_evidence
from lightning_bayes.structures import registry
from lightning_bayes.structures.base import Budget
from tests.cases import evidence_within, use_budget
from tests.refusals import refuses
from tests.scenarios import Module, fit, loader, mlp, optimizer, tensors


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def decays_its_own_learning_rate(module, batch):
    for group in module.optimizers().param_groups:
        group["lr"] *= 0.9
    return cross_entropy(module, batch)


def steps_its_own_scheduler(module, batch):
    module.lr_schedulers().step()
    return cross_entropy(module, batch)


def counts_in_the_metrics(module, batch):
    metrics = module.trainer.callback_metrics
    metrics["count"] = metrics.get("count", torch.zeros(())) + 1
    return cross_entropy(module, batch) * (1 + 0 * metrics["count"])


def counts_in_the_datamodule(module, batch):
    module.trainer.datamodule.seen += len(batch[0])
    return cross_entropy(module, batch)


class Counting(Dataset):
    """Its examples depend on how often it has been read."""

    def __init__(self):
        self.x, self.y = tensors()
        self.reads = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads += 1
        return self.x[index] * (1 + 1e-3 * self.reads), self.y[index]


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.seen, self.data = 0, Counting()

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8)


def scheduled(module):
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.02)
    return [sgd], [torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)]


STEPS = [
    decays_its_own_learning_rate,
    steps_its_own_scheduler,
    counts_in_the_metrics,
    counts_in_the_datamodule,
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the user's, not ours
def test_what_a_step_does_to_its_surroundings_is_taken_back(tmp_path, step):
    def left_behind(callbacks):
        torch.manual_seed(0)
        module, data = Module(mlp(), step, scheduled), Data()
        run = fit(tmp_path, module, data, *callbacks, max_epochs=2)
        weights = torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()
        rates = [group["lr"] for group in run.optimizers[0].param_groups]
        count = run.callback_metrics.get("count", torch.zeros(())).item()
        return weights, rates, data.seen, data.data.reads, count

    assert left_behind([LaplaceEvidence()]) == left_behind([])


def test_parameters_in_no_optimizer_are_held_fixed(tmp_path):
    class Teacher(Module):
        def __init__(self):
            super().__init__(
                mlp(), cross_entropy, lambda module: torch.optim.SGD(module.network.parameters(), lr=0.1)
            )
            self.teacher = mlp().double()

    callback = LaplaceEvidence(prior_precision=1.0)
    module = Teacher()
    fit(tmp_path, module, loader(), callback)
    evidence = callback.history[0][1]
    assert evidence.num_parameters == sum(p.numel() for p in module.network.parameters())
    assert all(name.startswith("teacher.") for name in evidence.fixed_parameters)


def test_history_is_that_of_one_run(tmp_path):
    callback = LaplaceEvidence()
    for folder in ("a", "b"):
        fit(tmp_path / folder, Module(mlp(), cross_entropy), loader(), callback, max_epochs=2)
    assert [epoch for epoch, _ in callback.history] == [0, 1]


def test_unfreezing_makes_the_choice_of_a_structure_again(tmp_path, monkeypatch):
    def unfreezing(module, batch):
        if module.current_epoch == 1:
            module.network[0].requires_grad_(True)
        return cross_entropy(module, batch)

    module = Module(mlp(), unfreezing, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.02))
    module.network[0].requires_grad_(False)
    monkeypatch.setattr(registry, "rate", lambda dtype, device: 1.0)
    use_budget(monkeypatch, Budget(seconds=5e4))  # of the second layer alone
    callback = LaplaceEvidence()
    fit(tmp_path, module, loader(), callback, max_epochs=2)
    assert [evidence.structure for _, evidence in callback.history] == ["full", "kron"]


def test_a_failed_epoch_leaves_no_old_value_beside_the_nan(tmp_path):
    class Spoilt(Module):
        def on_train_epoch_end(self):
            with torch.no_grad():
                self.network[0].weight.fill_(float("nan"))

    with pytest.warns(UserWarning, match="no evidence for epoch 1"):
        run = fit(tmp_path, Spoilt(mlp(), cross_entropy), loader(), LaplaceEvidence(), max_epochs=2)
    logged = {key: value for key, value in run.callback_metrics.items() if key.startswith("bayes/")}
    assert {"bayes/log_evidence", "bayes/log_evidence_ratio", "bayes/prior_precision"} <= logged.keys()
    assert all(value.isnan() for value in logged.values())


class ByLength(torch.utils.data.Sampler):
    """Batches of sequences of one length."""

    def __init__(self, lengths):
        self.batches = [
            [i for i, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))
        ]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_batches_that_fit_together_stay_together(tmp_path):
    lengths = [2, 3, 2, 5, 3, 2, 5, 5, 3]
    data = [(torch.randn(n, 4, dtype=torch.float64), torch.tensor(n % 3)) for n in lengths]

    def pooled(module, batch):
        return F.cross_entropy(module(batch[0].mean(1)), batch[1])

    callback = LaplaceEvidence()
    fit(tmp_path, Module(mlp(), pooled), DataLoader(data, batch_sampler=ByLength(lengths)), callback)
    assert callback.history[0][1].num_examples == len(lengths)


class Scaled(DataLoader):
    def __iter__(self):
        return ((100 * x, y) for x, y in super().__iter__())


def test_a_loader_that_changes_its_batches_is_refused(tmp_path):
    module = Module(mlp(), cross_entropy)
    with refuses("Scaled iterates in its own way", remedy="collate_fn"):
        fit(
            tmp_path,
            module,
            Scaled(TensorDataset(*tensors()), batch_size=8),
            LaplaceEvidence(on_error="raise"),
        )


def test_broadcast_targets_are_named(tmp_path):
    def step(module, batch):
        return F.mse_loss(module(batch[0]), batch[1].double())

    module = Module(mlp(1), step)
    data = loader(data=(tensors()[0], tensors()[1]))
    with (
        pytest.warns(UserWarning, match="Using a target size"),
        refuses("outputs [8, 1] and targets [8]", remedy="broadcasts"),
    ):
        fit(tmp_path, module, data, LaplaceEvidence(on_error="raise"))


class Lion(torch.optim.SGD):
    """By its name one of those that other packages bring."""


OF_OTHERS = [Lion, *(getattr(torch.optim, name) for name in ("Adafactor",) if hasattr(torch.optim, name))]


@pytest.mark.parametrize("kind", OF_OTHERS)
def test_decoupled_decay_of_other_optimizers_is_said(tmp_path, kind):
    def configure(module):
        return kind(module.parameters(), lr=0.01, weight_decay=0.1)

    with pytest.warns(UserWarning, match="decoupled weight decay"):
        fit(tmp_path, Module(mlp(), cross_entropy, configure), loader(), LaplaceEvidence())


def test_datasets_that_a_module_keeps_are_not_copied(tmp_path):
    class Heavy(TensorDataset):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    module = Module(mlp(), cross_entropy, optimizer())
    module.data = Heavy(*tensors())
    callback = LaplaceEvidence()
    fit(tmp_path, module, DataLoader(module.data, batch_size=8), callback)
    assert len(callback.history) == 1


def test_small_priors_in_float32_give_the_decrement_of_float64():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10))
    data = torch.randn(100, 60), torch.arange(100) % 10
    fast = evidence_within(Budget(small=10), net, data, structure="full", prior_precision=1e-2)
    exact = laplace_evidence(
        net.double(), (data[0].double(), data[1]), structure="full", prior_precision=1e-2
    )
    assert fast.newton_decrement == pytest.approx(exact.newton_decrement, rel=1e-4)
