"""Law 6: a callback that measures never ends a fit that would have run without it."""

import re
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_bayes import GradientNoiseScale, LaplaceEvidence, ScalingAdvisor, SGDNoiseScale, Stability
from tests import situations

from . import not_allowed as no
from .not_allowed import EVERY_STEP, LEAVE_OUT, NETWORK, SMALL_ADVISOR, Row, finite_of, run

READ_NETWORK = r"network="

ROWS = [
    Row(
        "manual-evidence",
        LaplaceEvidence,
        "optimizes manually",
        READ_NETWORK,
        {"callback": NETWORK},
        no.Manual,
    ),
    Row(
        "manual-stability",
        Stability,
        "optimizes manually",
        READ_NETWORK,
        {"callback": partial(Stability, network="net", likelihood="classification")},
        no.Manual,
    ),
    Row(
        "variational",
        LaplaceEvidence,
        "meet in no tensor with a row for each example",
        READ_NETWORK,
        {"callback": NETWORK},
        no.stepping(no.variational),
    ),
    Row(
        "quantiles",
        LaplaceEvidence,
        "piecewise linear",
        READ_NETWORK,
        {"callback": NETWORK},
        no.stepping(no.quantiles),
    ),
    Row(
        "penalty",
        LaplaceEvidence,
        "no example is on",
        READ_NETWORK,
        {"callback": NETWORK},
        no.stepping(no.penalised),
    ),
    Row(
        "dice", LaplaceEvidence, "is not convex", "leave LaplaceEvidence out", LEAVE_OUT, no.stepping(no.dice)
    ),
    Row(
        "contrastive",
        LaplaceEvidence,
        "factorise",
        "eave LaplaceEvidence out",
        LEAVE_OUT,
        no.stepping(no.contrastive),
    ),
    Row(
        "triplets",
        LaplaceEvidence,
        "not the negative log-likelihood of anything",
        "eave LaplaceEvidence out",
        LEAVE_OUT,
        no.stepping(no.triplets),
    ),
    Row(
        "batch-norm-without-statistics",
        LaplaceEvidence,
        "mixes the examples",
        "group or layer norm",
        {"module": no.with_net(nn.Linear(4, 5), nn.GroupNorm(1, 5), nn.Linear(5, 3))},
        no.with_net(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)),
    ),
    Row(
        "detached", LaplaceEvidence, "no graph", READ_NETWORK, {"callback": NETWORK}, no.stepping(no.detached)
    ),
    Row(
        "hardsigmoid",
        Stability,
        "hardsigmoid_backward",
        r"F.relu6\(x \+ 3\) / 6",
        {"module": no.with_net(nn.Linear(4, 5), no.Relu6Gate(), nn.Linear(5, 3))},
        no.with_net(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3)),
    ),
    Row(
        "once-differentiable",
        Stability,
        "once_differentiable",
        "in ordinary operations",
        {"module": no.Small},
        no.with_net(nn.Linear(4, 5), no.OnceOnlyTanh(), nn.Linear(5, 3)),
    ),
    Row(
        "batch-above-n",
        partial(ScalingAdvisor, target_batch_size=512),
        "32",
        "target_batch_size below 32",
        {"callback": SMALL_ADVISOR},
    ),
    Row(
        "batch-above-n-overfit",
        partial(ScalingAdvisor, target_batch_size=20),
        r"overfit_batches=2",
        "remove `overfit_batches`",
        {"trainer": {}},
        trainer={"overfit_batches": 2},
    ),
    Row(
        "batch-above-n-limit",
        partial(ScalingAdvisor, target_batch_size=20),
        r"limit_train_batches=2",
        "remove `limit_train_batches`",
        {"trainer": {}},
        trainer={"limit_train_batches": 2},
        data=partial(no.loader, shuffle=False),
    ),
    Row(
        "momentum-with-adam",
        partial(ScalingAdvisor, target_momentum=0.5),
        "momentum",
        "betas|target_",
        {"callback": SMALL_ADVISOR},
        no.optimized_by(partial(torch.optim.Adam, lr=0.01)),
    ),
    Row(
        "asserts-training",
        LaplaceEvidence,
        "AssertionError: training_step outside",
        READ_NETWORK,
        {"callback": NETWORK},
        no.stepping(no.asserts_training),
    ),
    Row(
        "asserts-training-stability",
        Stability,
        "AssertionError",
        READ_NETWORK,
        {"callback": partial(Stability, network="net", likelihood="classification")},
        no.stepping(no.asserts_training),
    ),
    Row(
        "asserts-training-gradient",
        EVERY_STEP,
        "AssertionError",
        'method="micro_batches"',
        {"callback": partial(EVERY_STEP, method="micro_batches"), "trainer": {"accumulate_grad_batches": 2}},
        no.stepping(no.asserts_training),
    ),
    Row(
        "key-error",
        LaplaceEvidence,
        "KeyError",
        READ_NETWORK,
        {"callback": NETWORK},
        no.stepping(no.fails_in_eval(KeyError("mask"))),
    ),
    Row(
        "division",
        Stability,
        "ZeroDivisionError",
        READ_NETWORK,
        {"callback": partial(Stability, network="net", likelihood="classification")},
        no.stepping(no.fails_in_eval(ZeroDivisionError("by zero"))),
    ),
    Row(
        "out-of-memory",
        LaplaceEvidence,
        "Memory does not suffice",
        "batch_size=8, max_examples=16",
        {"callback": partial(LaplaceEvidence, batch_size=8, max_examples=16, structure="diag")},
        no.stepping(no.allocates(8, RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))),
    ),
    Row(
        "out-of-memory-stability",
        Stability,
        "Memory does not suffice",
        "max_examples=4, batch_size=1",
        {"callback": partial(Stability, max_examples=4, batch_size=1)},
        no.stepping(no.allocates(4, torch.OutOfMemoryError("CUDA out of memory"))),
    ),
    Row(
        "out-of-memory-gradient",
        EVERY_STEP,
        "Memory does not suffice",
        'method="micro_batches"',
        {"callback": partial(EVERY_STEP, method="micro_batches"), "trainer": {"accumulate_grad_batches": 2}},
        no.stepping(no.allocates(0, MemoryError("no memory"))),
    ),
    Row(
        "no-length",
        SGDNoiseScale,
        "length",
        "dataset_size",
        {"callback": partial(SGDNoiseScale, dataset_size=32)},
        data=lambda: torch.utils.data.DataLoader(no.Endless(), 8),
    ),
    Row(
        "no-batch-size",
        SGDNoiseScale,
        "batch",
        "batch_size",
        {"data": no.loader},
        data=no.batches_without_size,
    ),
    Row(
        "two-loaders",
        LaplaceEvidence,
        "collection of 2",
        "leave the callback out",
        LEAVE_OUT,
        no.stepping(no.digits_and_letters),
        no.both,
    ),
    Row(
        "two-loaders-stability",
        Stability,
        "collection of 2",
        "leave the callback out",
        LEAVE_OUT,
        no.stepping(no.digits_and_letters),
        no.both,
    ),
    Row(
        "two-loaders-sgd",
        SGDNoiseScale,
        "dataloader",
        "remove the callback",
        LEAVE_OUT,
        no.stepping(no.digits_and_letters),
        no.both,
    ),
    Row(
        "lbfgs",
        EVERY_STEP,
        "LBFGS",
        "Use another optimizer",
        {"module": no.Small},
        no.optimized_by(partial(torch.optim.LBFGS, lr=0.05)),
    ),
    Row(
        "own-learning-rate",
        SGDNoiseScale,
        "`lr`",
        "Remove the callback",
        LEAVE_OUT,
        no.optimized_by(no.OwnLearningRate),
    ),
    Row("lock", LaplaceEvidence, "cannot copy", "network=", {"callback": NETWORK}, no.HoldsLock),
    Row("holds-original", LaplaceEvidence, "original's", "method", {"module": no.Small}, no.HoldsOriginal),
    Row(
        "stores-on-trainer",
        LaplaceEvidence,
        "seen|Trainer",
        READ_NETWORK,
        {"callback": NETWORK},
        no.StoresOnTrainer,
    ),
    Row(
        "one-graph-gradient",
        EVERY_STEP,
        "an epoch has one",
        "Leave GradientNoiseScale out",
        LEAVE_OUT,
        no.stepping(no.nodes),
        lambda: torch.utils.data.DataLoader(no.OneGraph(), 1),
    ),
    Row(
        "frozen-network",
        partial(NETWORK, network="net.0"),
        "no trainable parameter",
        "Unfreeze some, or leave",
        LEAVE_OUT,
        no.frozen("net.0"),
    ),
    Row(
        "other-likelihood",
        partial(LaplaceEvidence, likelihood="regression"),
        "regression|Gaussian",
        "likelihood='auto'|network=",
        {"callback": LaplaceEvidence},
    ),
    Row(
        "prior-leaves-out",
        partial(LaplaceEvidence, prior_precision={"net.0.*": 1.0}),
        "no pattern for",
        "'\\*'",
        {"callback": partial(LaplaceEvidence, prior_precision={"*": 1.0})},
    ),
    Row(
        "frozen-subset",
        partial(LaplaceEvidence, subset_of_weights=["net.2.*"]),
        "no trainable",
        "leave subset_of_weights",
        {"callback": LaplaceEvidence},
        no.frozen("net.2"),
    ),
]


