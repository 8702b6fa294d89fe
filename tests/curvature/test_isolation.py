"""Nothing of the evidence is left behind in somebody's model or random streams."""

import copy
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.capture.isolation import isolated
from lightning_bayes.evidence.laplace import laplace_evidence
from tests.cases import NETWORKS, make_case
from tests.refusals import refuses


def fingerprint(model):
    """Everything about a model that training could notice."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "mode": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "settings": {name: module.extra_repr() for name, module in model.named_modules()},
        "hooks": hooks,
    }


def random_streams():
    return torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def assert_same(before, after):
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, torch.Tensor | np.ndarray):
        assert (before == after).all()
    else:
        assert before == after


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_model_is_left_exactly_as_it_was(network, structure):
    case = make_case(network, "classification")
    case.model.train()
    next(case.model.modules()).eval()  # a mixture of modes, gradients here and there, a frozen parameter
    first, *_, last = case.model.parameters()
    last.grad = torch.ones_like(last)
    first.requires_grad_(False)
    data = TensorDataset(case.inputs, case.targets)
    loader = DataLoader(data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3))
    before, streams, own = fingerprint(case.model), random_streams(), loader.generator.get_state()
    laplace_evidence(case.model, loader, structure=structure)
    assert_same(before, fingerprint(case.model))
    for old, new in zip(streams, random_streams(), strict=True):
        assert_same(old, new)
    assert torch.equal(own, loader.generator.get_state())


def test_a_failure_leaves_no_trace_either():
    case = make_case("batch_norm", "classification")
    before, streams = fingerprint(case.model), random_streams()
    case.inputs[5] = torch.nan
    with refuses("outputs are NaN"):
        case.evidence()
    assert_same(before, fingerprint(case.model))
    for old, new in zip(streams, random_streams(), strict=True):
        assert_same(old, new)


class Noisy(torch.utils.data.Dataset):
    """Draws from every stream, as augmentations do."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        noise = torch.randn(5) + np.random.rand() + random.random()
        return noise, index % 3


def test_augmented_data_are_the_same_at_every_call_and_streams_go_on():
    model = nn.Linear(5, 3)
    streams = random_streams()
    first = laplace_evidence(model, DataLoader(Noisy()))
    for old, new in zip(streams, random_streams(), strict=True):
        assert_same(old, new)
    torch.randn(3), np.random.rand(), random.random()
    assert laplace_evidence(model, DataLoader(Noisy())).log_evidence == first.log_evidence


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.random.fork_rng([]),
    ],
)
def test_the_callers_context_does_not_matter(context):
    case = make_case("mlp", "classification")
    case.model.float()
    data = (case.inputs.float(), case.targets)
    outside = laplace_evidence(case.model, data).log_evidence
    with context():
        assert laplace_evidence(case.model, data).log_evidence == outside


PRECISION = """
import warnings

import torch
from torch import nn

from lightning_bayes.capture.isolation import isolated
from lightning_bayes.evidence.laplace import laplace_evidence

warnings.simplefilter("error")
torch.manual_seed(0)
backends, cuda, onednn = torch.backends, torch.backends.cudnn, torch.backends.mkldnn
matmuls = [backends.cuda.matmul, onednn.matmul]
switches = [backends, cuda, onednn, *matmuls, cuda.conv, cuda.rnn, onednn.conv, onednn.rnn]
model, data = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (torch.randn(9, 5), torch.arange(9) % 3)


def precisions():
    # What each switch tells, and what it would without those above it.
    told = [switch.fp32_precision for switch in switches]
    generic, backends.fp32_precision = backends.fp32_precision, "none"
    own, cuda.fp32_precision = cuda.fp32_precision, "none"
    told += [switch.fp32_precision for switch in switches]
    cuda.fp32_precision, backends.fp32_precision = own, generic
    return told


expected = laplace_evidence(model, data).log_evidence
{setting}
before = precisions()
with isolated():
    assert {{switch.fp32_precision for switch in matmuls}} <= {{"ieee", "none"}}  # nobody has asked for less
    if torch.cuda.is_available():
        assert {{cuda.conv.fp32_precision, cuda.rnn.fp32_precision}} <= {{"ieee", "none"}}
assert laplace_evidence(model, data).log_evidence == expected
assert precisions() == before
{after}
"""
"""A user's program. Torch's older and newer switches may not be mixed in one process."""


