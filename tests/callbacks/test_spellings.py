"""One loss in several spellings has one evidence, and slips that pair every example with every target have none."""

import itertools

import lightning
import pytest
import torch
from torch import distributions, nn
from torch.nn import functional as F

from lightning_bayes import Gaussian, LaplaceEvidence
from tests.refusals import fit_refuses
from tests.scenarios import Module, fit, loader

EXAMPLES, OUTPUTS = 20, 3
X = torch.randn(EXAMPLES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REALS = torch.stack([X[:, k].sin() for k in range(OUTPUTS)], 1)
CLASSES = (X[:, :OUTPUTS] > 0).long() + (X[:, 1:] > 1).long()

TERMS = {
    "normal": lambda f, y, c: -distributions.Normal(f[..., 0], 1.0).log_prob(y),
    "Poisson": lambda f, y, c: F.poisson_nll_loss(f[..., 0], y.abs().round(), reduction="none"),
    "squares": lambda f, y, c: (f[..., 0] - y).square(),
    "Huber": lambda f, y, c: F.huber_loss(f[..., 0], y, reduction="none"),
    "log-cosh": lambda f, y, c: (f[..., 0] - y).cosh().log(),
    "cross-entropy": lambda f, y, c: F.cross_entropy(f.movedim(2, 1), c, reduction="none"),
    "cross-entropy by hand": lambda f, y, c: -f.log_softmax(2).gather(2, c.unsqueeze(2)).squeeze(2),
}
SPELLINGS = {
    "mean of means": lambda t: t.mean(1).mean(),
    "mean of sums over T": lambda t: (t.sum(1) / OUTPUTS).mean(),
    "mean of weighted means": lambda t: ((t * torch.ones_like(t)).sum(1) / torch.ones_like(t).sum(1)).mean(),
    "sum over number": lambda t: t.sum() / t.numel(),
}


class Apart(nn.Module):
    """[N, outputs, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, OUTPUTS * OUTPUTS)

    def forward(self, x):
        return self.layer(x).unflatten(1, (OUTPUTS, OUTPUTS))


def evidence(tmp_path, step, network, *data):
    torch.manual_seed(0)
    callback = LaplaceEvidence()
    fit(tmp_path, Module(network(), step), loader(data=(X, *data)), callback)
    return callback.history[0][1]


@pytest.mark.parametrize(("terms", "spelling"), [*itertools.product(TERMS, SPELLINGS)])
def test_a_mean_is_a_mean_however_it_is_spelt(tmp_path, terms, spelling):
    def step(reduce):
        return lambda module, batch: reduce(TERMS[terms](module(batch[0]), *batch[1:]))

    plain = evidence(tmp_path, step(torch.mean), Apart, REALS, CLASSES)
    other = evidence(tmp_path, step(SPELLINGS[spelling]), Apart, REALS, CLASSES)
    assert other.log_evidence == pytest.approx(plain.log_evidence, rel=1e-9)
    assert other.prior_precision == pytest.approx(plain.prior_precision, rel=1e-9)


def test_terms_that_later_batches_weigh_are_weighed_in_all(tmp_path):
    """In the first batch no target is missing: its terms are alike, and by the mean of means they are not all."""
    masks = torch.ones(EXAMPLES, OUTPUTS, dtype=torch.float64)
    masks[-3:, 1:] = 0.0

    def step(module, batch):
        terms = -distributions.Normal(module(batch[0])[..., 0], 1.0).log_prob(batch[1]) * batch[2]
        return (terms.sum(1) / batch[2].sum(1)).mean()

    def weighed_first(module, batch):  # the same weights by other means, which no batch lacks
        weights = batch[2] / batch[2].sum(1, keepdim=True)
        densities = distributions.Normal(module(batch[0])[..., 0], 1.0)
        return -(densities.log_prob(batch[1]) * weights).sum(1).mean()

    order = torch.arange(EXAMPLES).flip(0)  # the masked ones in the first batch
    found = []
    for data, some in ((slice(None), step), (order, step), (order, weighed_first)):
        torch.manual_seed(0)
        callback = LaplaceEvidence(batch_size=8)
        fit(tmp_path, Module(Apart(), some), loader(data=(X[data], REALS[data], masks[data])), callback)
        found.append(callback.history[0][1])
    assert found[1].log_likelihood == pytest.approx(found[2].log_likelihood, rel=1e-9)
    # Training saw the examples in another order: near, and not at three times as many terms.
    assert found[0].log_likelihood == pytest.approx(found[1].log_likelihood, rel=0.1)


def weighted_by_frequency(module, batch):
    classes = batch[2][:, 0]
    weights = 1.0 / classes.bincount(minlength=3).clamp(min=1)[classes]
    return (weights * F.cross_entropy(module(batch[0])[:, 0], classes, reduction="none")).mean()


def standardised(module, batch):
    y = batch[1][:, 0]
    return (module(batch[0])[:, 0, 0] - (y - y.mean()) / y.std()).square().mean()


def hardest(module, batch):
    return F.cross_entropy(module(batch[0])[:, 0], batch[2][:, 0], reduction="none").topk(2).values.mean()


def middle(module, batch):
    return F.cross_entropy(module(batch[0])[:, 0], batch[2][:, 0], reduction="none").median()


@pytest.mark.situation("Losses and steps that have no evidence")
@pytest.mark.parametrize("step", [weighted_by_frequency, standardised, hardest, middle])
def test_what_an_example_counts_is_its_own(tmp_path, step):
    module = Module(Apart(), step)
    fit_refuses(tmp_path, module, "depends on the others of its batch", data=loader(data=(X, REALS, CLASSES)))


def test_a_sum_over_a_number_is_a_mean_in_some_batches_only(tmp_path):
    """Eight examples a step, and all in one batch of the evaluation but for eight."""

    def summed(module, batch):
        return F.cross_entropy(module(batch[0])[:, 0], batch[1], reduction="sum") / 8

    def plain(module, batch):
        return F.cross_entropy(module(batch[0])[:, 0], batch[1])

    x, y = torch.cat([X, X]), torch.cat([CLASSES, CLASSES])[:, 0]
    found = []
    for step in (plain, summed):
        torch.manual_seed(0)
        callback = LaplaceEvidence(batch_size=32)
        fit(tmp_path, Module(Apart(), step), loader(data=(x, y)), callback)
        found.append(callback.history[0][1])
    assert found[1].log_evidence == pytest.approx(found[0].log_evidence, rel=1e-9)
    assert found[1].prior_precision == pytest.approx(found[0].prior_precision, rel=1e-9)


def test_a_value_that_depends_on_the_parameters_has_more_curvature_to_it(tmp_path):
    """−ln N(y + μ/2; μ) is −ln N(y; μ/2), of which a quarter of the information is left."""

    def given(module, batch):
        location = module(batch[0])[:, 0]
        return -distributions.Normal(location, 1.0).log_prob(batch[1][:, 0] + 0.5 * location).mean()

    def half(module, batch):
        return -distributions.Normal(0.5 * module(batch[0])[:, 0], 1.0).log_prob(batch[1][:, 0]).mean()

    pair = [evidence(tmp_path, step, lambda: nn.Linear(4, 1), REALS) for step in (given, half)]
    assert pair[0].log_occam_factor == pytest.approx(pair[1].log_occam_factor, rel=1e-9)


def test_targets_that_training_moves_are_outputs_too(tmp_path):
    """exp(−|f₁ − f₂|²) of two heads has the curvature of their difference, not of the first alone."""

    def moved(module, batch):
        heads = module(batch[0])
        return F.mse_loss(heads[:, 0], heads[:, 1] + batch[1][:, 0])

    def difference(module, batch):
        heads = module(batch[0])
        return F.mse_loss(heads[:, 0] - heads[:, 1], batch[1][:, 0])

    found = []
    for step, likelihood in ((moved, "auto"), (difference, Gaussian(sigma=0.5**0.5))):
        torch.manual_seed(0)
        callback = LaplaceEvidence(likelihood=likelihood)
        fit(tmp_path, Module(nn.Linear(4, 2), step), loader(data=(X, REALS)), callback)
        found.append(callback.history[0][1])
    assert "generalised" in found[0].note
    assert found[0].prior_precision == pytest.approx(found[1].prior_precision, rel=1e-9)
    assert found[0].log_occam_factor == pytest.approx(found[1].log_occam_factor, rel=1e-9)


WIDER = {
    "outputs of one column": lambda m, b: (
        -distributions.Normal(m(b[0])[:, :1], 1.0).log_prob(b[1][:, 0]).mean()
    ),
    "targets of one column": lambda m, b: (
        -distributions.Normal(m(b[0])[:, 0], 1.0).log_prob(b[1][:, :1]).mean()
    ),
}


@pytest.mark.situation("Losses and steps that have no evidence")
@pytest.mark.parametrize("name", WIDER)
def test_every_example_at_every_target_is_no_sum_over_examples(tmp_path, name):
    data = loader(data=(X, REALS))
    fit_refuses(tmp_path, Module(nn.Linear(4, 1), WIDER[name]), "No evidence can be made", data=data)


class Named(distributions.StudentT):
    """Somebody's own, with the same density."""


@pytest.mark.parametrize("cut", ["slices", "chunk", "split", "unbind"])
@pytest.mark.parametrize("kind", [distributions.StudentT, Named])
def test_parameters_of_a_density_from_one_layer(tmp_path, cut, kind):
    cuts = {
        "slices": lambda f: (f[:, 0], f[:, 1]),
        "chunk": lambda f: [part.squeeze(1) for part in f.chunk(2, 1)],
        "split": lambda f: [part.squeeze(1) for part in f.split(1, 1)],
        "unbind": lambda f: f.unbind(1),
    }

    def step(module, batch):
        location, raw = cuts[cut](module(batch[0]))
        return -kind(4.0, location, F.softplus(raw) + 0.1).log_prob(batch[1][:, 0]).mean()

    def sliced(module, batch):
        location, raw = cuts["slices"](module(batch[0]))
        return -distributions.StudentT(4.0, location, F.softplus(raw) + 0.1).log_prob(batch[1][:, 0]).mean()

    def network():
        return nn.Linear(4, 2)

    expected = evidence(tmp_path, sliced, network, REALS)
    assert evidence(tmp_path, step, network, REALS).log_evidence == pytest.approx(
        expected.log_evidence, rel=1e-9
    )


def test_a_datamodule_of_the_older_package(tmp_path):
    """Its class has the same name, and is another."""

    class LightningDataModule(lightning.LightningDataModule):
        pass

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(data=(X, CLASSES[:, 0]))

    callback = LaplaceEvidence()
    step = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    fit(tmp_path, Module(nn.Linear(4, 3), step), Data(), callback)
    assert len(callback.history) == 1