@pytest.mark.situation("What a callback does not measure, with the way out")
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
    assert step == 0
    assert text.startswith(f"{type(callback).__name__}: ")
    situations.refused(text)
    assert re.search(row.message, text), text
    assert ("group or layer norm" in text) == (row.name == "batch-norm-without-statistics"), text
    assert re.search(row.way_out_text, after_the_reason(row, text)), text
    assert not finite_of(trainer, callback)
    with pytest.raises(Exception) as raised:
        run(tmp_path, row, row.callback(on_error="raise"))
    assert str(raised.value)[:40] in text or callback.explain(raised.value) in text
    if row.way_out == LEAVE_OUT:
        assert re.search("[Ll]eave|[Rr]emove", text), text
        return
    callback = row.followed().callback()
    trainer, _, ours = run(tmp_path, row.followed(), callback)
    assert finite_of(trainer, callback), ours
    assert not any("nothing is measured" in text for _, text in ours), ours


def after_the_reason(row, text):
    """What a warning says behind the reason: there the way out is."""
    return text[re.search(row.message, text).start() :]


class BuiltInSetup(no.Small):
    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        self.net = nn.Linear(4, 3)


class BuiltInConfigure(BuiltInSetup):
    def setup(self, stage):
        pass

    def configure_model(self):
        if self.net is None:
            self.net = nn.Linear(4, 3)