FORKS = """
import json, os, sys
import lightning_bayes

for program in json.loads(sys.argv[1]):
    if not os.fork():
        exec(program)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
"""Imports once, and gives each program a process of its own before anything has been computed."""

# What is set, and what the user's program does afterwards.
SETTINGS = [
    # What is set for everything afterwards must still reach the matrix products, unless they have their own.
    ("", "backends.fp32_precision = 'tf32'; assert [m.fp32_precision for m in matmuls] == ['tf32'] * 2"),
    (
        "backends.fp32_precision = cuda.fp32_precision = backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.fp32_precision = cuda.fp32_precision = 'ieee'; assert matmuls[0].fp32_precision == 'tf32'",
    ),
    (
        "onednn.matmul.fp32_precision = 'bf16'; cuda.fp32_precision = 'tf32'; cuda.conv.fp32_precision = 'none'",
        "",
    ),
    *[
        (
            f"torch.set_float32_matmul_precision('{precision}')",
            f"assert torch.get_float32_matmul_precision() == '{precision}'; backends.cuda.matmul.allow_tf32",
        )
        for precision in ("high", "medium")
    ],
]


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch has the older switches alone"
)
def test_precision_is_full_within_and_the_callers_own_after():
    programs = [PRECISION.format(setting=setting, after=after) for setting, after in SETTINGS]
    # Python 3.12 warns of forks beside threads; here these have nothing to do yet.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, json.dumps(programs)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="torch refuses where cuDNN is in use and its switches differ"
)
def test_models_may_turn_cudnn_off_for_themselves():
    with isolated(), torch.backends.cudnn.flags(enabled=False):
        assert not torch.backends.cudnn.enabled


def test_deterministic_mode_fills_memory_that_nothing_may_read():
    """Then `torch.empty` holds NaN, also in the half of the dual matrix that is never written."""
    case = make_case("mlp", "classification")
    expected = case.evidence().log_evidence
    torch.use_deterministic_algorithms(True)
    try:
        assert case.evidence().log_evidence == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_copy_is_in_eval_mode_and_without_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].weight.grad = torch.ones(2, 2)
    copied = throw_away_copy(model)
    assert not any(module.training for module in copied.modules())
    assert all(p.grad is None for p in copied.parameters())
    assert copied[0].weight is not model[0].weight


def test_a_copy_meets_tensors_with_a_graph():
    """A module that keeps its losses in a list cannot be deep-copied as it stands."""
    model = nn.Linear(2, 2)
    model.losses = [model(torch.ones(1, 2)).sum()]
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    copied = throw_away_copy(model)
    assert copied.losses[0] == model.losses[0]
    assert model.losses[0].grad_fn is not None


def test_a_copy_shares_what_it_is_told_to():
    model = nn.Linear(2, 2)
    model.trainer = object()
    assert throw_away_copy(model, shared=(model.trainer,)).trainer is model.trainer


def test_what_cannot_be_copied_is_named():
    model = nn.Linear(2, 2)
    model.stream = (i for i in range(3))
    with refuses("Linear holds something that copy.deepcopy cannot copy", remedy="generator"):
        throw_away_copy(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    case = make_case("batch_norm", "classification")
    model = case.model.to(dtype)
    half = laplace_evidence(model, (case.inputs.to(dtype), case.targets))
    single = laplace_evidence(model.float(), (case.inputs.to(dtype).float(), case.targets))
    assert half.log_evidence == single.log_evidence


def test_backward_hooks_belong_to_training():
    """Gradient loggers must not see the rows, and gradient editors must not change them."""
    case = make_case("mlp", "classification")
    expected = case.evidence().log_evidence
    calls = []

    def double(module, grad_inputs, grad_outputs):
        calls.append(module)
        return tuple(None if g is None else 2 * g for g in grad_inputs)

    case.model[2].register_full_backward_hook(double)
    case.model[2].register_full_backward_pre_hook(lambda module, grads: calls.append(module))
    assert case.evidence().log_evidence == expected
    assert not calls
    case.model(case.inputs).sum().backward()
    assert len(calls) == 2
