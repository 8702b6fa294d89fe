"""The largest eigenvalue of any network's loss against dense matrices by autograd."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import EvidenceUnavailableError, largest_eigenvalue
from tests.cases import NETWORKS, make_case
from tests.curvature.dense import dense_matrix
from tests.refusals import refuses

NO_SECOND_DERIVATIVE = ("weight_norm",)
"""PyTorch's own is wrong, and this is seen: see below."""


def loss_of(case):
    return lambda f, y: F.cross_entropy(f.movedim(case.class_dim, 1), y)


def expected(case, loss, curvature):
    matrix = dense_matrix(case.model, case.inputs, case.targets, loss, curvature)
    return torch.linalg.eigvalsh(matrix)[-1].item()


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("network", [n for n in NETWORKS if n not in NO_SECOND_DERIVATIVE])
def test_every_network(network, curvature):
    case = make_case(network)
    loss = loss_of(case)
    found = largest_eigenvalue(
        case.model, (case.inputs, case.targets), loss, curvature=curvature, tolerance=1e-7
    )
    assert found.converged
    assert found.value == pytest.approx(expected(case, loss, curvature), rel=1e-8)
    assert found.num_parameters == sum(p.numel() for p in case.model.parameters())


LOSSES = {
    "binary_3": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
    "weighted": lambda f, y: F.cross_entropy(f, y, weight=torch.tensor([1.0, 2.0, 0.5, 3.0]).double()),
    "smoothed": lambda f, y: F.cross_entropy(f, y, label_smoothing=0.3),
}


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, curvature):
    case, loss = (
        make_case("mlp", name.replace("weighted", "classification").replace("smoothed", "classification")),
        LOSSES[name],
    )
    found = largest_eigenvalue(
        case.model, (case.inputs, case.targets), loss, curvature=curvature, tolerance=1e-7
    )
    assert found.value == pytest.approx(expected(case, loss, curvature), rel=1e-8)


def test_a_loss_that_is_no_likelihood():
    def loss(f, y):
        return F.huber_loss(f, y) + 0.1 * f.square().mean()

    case = make_case("residual", "regression", 12)
    found = largest_eigenvalue(case.model, (case.inputs, case.targets), loss, tolerance=1e-7, batch_size=12)
    assert found.value == pytest.approx(expected(case, loss, "hessian"), rel=1e-8)
    with refuses("no sum over examples"):
        largest_eigenvalue(
            case.model, (case.inputs, case.targets), lambda f, y: F.mse_loss(f, y).sqrt(), curvature="ggn"
        )


def test_batches_do_not_matter():
    case = make_case("conv", num_examples=10)
    data = TensorDataset(case.inputs, case.targets)
    whole = largest_eigenvalue(case.model, (case.inputs, case.targets), tolerance=1e-8)
    for loader in (
        DataLoader(data, batch_size=3, shuffle=True),
        DataLoader(data, batch_size=4, drop_last=True),
    ):
        parts = largest_eigenvalue(case.model, loader, tolerance=1e-8, batch_size=3)
        assert parts.value == pytest.approx(whole.value, rel=1e-9)
        assert parts.num_examples == 10


def test_one_line_for_people():
    case = make_case("linear")
    data = case.inputs, case.targets
    assert re.fullmatch(
        r"0\.\d+ ± \S+, largest eigenvalue of the Hessian of the mean loss in 24 parameters on 7 examples",
        str(largest_eigenvalue(case.model, data)),
    )
    assert "(NOT CONVERGED in 2 products), largest eigenvalue of the GGN" in str(
        largest_eigenvalue(case.model, data, curvature="ggn", max_products=2)
    )


def test_part_of_the_examples():
    case = make_case(num_examples=30)
    data = case.inputs, case.targets
    first, again = (largest_eigenvalue(case.model, data, max_examples=10) for _ in range(2))
    assert first == again and first.num_examples == 10
    assert first.value != largest_eigenvalue(case.model, data).value


def test_batch_norm_normalises_by_the_batch_in_training_mode_alone():
    case = make_case("batch_norm")
    data = case.inputs, case.targets
    trained = largest_eigenvalue(case.model, data, tolerance=1e-7)
    frozen = largest_eigenvalue(case.model.eval(), data, tolerance=1e-7)
    assert frozen.value == pytest.approx(expected(case, F.cross_entropy, "hessian"), rel=1e-8)
    assert trained.value != pytest.approx(frozen.value, rel=0.01)