TYPOS = [
    partial(LaplaceEvidence, network="typo", likelihood="classification"),
    partial(Stability, network="typo", likelihood="classification"),
    partial(LaplaceEvidence, subset_of_weights=["typo.*"]),
    partial(LaplaceEvidence, prior_precision={"typo.*": 1.0, "*": 1.0}),
]
RIGHT = [
    NETWORK,
    partial(LaplaceEvidence, subset_of_weights=["net.*"]),
    partial(LaplaceEvidence, prior_precision={"net.*": 1.0}),
]


@pytest.mark.parametrize("module", [no.Small, BuiltInSetup, BuiltInConfigure])
def test_names_of_what_is_not_there(tmp_path, module):
    row = Row("typo", LaplaceEvidence, "", "", module=module)
    for callback in TYPOS:
        with pytest.raises(ValueError, match="typo"):
            run(tmp_path, row, callback())
    for callback in RIGHT:
        made = callback()
        trainer, _, ours = run(tmp_path, row, made)
        assert finite_of(trainer, made), ours


def test_advice_that_cannot_be_written(tmp_path):
    """A file stands where the folder of the logs should be."""
    advisor = SMALL_ADVISOR()
    root = tmp_path / "taken"
    root.write_text("")
    logger = TensorBoardLogger(tmp_path / "logs")
    row = Row("advice", SMALL_ADVISOR, "", "", trainer={"logger": logger})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "log_dir", str(root / "below"))
        _, _, ours = run(tmp_path, row, advisor)
    assert advisor.advice
    assert len(ours) == 1, ours
    assert ours[0][1].startswith("ScalingAdvisor: ")


@pytest.mark.parametrize(("every", "said"), [(1, False), (2, True)])
def test_a_remedy_that_is_taken_is_not_named(tmp_path, every, said):
    """Gradients that are noise alone: B_simple is not resolved."""
    callback = GradientNoiseScale(every_n_steps=every, ema=0.0)
    _, _, ours = run(
        tmp_path, Row("noise", GradientNoiseScale, "", "", module=no.stepping(no.noise)), callback
    )
    texts = [text for _, text in ours if "not resolved" in text]
    assert all(("every_n_steps" in text) == said for text in texts), texts


@pytest.mark.parametrize(
    ("callback", "taken"),
    [
        (LaplaceEvidence("diag", batch_size=1, max_examples=1), ("batch_size", "max_examples", "structure")),
        (Stability(max_examples=1, batch_size=1), ("batch_size", "max_examples")),
    ],
)
def test_memory_where_everything_was_tried(tmp_path, callback, taken):
    module = no.stepping(no.allocates(0, torch.OutOfMemoryError("out of memory")))
    _, _, ours = run(tmp_path, Row("memory", type(callback), "", "", module=module), callback)
    assert f"Leave {type(callback).__name__} out of this run." in ours[0][1]
    assert not any(f"{name}=" in ours[0][1] for name in taken)
