"""Nothing of the evidence is left behind in somebody's model or random streams."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes.curvature.isolation import isolated, throw_away_copy
from lightning_bayes.laplace import laplace_evidence
from tests.cases import NETWORKS, make_case


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
    with pytest.raises(ValueError, match="outputs are NaN"):
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


def test_matrix_products_are_in_full_precision_within():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with isolated():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


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
    with pytest.raises(ValueError, match=r"Linear holds something that copy.deepcopy cannot copy.*generator"):
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