def test_wrong_second_derivatives_are_seen():
    case = make_case("weight_norm")
    with refuses("not those of a symmetric matrix"):
        largest_eigenvalue(case.model, (case.inputs, case.targets))
    found = largest_eigenvalue(case.model, (case.inputs, case.targets), curvature="ggn", tolerance=1e-7)
    assert found.value == pytest.approx(expected(case, F.cross_entropy, "ggn"), rel=1e-8)


class SquaresOnce(torch.autograd.Function):
    """Mean square of the outputs, by a gradient that autograd takes for a constant."""

    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return f.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] / ctx.saved_tensors[0].numel() * grad


@pytest.mark.parametrize("loss", [SquaresOnce.apply, lambda f: SquaresOnce.apply(f) + 0.1 * f.pow(4).mean()])
def test_losses_without_a_second_derivative_are_refused(loss):
    """Nothing but the 1 that the backward pass starts from reaches their gradient."""
    case = make_case("mlp", "regression")
    with refuses("has no derivative (Error in its graph)"):
        largest_eigenvalue(case.model, (case.inputs, case.targets), lambda f, y: loss(f - y))


def test_a_loss_that_is_linear_in_the_weights_is_flat():
    case = make_case("linear", "regression")
    found = largest_eigenvalue(case.model, (case.inputs, case.targets), lambda f, y: f.mean())
    assert found.value == 0.0 and found.converged


def test_frozen_parameters_do_not_count():
    case = make_case("linear")
    case.model.bias.requires_grad_(False)
    found = largest_eigenvalue(case.model, (case.inputs, case.targets), tolerance=1e-8)
    matrix = dense_matrix(case.model, case.inputs, case.targets, F.cross_entropy, "hessian")
    size = case.model.weight.numel()
    assert found.value == pytest.approx(torch.linalg.eigvalsh(matrix[:size, :size])[-1].item(), rel=1e-9)
    assert found.num_parameters == size


def test_float32():
    case = make_case("mlp")
    value = expected(case, F.cross_entropy, "hessian")
    found = largest_eigenvalue(case.model.float(), (case.inputs.float(), case.targets))
    assert found.value == pytest.approx(value, rel=1e-4)


def test_the_model_is_left_alone():
    case = make_case("batch_norm")
    case.model(case.inputs).square().sum().backward()
    before = copy.deepcopy(case.model.state_dict())
    gradients = [parameter.grad.clone() for parameter in case.model.parameters()]
    state = torch.get_rng_state()
    largest_eigenvalue(case.model, (case.inputs, case.targets))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    after = [parameter.grad for parameter in case.model.parameters()]
    assert all(map(torch.equal, gradients, after))
    assert case.model.training and all(module.training for module in case.model.modules())


def test_infinite_weights():
    case = make_case("linear")
    case.model.weight.data[0, 0] = torch.nan
    with refuses("product with the Hessian are NaN", error=EvidenceUnavailableError):
        largest_eigenvalue(case.model, (case.inputs, case.targets))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "`model` to be a torch.nn.Module, got int"),
        ({"data": [1, 2, 3]}, "(inputs, targets)"),
        ({"data": 3}, ("`data`", "got int")),
        ({"loss": "mse"}, ("`loss` to be a function", "got 'mse'")),
        (
            {"loss": nn.CrossEntropyLoss(reduction="sum")},
            ("`loss` to be a mean", "got a sum", "reduction='mean'"),
        ),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "returned Tensor of shape [7]; a scalar"),
        ({"curvature": "fisher"}, "`curvature` to be 'hessian' or 'ggn', got 'fisher'"),
        ({"max_examples": 0}, ("`max_examples`", "got 0")),
        ({"batch_size": 1.5}, ("`batch_size`", "got 1.5")),
        ({"tolerance": 0}, ("`tolerance`", "got 0")),
        ({"max_products": 1}, "`max_products` to be at least 2, got 1"),
        ({"max_products": "ten"}, ("`max_products`", "got 'ten'")),
        ({"device": "abacus"}, ("`device`", "got 'abacus'")),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    case = make_case()
    arguments = {"model": case.model, "data": (case.inputs, case.targets)} | arguments
    with refuses(message):
        largest_eigenvalue(**arguments)
