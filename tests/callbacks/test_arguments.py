"""Arguments are checked when a callback is made: the message names the argument, the value and what is accepted."""

import math
from functools import partial

import pytest

from lightning_bayes import (
    BatchSizeScheduler,
    GradientNoiseScale,
    LaplaceEvidence,
    ScalingAdvisor,
    SGDNoiseScale,
    Stability,
)
from tests.refusals import UNSAID, refuses

COUNT, POSITIVE = "a whole number of at least 1", "a finite number above 0"
NUMBERS, GIVEN_PRIORS = "a positive, finite number", "'auto', 'optimize_per_group', 'optimize'"
MAPPED = "non-negative, finite numbers or 'optimize'"
SUBSETS = "'all', 'last_layer' or a list of parameter-name patterns"
LIKELIHOODS = ("to be one of", "Gaussian(sigma=0.1)")
NETWORKS = "None, the name of a submodule, or a function (module, batch) -> (outputs, targets)"
EPOCHS = 'epochs such as [30, 60], a mapping from epoch to factor such as {30: 5, 60: 2}, or "lr_scheduler"'
FROM_ONE = "at least 1 (the batch size of epoch 0 is the one that you start with)"
FACTOR = "a number of at least 1"
BY_NAME = partial(LaplaceEvidence, likelihood="classification")
LISTED = partial(BatchSizeScheduler, [2])

ARGUMENTS = [
    # callback, argument, value, what is accepted
    (
        LaplaceEvidence,
        "structure",
        ("dense", None, ["full"]),
        "'auto', 'full', 'lanczos', 'blocks', 'kron', 'kron_joint', 'kron_expand', 'diag'",
    ),
    (LaplaceEvidence, "likelihood", ("poisson", 3), LIKELIHOODS),
    (
        LaplaceEvidence,
        "prior_precision",
        (0.0, -1, math.nan, math.inf, True, None, "optimise"),
        (NUMBERS, GIVEN_PRIORS),
    ),
    (LaplaceEvidence, "prior_precision", ({},), "a non-empty mapping"),
    (LaplaceEvidence, "prior_precision", ({"*": -1.0}, {3: 1.0}), ("parameter-name patterns", MAPPED)),
    (LaplaceEvidence, "subset_of_weights", ("head", []), SUBSETS),
    (LaplaceEvidence, "curvature", ("fisher",), "'ggn', 'hessian', 'hessian_positive'"),
    (LaplaceEvidence, "backend", ("jax",), "'auto', 'backpack', 'autograd'"),
    (BY_NAME, "network", (3,), NETWORKS),
    (LaplaceEvidence, "every_n_epochs", (0, 1.5, True), COUNT),
    (LaplaceEvidence, "max_examples", (0, "all"), COUNT),
    (LaplaceEvidence, "batch_size", (-1, 2.5), COUNT),
    (LaplaceEvidence, "tolerance", (0.0,), POSITIVE),
    (LaplaceEvidence, "num_samples", (0,), COUNT),
    (LaplaceEvidence, "max_overhead", (0, math.nan, "10%"), POSITIVE),
    (LaplaceEvidence, "log_key_prefix", (None,), "a string"),
    (Stability, "every_n_epochs", (0, 1.5), COUNT),
    (Stability, "max_examples", (0, None, True), COUNT),
    (Stability, "curvature", ("fisher", "hessian_positive", None), "'hessian' or 'ggn'"),
    (Stability, "sharpness", ("yes", 1e-3), "a boolean"),
    (partial(Stability, likelihood="classification"), "network", (3,), NETWORKS),
    (Stability, "likelihood", ("poisson",), LIKELIHOODS),
    (Stability, "likelihood", ("classification",), "'auto' without `network`"),
    (Stability, "batch_size", (-1, "all"), COUNT),
    (Stability, "log_key_prefix", (None,), "a string"),
    (SGDNoiseScale, "logging_interval", ("batch",), '"epoch" or "step"'),
    (SGDNoiseScale, "dataset_size", (0, 10.5, True), COUNT),
    (SGDNoiseScale, "log_key_prefix", (None,), "a string"),
    (GradientNoiseScale, "every_n_steps", (0, 1.5), COUNT),
    (GradientNoiseScale, "ema", (1.0, "a"), "a number in [0, 1)"),
    (GradientNoiseScale, "log_key_prefix", (None,), "a string"),
    (GradientNoiseScale, "method", ("exact",), "'auto', 'per_example', 'micro_batches', 'split_batch'"),
    (GradientNoiseScale, "per_layer", (1,), "True or False"),
    (partial(ScalingAdvisor, target_batch_size=64), "ema_decay", (1.0,), "a number in [0, 1)"),
    (ScalingAdvisor, "target_batch_size", (1.5, "512"), COUNT),
    (ScalingAdvisor, "target_learning_rate", (-1.0,), POSITIVE),
    (ScalingAdvisor, "target_momentum", (1.0,), "a number in [0, 1)"),
    (ScalingAdvisor, "target_dataset_size", (0,), COUNT),
    (partial(ScalingAdvisor, target_batch_size=64), "log_key_prefix", (1,), "a string"),
    (BatchSizeScheduler, "schedule", ("StepLR", 3), EPOCHS),
    (LISTED, "factor", (0.2, math.nan), FACTOR),
    (LISTED, "max_batch_size", (0,), COUNT),
    (LISTED, "max_device_batch_size", (1.5,), COUNT),
    (LISTED, "dataset_size", (-1,), COUNT),
    (LISTED, "method", ("grow",), '"auto", "accumulate" or "reload"'),
    (LISTED, "rule", ("square",), '"linear", "exact" or "sqrt"'),
    (LISTED, "log_key_prefix", (None,), "a string"),
]
CASES = [(make, name, value, accepted) for make, name, values, accepted in ARGUMENTS for value in values]


