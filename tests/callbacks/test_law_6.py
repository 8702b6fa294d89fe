"""Law 6: a callback that measures never ends a fit that would have run without it."""

import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lightning_bayes import GradientNoiseScale, LaplaceEvidence, ScalingAdvisor, SGDNoiseScale, Stability

from . import not_allowed as no
from .not_allowed import LEAVE_OUT, NETWORK, SMALL_ADVISOR, Row

NAMES = ("LaplaceEvidence", "SGDNoiseScale", "GradientNoiseScale", "Stability", "ScalingAdvisor")
KEYS = {
    LaplaceEvidence: "bayes/log_evidence",
    SGDNoiseScale: "bayes/noise_scale",
    GradientNoiseScale: "bayes/gradient_noise_trace",
    Stability: "bayes/largest_eigenvalue",
}
EVERY_STEP = partial(GradientNoiseScale, every_n_steps=1)
ALL = [LaplaceEvidence, SGDNoiseScale, EVERY_STEP, Stability, SMALL_ADVISOR]
READ_NETWORK = r"network="
AUTOMATIC = {"module": no.Small}

ROWS = [
    Row("manual-evidence", LaplaceEvidence, "optimizes manually", READ_NETWORK, {"callback": NETWORK}, no.Manual),
    Row("manual-sgd", SGDNoiseScale, "manual", "utomatic", AUTOMATIC, no.Manual),
    Row("manual-gradient", EVERY_STEP, "manual", "utomatic", AUTOMATIC, no.Manual),
    Row("manual-stability", Stability, "optimizes manually", READ_NETWORK,
        {"callback": partial(Stability, network="net", likelihood="classification")}, no.Manual),
    Row("manual-advisor", SMALL_ADVISOR, "manual", "utomatic", AUTOMATIC, no.Manual),
    Row("two-losses", LaplaceEvidence, "2 losses", READ_NETWORK, {"callback": NETWORK}, no.stepping(no.two_losses)),
    Row("quantiles", LaplaceEvidence, "by hand", READ_NETWORK, {"callback": NETWORK}, no.stepping(no.quantiles)),
    Row("smoothed-by-hand", LaplaceEvidence, "by hand", READ_NETWORK, {"callback": NETWORK},
        no.stepping(no.smoothed_by_hand)),
    Row("dice", LaplaceEvidence, "no likelihood", "leave LaplaceEvidence out", LEAVE_OUT, no.stepping(no.dice)),
    Row("contrastive", LaplaceEvidence, "factorise", "eave LaplaceEvidence out", LEAVE_OUT,
        no.stepping(no.contrastive)),
    Row("triplets", LaplaceEvidence, "not the negative log-likelihood of anything", "eave LaplaceEvidence out",
        LEAVE_OUT, no.stepping(no.triplets)),
    Row("l1", LaplaceEvidence, "F.l1_loss", READ_NETWORK, {"callback": NETWORK}, no.stepping(no.absolute)),
    Row("smooth-l1", LaplaceEvidence, "F.smooth_l1_loss", READ_NETWORK, {"callback": NETWORK},
        no.stepping(no.smooth_absolute)),
    Row("batch-norm-without-statistics", LaplaceEvidence, "mixes the examples", "group or layer norm",
        {"module": no.with_net(nn.Linear(4, 5), nn.GroupNorm(1, 5), nn.Linear(5, 3))},
        no.with_net(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))),
    Row("detached", LaplaceEvidence, "no graph", READ_NETWORK, {"callback": NETWORK}, no.stepping(no.detached)),
    Row("hardsigmoid", Stability, "hardsigmoid", 'curvature="ggn"|eave Stability out',
        {"callback": partial(Stability, curvature="ggn")},
        no.with_net(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3))),
    Row("once-differentiable", Stability, "once_differentiable", 'curvature="ggn"|eave Stability out',
        {"callback": partial(Stability, curvature="ggn")},
        no.with_net(nn.Linear(4, 5), no.OnceOnlyTanh(), nn.Linear(5, 3))),
    Row("batch-above-n", partial(ScalingAdvisor, target_batch_size=512), "32", "target_batch_size below 32",
        {"callback": SMALL_ADVISOR}),
    Row("batch-above-n-overfit", partial(ScalingAdvisor, target_batch_size=20), r"overfit_batches=2",
        "remove `overfit_batches`", {"trainer": {}}, trainer={"overfit_batches": 2}),
    Row("batch-above-n-limit", partial(ScalingAdvisor, target_batch_size=20), r"limit_train_batches=2",
        "remove `limit_train_batches`", {"trainer": {}}, trainer={"limit_train_batches": 2},
        data=partial(no.loader, shuffle=False)),
    Row("momentum-with-adam", partial(ScalingAdvisor, target_momentum=0.5), "momentum", "betas|target_",
        {"callback": SMALL_ADVISOR}, no.optimized_by(partial(torch.optim.Adam, lr=0.01))),
    Row("asserts-training", LaplaceEvidence, "AssertionError: training_step outside", READ_NETWORK,
        {"callback": NETWORK}, no.stepping(no.asserts_training)),
    Row("asserts-training-stability", Stability, "AssertionError", READ_NETWORK,
        {"callback": partial(Stability, network="net", likelihood="classification")},
        no.stepping(no.asserts_training)),
    Row("asserts-training-gradient", EVERY_STEP, "AssertionError", 'method="micro_batches"',
        {"callback": partial(EVERY_STEP, method="micro_batches"), "trainer": {"accumulate_grad_batches": 2}},
        no.stepping(no.asserts_training)),
    Row("key-error", LaplaceEvidence, "KeyError", READ_NETWORK, {"callback": NETWORK},
        no.stepping(no.fails_in_eval(KeyError("mask")))),
    Row("division", Stability, "ZeroDivisionError", READ_NETWORK,
        {"callback": partial(Stability, network="net", likelihood="classification")},
        no.stepping(no.fails_in_eval(ZeroDivisionError("by zero")))),
    Row("out-of-memory", LaplaceEvidence, "Memory does not suffice", "batch_size=8", LEAVE_OUT,
        no.stepping(no.fails_in_eval(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")))),
    Row("out-of-memory-stability", Stability, "Memory does not suffice", "max_examples=128", LEAVE_OUT,
        no.stepping(no.fails_in_eval(torch.OutOfMemoryError("CUDA out of memory")))),
    Row("no-length", SGDNoiseScale, "length", "dataset_size", {"callback": partial(SGDNoiseScale, dataset_size=32)},
        data=lambda: torch.utils.data.DataLoader(no.Endless(), 8)),
    Row("no-batch-size", SGDNoiseScale, "batch", "batch_size", {"data": no.loader},
        data=lambda: [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*no.tensors(12)),
                                                  batch_sampler=no.BatchesWithoutSize())][0]),
    Row("two-loaders", LaplaceEvidence, "collection of 2", "leave the callback out", LEAVE_OUT,
        no.stepping(no.digits_and_letters), no.both),
    Row("two-loaders-stability", Stability, "collection of 2", "leave the callback out", LEAVE_OUT,
        no.stepping(no.digits_and_letters), no.both),
    Row("two-loaders-sgd", SGDNoiseScale, "loader", "one|single", LEAVE_OUT,
        no.stepping(no.digits_and_letters), no.both),
    Row("lbfgs", EVERY_STEP, "LBFGS", ".", LEAVE_OUT, no.optimized_by(partial(torch.optim.LBFGS, lr=0.05))),
    Row("own-learning-rate", SGDNoiseScale, "lr", ".", LEAVE_OUT, no.optimized_by(no.OwnLearningRate)),
    Row("lock", LaplaceEvidence, "copied", ".", LEAVE_OUT, no.HoldsLock),
    Row("holds-original", LaplaceEvidence, "original's", "method", {"module": no.Small}, no.HoldsOriginal),
    Row("stores-on-trainer", LaplaceEvidence, "seen|Trainer", READ_NETWORK, {"callback": NETWORK}, no.StoresOnTrainer),
    Row("selected", LaplaceEvidence, "selecting by a mask", READ_NETWORK, {"callback": NETWORK},
        no.stepping(no.selected)),
    Row("one-graph-gradient", EVERY_STEP, "one example|1 example", ".", LEAVE_OUT, no.stepping(no.nodes),
        lambda: torch.utils.data.DataLoader(no.OneGraph(), 1)),
    Row("graph-object", LaplaceEvidence, "graph|examples", r"\[None\]",
        {"callback": partial(LaplaceEvidence, likelihood="classification",
                             network=lambda module, batch: (module(batch.x)[None], batch.y[None]))},
        no.stepping(no.graph), no.graphs),
    Row("frozen-network", NETWORK, ".", ".", LEAVE_OUT, no.frozen("net.0")),
    Row("other-likelihood", partial(LaplaceEvidence, likelihood="regression"), "regression|Gaussian",
        "likelihood=.auto", {"callback": LaplaceEvidence}),
    Row("prior-leaves-out", partial(LaplaceEvidence, prior_precision={"net.0.*": 1.0}), "prior", ".",
        {"callback": partial(LaplaceEvidence, prior_precision={"*": 1.0})}),
    Row("frozen-subset", partial(LaplaceEvidence, subset_of_weights=["net.2.*"]), ".", ".", LEAVE_OUT,
        no.frozen("net.2")),
]


