"""`LaplaceEvidence("lanczos")` in a Trainer."""

import logging
import math
from dataclasses import asdict

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_bayes import LaplaceEvidence, laplace_evidence
from lightning_bayes.callbacks.evidence import progress
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.structures import registry
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.lanczos import row_space
from tests.cases import use_budget
from tests.refusals import refuses
from tests.scenarios import (
    DECAY,
    Module,
    N,
    cross_entropy,
    fit,
    loader,
    mean_squared_error,
    mlp,
    tensors,
    trainer,
)

REREAD = Budget(stored_bytes=0.0)


@pytest.fixture(autouse=True)
def _a_tenth_is_selected(monkeypatch):
    monkeypatch.setattr(row_space, "num_selected", lambda problem: max(1, problem.num_rows // 10))


@pytest.mark.parametrize("budget", [Budget(), REREAD], ids=["stored", "reread"])
def test_agrees_with_laplace_evidence(tmp_path, budget, monkeypatch):
    use_budget(monkeypatch, budget)
    callback, module = LaplaceEvidence("lanczos"), Module(mlp(), cross_entropy)
    run = fit(tmp_path, module, loader(), callback)
    evidence = callback.history[0][1]
    exact = laplace_evidence(module.network, tensors(), prior_precision=N * DECAY, structure="full")
    assert evidence.structure == "lanczos"
    assert abs(evidence.log_evidence - exact.log_evidence) < 4 * evidence.log_evidence_stderr
    assert evidence.lower <= exact.log_evidence <= evidence.upper
    direct = laplace_evidence(
        module.network, tensors(), prior_precision=N * DECAY, structure="lanczos", batch_size=32
    )
    assert evidence.log_evidence == pytest.approx(direct.log_evidence, rel=1e-8)
    for name in ("log_evidence", "log_evidence_stderr", "lower", "upper"):
        assert run.callback_metrics[f"bayes/{name}"] == pytest.approx(getattr(evidence, name), rel=1e-6), name


def test_the_noise_and_the_prior_are_found(tmp_path):
    callback = LaplaceEvidence("lanczos", prior_precision="optimize")
    module = Module(mlp(1), mean_squared_error)
    fit(tmp_path, module, loader("regression"), callback)
    evidence = callback.history[0][1]
    best = laplace_evidence(
        module.network, tensors("regression"), likelihood="regression", prior_precision="optimize"
    )
    assert evidence.prior_optimized
    assert abs(evidence.log_evidence - best.log_evidence) < 4 * evidence.log_evidence_stderr + 0.2


def test_epochs_have_the_same_vectors(tmp_path):
    """So that differences between epochs are surer than values."""
    module = Module(
        mlp(), cross_entropy, lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, weight_decay=DECAY)
    )
    callback, exact = LaplaceEvidence("lanczos"), LaplaceEvidence("full", log_key_prefix="exact/")
    fit(tmp_path, module, loader(), callback, exact, max_epochs=2)
    (_, first), (_, second) = callback.history
    difference, stderr = second.above(first)
    assert stderr < 0.05 * first.log_evidence_stderr
    right = exact.history[1][1].log_evidence - exact.history[0][1].log_evidence
    assert abs(difference - right) < 4 * stderr + 0.2 * first.log_evidence_stderr


def test_it_survives_a_checkpoint_and_old_states_load(tmp_path):
    callback = LaplaceEvidence("lanczos", num_probes=3)
    fit(
        tmp_path,
        Module(mlp(), cross_entropy),
        loader(),
        callback,
        ModelCheckpoint(tmp_path, "last"),
        enable_checkpointing=True,
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    fresh = LaplaceEvidence("lanczos")
    fresh.load_state_dict(saved)
    assert fresh.history == callback.history
    assert len(fresh.history[0][1].samples) == 3
    new = ("log_evidence_dof", "samples", "newton_decrement_error")
    old = {name: value for name, value in asdict(callback.history[0][1]).items() if name not in new}
    fresh.load_state_dict({"history": [(0, old)]})
    assert isinstance(fresh.history[0][1], Evidence)
    assert math.isinf(fresh.history[0][1].log_evidence_dof)


def test_an_epoch_without_evidence_is_nan_and_said(tmp_path):
    class Spoilt(Module):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.network[0].weight.fill_(float("nan"))

    callback = LaplaceEvidence("lanczos")
    with pytest.warns(UserWarning, match="no evidence for epoch"):
        run = fit(tmp_path, Spoilt(mlp(), cross_entropy), loader(), callback, max_epochs=3)
    assert len(callback.history) < 3
    for name in ("log_evidence", "log_evidence_stderr", "lower", "upper"):
        assert run.callback_metrics[f"bayes/{name}"].isnan()


def test_keys_can_be_monitored(tmp_path):
    stopping = EarlyStopping("bayes/log_evidence_stderr", patience=5)
    run = fit(
        tmp_path, Module(mlp(), cross_entropy), loader(), LaplaceEvidence("lanczos"), stopping, max_epochs=2
    )
    assert run.current_epoch == 2


def test_the_bar_says_which_step(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(progress, "_training_bar", lambda trainer: (said.append, "Epoch 0"))
    fit(tmp_path, Module(mlp(), cross_entropy), loader(), LaplaceEvidence("lanczos"))
    steps = [text for text in said if "lanczos, step" in text]
    assert steps[0].startswith("evidence lanczos, step 2: ")
    assert "nats between its rules" in steps[-1]
    assert said[-1] == "Epoch 0"


def test_auto_takes_it_where_exact_is_beyond_the_budget(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(registry, "rate", lambda dtype, device: 1e11)
    use_budget(monkeypatch, Budget(memory=1.0))
    callback = LaplaceEvidence(num_probes=4)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback)
    evidence = callback.history[0][1]
    assert (evidence.structure, len(evidence.samples)) == ("lanczos", 4)
    assert "structure='lanczos'. 43 parameters, 42 rows" in caplog.text
    assert "4 random vectors" in caplog.text


def test_what_it_takes_is_said_beforehand(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lightning_bayes.callbacks.laplace_evidence.WORTH_SAYING", 0.0)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Module(mlp(), cross_entropy), loader(), LaplaceEvidence("lanczos"))
    assert caplog.text.count("an evaluation takes about") == 1


@pytest.mark.parametrize(("name", "value"), [("num_probes", 4), ("max_stderr", 1.0)])
def test_options_go_with_lanczos_alone(name, value):
    for structure in ("auto", "lanczos"):
        assert getattr(LaplaceEvidence(structure, **{name: value}).method, name) == value
    with refuses((f"`{name}` to be None", "structure='kron'"), value, 'structure="lanczos"'):
        LaplaceEvidence("kron", **{name: value})


@pytest.mark.parametrize("words", ["optimize_per_layer", "optimize_per_group", "optimize_per_parameter"])
def test_several_priors_are_not_found(tmp_path, words):
    def two_groups(module):
        groups = [{"params": module.network[0].parameters()}, {"params": module.network[2].parameters()}]
        return torch.optim.SGD(groups, lr=0.1)

    callback = LaplaceEvidence("lanczos", prior_precision=words, on_error="raise")
    with refuses('structure="lanczos"', remedy='prior_precision="optimize"'):
        fit(tmp_path, Module(mlp(), cross_entropy, two_groups), loader(), callback)


def test_max_stderr_is_met_in_every_epoch(tmp_path):
    few = LaplaceEvidence("lanczos", num_probes=4)
    fit(tmp_path, Module(mlp(), cross_entropy), loader(), few)
    wanted = 0.8 * few.history[0][1].log_evidence_stderr
    callback = LaplaceEvidence("lanczos", num_probes=4, max_stderr=wanted)
    fit(tmp_path, Module(mlp(), cross_entropy), loader(), callback, max_epochs=2)
    assert all(evidence.log_evidence_stderr <= wanted for _, evidence in callback.history)


def test_a_resumed_run_keeps_its_structure(tmp_path, monkeypatch):
    """Also where the seconds of an epoch would now choose another."""
    monkeypatch.setattr(registry, "full_cost", lambda problem: (math.inf, math.inf))
    seconds = {"lanczos": 1e-3}
    monkeypatch.setattr(registry, "structure_seconds", lambda problem, structure: seconds.get(structure, 1e9))
    first = LaplaceEvidence()
    run = fit(tmp_path, Module(mlp(), cross_entropy), loader(), first, max_epochs=1)
    assert first.history[0][1].structure == "lanczos"
    run.save_checkpoint(tmp_path / "one.ckpt")
    seconds["lanczos"] = 1e9
    second = LaplaceEvidence()
    resumed = trainer(tmp_path, [second], max_epochs=2)
    resumed.fit(Module(mlp(), cross_entropy), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert [evidence.structure for _, evidence in second.history] == ["lanczos", "lanczos"]