@pytest.mark.parametrize(("make", "name", "value", "accepted"), CASES)
def test_arguments_are_checked_at_construction(make, name, value, accepted):
    with refuses(f"argument `{name}`", value, accepted):
        make(**{name: value})


TOGETHER = [
    # callback, arguments, subject, value, remedy
    *(
        (
            kind,
            {"network": "network"},
            "`likelihood` to be given beside `network`",
            UNSAID,
            "'classification'",
        )
        for kind in (LaplaceEvidence, Stability)
    ),
    (ScalingAdvisor, {}, "at least one of `target_batch_size`", None, "`target_learning_rate`"),
    (
        ScalingAdvisor,
        {"target_batch_size": 64, "reference": "run.ckpt"},
        "`reference`",
        UNSAID,
        "no file 'run.ckpt'",
    ),
    *(
        (BatchSizeScheduler, {"schedule": [epoch]}, "epochs of argument `schedule`", epoch, FROM_ONE)
        for epoch in (0, 1.5, True)
    ),
    (BatchSizeScheduler, {"schedule": [2, 2]}, "`schedule`", [2, 2], "to differ"),
    (BatchSizeScheduler, {"schedule": {2: "5"}}, "`factor`", "5", FACTOR),
    (
        BatchSizeScheduler,
        {"schedule": {2: 5}, "factor": 5},
        "no argument `factor` beside a mapping",
        5,
        "Leave it out",
    ),
    (
        BatchSizeScheduler,
        {"schedule": "lr_scheduler", "factor": 5},
        'no argument `factor` beside "lr_scheduler"',
        5,
        "Leave it out",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "subject", "value", "remedy"), TOGETHER)
def test_arguments_that_do_not_go_together(make, arguments, subject, value, remedy):
    with refuses(subject, value, remedy):
        make(**arguments)


def test_arguments_of_stability_are_keywords():
    with pytest.raises(TypeError):
        Stability(5)