def run(tmp_path, row, *callbacks, module=None, epochs=1):
    """Fit from one seed; gives the Trainer, the module and our warnings with the step of each."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs, callbacks=list(callbacks), default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **row.trainer,
    )
    module = module or row.module()
    ours = []

    def note(message, *args, **kwargs):
        text = str(message)
        if text.startswith(NAMES):
            ours.append((trainer.global_step, text))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        trainer.fit(module, row.data())
    return trainer, module, ours


def finite_of(trainer, callback):
    if isinstance(callback, ScalingAdvisor):
        return bool(callback.advice)
    value = trainer.callback_metrics.get(KEYS[type(callback)])
    return value is not None and math.isfinite(value)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_not_allowed(tmp_path, row):
    bare_trainer, bare, _ = run(tmp_path, row)
    callback = row.callback()
    trainer, module, ours = run(tmp_path, row, callback)
    assert trainer.global_step == bare_trainer.global_step
    weights, expected = module.state_dict(), bare.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(ours) == 1, ours
    step, text = ours[0]
    print(f"\n### {row.name}: {text}")
    assert step == 0
    assert text.startswith(f"{type(callback).__name__}: ")
    pytest.importorskip("re")
    import re
    assert re.search(row.message, text), text
    assert re.search(row.way_out_text, last_sentences(text)), text
    assert not finite_of(trainer, callback)
    with pytest.raises(Exception) as raised:
        run(tmp_path, row, row.callback(on_error="raise"))
    assert str(raised.value)[:40] in text or callback.explain(raised.value) in text
    if row.way_out == LEAVE_OUT:
        assert re.search("[Ll]eave", text), text
        return
    callback = row.followed().callback()
    trainer, _, ours = run(tmp_path, row.followed(), callback)
    assert finite_of(trainer, callback), ours
    assert not any("nothing is measured" in text for _, text in ours), ours


def last_sentences(text):
    return text[-len(text) // 2 :]
