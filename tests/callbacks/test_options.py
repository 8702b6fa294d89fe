"""Every option of the callback does what it does in laplace_evidence(), and the best prior is logged."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_bayes import Evidence, Gaussian, LaplaceEvidence, laplace_evidence
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.structures.base import Budget
from tests.cases import use_budget
from tests.refusals import fit_refuses
from tests.scenarios import (
    DECAY,
    Module,
    N,
    Rich,
    cross_entropy,
    disagreements,
    fit,
    loader,
    mean_squared_error,
    mlp,
    optimizer,
    reference,
    tensors,
)


def no_decay(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def test_without_weight_decay_the_prior_is_the_best_one(tmp_path, caplog):
    callback, module = LaplaceEvidence(), Module(mlp(), cross_entropy, no_decay)
    with caplog.at_level(logging.INFO):
        run = fit(tmp_path, module, loader(), callback, max_epochs=2)
    assert caplog.text.count("all weight decay is 0, so prior_precision='auto' is 'optimize'") == 1
    evidence = callback.history[1][1]
    assert evidence.prior_optimized and evidence.fixed_parameters == ()
    expected = reference(module.network, tensors(), precision=evidence.prior_precision)
    assert disagreements(evidence, expected) == {}
    squared_norm = sum(p.detach().square().sum().item() for p in module.parameters())
    assert evidence.prior_precision * squared_norm == pytest.approx(expected.effective_parameters, rel=1e-8)
    assert run.callback_metrics["bayes/prior_precision"] == pytest.approx(evidence.prior_precision, rel=1e-6)


def test_decay_of_zero_beside_others_is_still_no_prior(tmp_path):
    def some_decay(module):
        weights, biases = [module.network[0].weight, module.network[2].weight], [module.network[0].bias]
        groups = [{"params": weights, "weight_decay": DECAY}, {"params": biases}]
        return torch.optim.SGD(groups, lr=0.1)

    callback, module = LaplaceEvidence(), Module(mlp(), cross_entropy, some_decay)
    fit(tmp_path, module, loader(), callback)
    evidence = callback.history[0][1]
    assert not evidence.prior_optimized
    assert evidence.prior_precision == pytest.approx(N * DECAY)
    assert evidence.fixed_parameters == ("network.0.bias", "network.2.bias")


GROUPS = {
    "optimize": [["0.weight", "0.bias", "2.weight", "2.bias"]],
    "optimize_per_layer": [["0.weight", "0.bias"], ["2.weight", "2.bias"]],
    "optimize_per_parameter": [["0.weight"], ["0.bias"], ["2.weight"], ["2.bias"]],
    "optimize_per_group": [["0.weight", "2.weight"], ["0.bias", "2.bias"]],
}


@pytest.mark.parametrize("argument", GROUPS)
def test_best_priors(tmp_path, argument):
    """Whatever the decay, each λ satisfies λ‖ω‖² = γ of its group, by differences of the reference."""

    def two_groups(module):
        parts = {
            end: [p for n, p in module.named_parameters() if n.endswith(end)] for end in ("weight", "bias")
        }
        return torch.optim.SGD(
            [{"params": parts["weight"], "weight_decay": DECAY}, {"params": parts["bias"]}], lr=0.1
        )

    callback, module = LaplaceEvidence(prior_precision=argument), Module(mlp(), cross_entropy, two_groups)
    run = fit(tmp_path, module, loader(), callback)
    evidence, groups = callback.history[0][1], GROUPS[argument]
    found = evidence.prior_precision
    named = {f"{n}": found[f"network.{n}"] if isinstance(found, dict) else found for g in groups for n in g}
    assert all(len({named[name] for name in group}) == 1 for group in groups)
    best = reference(module.network, tensors(), precision=named)
    assert disagreements(evidence, best) == {}
    for group in groups:
        for factor in (0.9, 1.1):
            moved = named | {name: named[name] * factor for name in group}
            assert reference(module.network, tensors(), precision=moved).log_evidence < best.log_evidence
    keys = [key for key in run.callback_metrics if key.startswith("bayes/prior_precision")]
    assert len(keys) == len(groups)


@pytest.mark.parametrize("subset", ["last_layer", ["network.2.*"]], ids=str)
@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_subsets(tmp_path, caplog, subset, decay):
    callback = LaplaceEvidence(subset_of_weights=subset)
    module = Module(mlp(), cross_entropy, optimizer(weight_decay=decay))
    with caplog.at_level(logging.INFO):
        fit(tmp_path, module, loader(), callback, max_epochs=2)
    evidence = callback.history[1][1]
    assert evidence.fixed_parameters == ("network.0.weight", "network.0.bias")
    named = dict.fromkeys(("2.weight", "2.bias"), evidence.prior_precision)
    assert disagreements(evidence, reference(module.network, tensors(), precision=named)) == {}
    assert evidence.prior_optimized is (decay == 0.0)
    if decay:
        assert evidence.prior_precision == pytest.approx(N * decay)
    if subset == "last_layer":
        assert "the last layer is ['network.2.weight', 'network.2.bias']" in caplog.text
    assert "'network.0.bias'] are left out: frozen, or in no optimizer, or outside subset" in caplog.text


def test_hessian(tmp_path):
    callback, module = LaplaceEvidence(curvature="hessian"), Module(nn.Linear(4, 3), cross_entropy)
    fit(tmp_path, module, loader(), callback)
    evidence = callback.history[0][1]
    assert (evidence.structure, evidence.curvature, evidence.num_negative_eigenvalues) == (
        "full",
        "hessian",
        0,
    )
    assert disagreements(evidence, reference(module.network, tensors())) == {}  # linear: it is the GGN


def test_a_saddle_is_no_end_of_training(tmp_path):
    module = Module(mlp(), cross_entropy, optimizer(weight_decay=1e-4))
    callback = LaplaceEvidence(curvature="hessian")
    with pytest.warns(
        UserWarning, match=r"no evidence for epoch 0.*eigenvalues at or below 0.*hessian_positive"
    ):
        run = fit(tmp_path, module, loader(), callback)
    assert run.current_epoch == 1 and callback.history == []
    callback = LaplaceEvidence(curvature="hessian_positive")
    fit(tmp_path, Module(mlp(), cross_entropy, optimizer(weight_decay=1e-4)), loader(), callback)
    assert callback.history[0][1].num_negative_eigenvalues > 0
    assert callback.history[0][1].status == "negative curvature"


def test_noise_that_maximises_the_evidence_under_weight_decay(tmp_path):
    """φλ is N K wd/2 whatever φ, hence φ = (2U + φλ‖ω‖²)/(NK): γ does not come in."""
    callback = LaplaceEvidence(likelihood=Gaussian(sigma="optimize"))
    module = Module(mlp(2), mean_squared_error)
    fit(tmp_path, module, loader("regression_2"), callback)
    evidence, (x, y) = callback.history[0][1], tensors("regression_2")
    scaled = N * 2 * DECAY / 2
    squares = (module.network(x) - y).square().sum().item()
    norm = sum(p.detach().square().sum().item() for p in module.parameters())
    assert evidence.noise_variance == pytest.approx((squares + scaled * norm) / (2 * N), rel=1e-6)
    assert evidence.prior_precision == pytest.approx(scaled / evidence.noise_variance, rel=1e-9)
    assert not evidence.prior_optimized


def test_noise_and_prior_together(tmp_path):
    callback = LaplaceEvidence(likelihood=Gaussian(sigma="optimize"), prior_precision="optimize")
    module = Module(mlp(2), mean_squared_error)
    run = fit(tmp_path, module, loader("regression_2"), callback)
    direct = laplace_evidence(
        module.network,
        tensors("regression_2"),
        likelihood=Gaussian(sigma="optimize"),
        prior_precision="optimize",
    )
    assert disagreements(callback.history[0][1], direct) == {}
    assert run.callback_metrics["bayes/noise_variance"] == pytest.approx(direct.noise_variance, rel=1e-6)


def test_sampled_columns(tmp_path):
    callback, module = LaplaceEvidence(num_samples=4, prior_precision=1.0), Module(mlp(), cross_entropy)
    fit(tmp_path, module, loader(), callback)
    evidence = callback.history[0][1]
    assert (evidence.structure, evidence.num_samples) == ("kron", 4)
    assert "4 sampled columns" in str(evidence)


def test_sampled_blocks(tmp_path):
    callback = LaplaceEvidence("blocks", num_blocks=8, batch_size=1)
    run = fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback)
    evidence = callback.history[0][1]
    assert (evidence.structure, evidence.num_blocks) == ("blocks", 8)
    assert evidence.lower_stderr > 0.0
    assert run.callback_metrics["bayes/lower_stderr"] == pytest.approx(evidence.lower_stderr, rel=1e-6)
    assert run.callback_metrics["bayes/lower"] == pytest.approx(evidence.lower, rel=1e-6)


@pytest.mark.parametrize("prior", ["auto", "optimize_per_layer"])
def test_the_search_for_a_prior_begins_at_the_last_epochs(tmp_path, prior, monkeypatch):
    starts = []

    def spy(*arguments):
        starts.append(arguments[2])
        return evidence_of(*arguments)

    monkeypatch.setattr("lightning_bayes.callbacks.evidence.evaluation.evidence_of", spy)
    callback = LaplaceEvidence(prior_precision=prior)
    fit(tmp_path, Module(mlp(), cross_entropy, no_decay), loader(), callback, max_epochs=3)
    assert starts[0] is None
    for start, (_, before) in zip(starts[1:], callback.history, strict=False):
        found = before.prior_precision
        assert start == (dict(found) if isinstance(found, Mapping) else dict.fromkeys(start, found))


def test_many_outputs_are_sampled_and_said_to_be(tmp_path, monkeypatch):
    use_budget(monkeypatch, Budget(columns=2, seconds=1e-4))
    callback, module = LaplaceEvidence(), Module(mlp(), cross_entropy)
    with pytest.warns(UserWarning, match=r"3 outputs per example, so structure='auto' takes.*num_samples=64"):
        fit(tmp_path, module, loader(), callback)
    assert (callback.history[0][1].structure, callback.history[0][1].num_samples) == ("kron", 64)
    for other in (
        LaplaceEvidence("kron"),
        LaplaceEvidence("full"),
        LaplaceEvidence(curvature="hessian_positive"),
    ):
        fit(tmp_path, Module(mlp(), cross_entropy), loader(), other)
        assert other.history[0][1].num_samples is None


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_bounds_are_logged_where_they_are_finite(tmp_path, structure):
    callback, module = LaplaceEvidence(structure), Module(Rich(), cross_entropy)
    run = fit(tmp_path, module, loader(), callback)
    evidence = callback.history[0][1]
    for name in ("lower", "upper"):
        bound = getattr(evidence, name)
        assert (f"bayes/{name}" in run.callback_metrics) is math.isfinite(bound)
        if math.isfinite(bound):
            assert run.callback_metrics[f"bayes/{name}"] == pytest.approx(bound, rel=1e-6)
    assert "bayes/log_evidence_stderr" not in run.callback_metrics


def test_new_fields_survive_a_checkpoint_and_old_states_load(tmp_path):
    callback = LaplaceEvidence(subset_of_weights=["network.2.*"], prior_precision="optimize_per_parameter")
    module = Module(mlp(), cross_entropy)
    fit(tmp_path, module, loader(), callback, ModelCheckpoint(tmp_path, "last"), enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"][callback.state_key]
    fresh = LaplaceEvidence()
    fresh.load_state_dict(saved)
    assert fresh.history == callback.history
    new = (
        "log_evidence_stderr",
        "prior_optimized",
        "num_samples",
        "subset_of_weights",
        "num_blocks",
        "lower_stderr",
    )
    old = {name: value for name, value in asdict(callback.history[0][1]).items() if name not in new}
    fresh.load_state_dict({"history": [(0, old)]})
    assert fresh.history[0][1].subset_of_weights == "all" and isinstance(fresh.history[0][1], Evidence)


def test_prior_for_the_last_layer_alone(tmp_path):
    callback = LaplaceEvidence(subset_of_weights="last_layer", prior_precision={"*.2.*": 2.0})
    module = Module(mlp(), cross_entropy)
    fit(tmp_path, module, loader(), callback)
    assert callback.history[0][1].prior_precision == 2.0
    callback = LaplaceEvidence(subset_of_weights="last_layer", prior_precision={"*.2.weight": 2.0})
    fit_refuses(
        tmp_path, Module(mlp(), cross_entropy), "no pattern for ['network.2.bias']", callback=callback
    )


def test_auxiliary_head_is_not_the_last_layer(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem, self.aside = nn.Linear(5, 3), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return torch.tanh(self.stem(x))

    def step(module, batch):
        features = module(batch[0])
        loss = F.cross_entropy(module.network.head(features), batch[1])
        module.network.aside(features.detach())
        return loss

    callback = LaplaceEvidence(subset_of_weights="last_layer")
    fit(tmp_path, Module(Two(), step), loader(), callback)
    assert callback.history[0][1].num_parameters == 5 * 3 + 3
