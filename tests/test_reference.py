"""The slow twin itself, by other roads to the same numbers."""

import copy
import math

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, DiagGGNExact
from torch import nn
from torch.distributions import Categorical, Normal
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from tests.cases import CASES, LOSSES, make_case
from tests.losses import CLASS_WEIGHTS
from tests.reference import per_example_jacobians
from tests.reference_kronecker import patches

CONVEX = [loss for loss in LOSSES if loss != "gaussian_nll"]


def ggn_of(case, structure="full", **changed):
    return case.slow_twin().structured(structure, dict.fromkeys(case.names, 0.3) | changed)


@pytest.mark.parametrize("network", ["mlp", "conv", "batch_norm", "layer_norm", "tied", "bare_parameter"])
def test_jacobians_are_those_of_torch_func(network):
    case = make_case(network)
    jacobians, outputs = per_example_jacobians(case.model, case.inputs, case.names)
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}
    parts = jacrev(lambda chosen: functional_call(case.model, chosen, (case.inputs,)))(parameters)
    found = torch.cat([parts[name].reshape(*outputs.shape, -1) for name in case.names], dim=2)
    torch.testing.assert_close(torch.stack(jacobians), found)
    torch.testing.assert_close(outputs, case.model(case.inputs))


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_the_loss_of_all_examples_at_once_is_the_sum(network, loss):
    """Examples do not see each other, and PyTorch's loss of the batch is what the users have."""
    case = make_case(network, loss)
    twin = case.slow_twin()
    together = twin.density.nll(case.model(case.inputs), case.targets).item()
    assert together == pytest.approx(twin.loss.item(), rel=1e-12)


def test_weighted_smoothed_cross_entropy_by_its_formula():
    """−Σ_c w_c q_c ln p_c with q = (1 − s) onehot(y) + s/C, ignored examples apart."""
    case = make_case("linear", "ignored_weighted_smoothed")
    total = 0.0
    for x, y in zip(case.inputs, case.targets, strict=True):
        if y != -100:
            q = 0.9 * F.one_hot(y, 4).double() + 0.1 / 4
            total -= (CLASS_WEIGHTS * q * Categorical(logits=case.model(x)).logits).sum().item()
    assert case.slow_twin().loss.item() == pytest.approx(total, rel=1e-13)


def test_the_null_model_counts_the_weights():
    """Σ_n w(yₙ) ln C: with weights, guessing costs what they say."""
    case = make_case("linear", "weighted")
    found = case.reference(1.0)
    weights = CLASS_WEIGHTS[case.targets].sum().item()
    assert found.log_evidence_ratio - found.log_evidence == pytest.approx(weights * math.log(4), rel=1e-12)


def test_predicted_variances_by_their_formulas():
    """ln N(y; m, v), every constant included, and its Fisher information diag(1/v, 1/(2v²))."""
    case = make_case("mlp", "gaussian_nll")
    mean, variance = case.model.eval()(case.inputs).detach().chunk(2, dim=1)
    log_likelihood = Normal(mean, variance.sqrt()).log_prob(case.targets).sum().item()
    assert case.reference(1.0).log_likelihood == pytest.approx(log_likelihood, rel=1e-13)
    found = case.slow_twin().output_hessians
    expected = torch.diag_embed(torch.cat([1 / variance, 0.5 / variance.square()], dim=1))
    torch.testing.assert_close(torch.stack(found), expected)


@pytest.mark.parametrize("loss", CONVEX)
def test_hessian_and_gauss_newton_agree_where_outputs_are_linear(loss):
    twin = make_case("linear", loss).slow_twin()
    torch.testing.assert_close(twin.hessian, twin.ggn)


@pytest.mark.parametrize(("network", "loss"), [("mlp", "weighted_smoothed"), ("conv", "gaussian_nll")])
def test_hessian_is_that_of_torch_func(network, loss):
    case = make_case(network, loss)
    twin = case.slow_twin()
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}

    def cost(chosen):
        return twin.density.nll(functional_call(case.model, chosen, (case.inputs,)), case.targets)

    parts = jacrev(jacrev(cost))(parameters)
    rows = [
        torch.cat([parts[a][b].reshape(parameters[a].numel(), -1) for b in case.names], dim=1)
        for a in case.names
    ]
    torch.testing.assert_close(twin.hessian, torch.cat(rows))
    values = twin.whitened_hessian_eigenvalues(dict.fromkeys(case.names, 0.1))
    torch.testing.assert_close(values, 1 + torch.linalg.eigvalsh(twin.hessian) / 0.1)
    assert values[0] < 0 < values[-1]  # it does curve down somewhere


@pytest.mark.parametrize(("network", "loss"), [("mlp", "weighted_smoothed"), ("pixels", "binary_3")])
def test_log_determinant_by_the_other_side(network, loss):
    """Sylvester: ln det(I + G/λ) = ln det(I + VVᵀ/λ), V from symmetric roots of the output Hessians."""
    twin, rows = make_case(network, loss).slow_twin(), []
    for jacobian, hessian in zip(twin.jacobians, twin.output_hessians, strict=True):
        values, vectors = torch.linalg.eigh(hessian)
        rows.append((vectors * values.clamp(min=0).sqrt()).mT @ jacobian)
    gram = torch.cat(rows) @ torch.cat(rows).mT
    log_det = torch.linalg.eigvalsh(gram / 0.3).clamp(min=0).log1p().sum().item()
    assert -2 * twin.evidence(dict.fromkeys(twin.names, 0.3)).log_occam_factor == pytest.approx(
        log_det, rel=1e-10
    )


def second_order(case, extension):
    """BackPACK's own, by its module-by-module backward pass."""
    losses = {"classification": nn.CrossEntropyLoss, "regression_given_noise": nn.MSELoss}
    loss = extend(losses[next(k for k in losses if LOSSES[k] is case.loss)](reduction="sum"))
    model = extend(copy.deepcopy(case.model).eval())
    with backpack(extension):
        loss(model(case.inputs), case.targets).backward()
    return model


# The second-order extensions hook the first layer, whose input needs no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("network", ["mlp", "conv_net"])
@pytest.mark.parametrize("loss", ["classification", "regression_given_noise"])
def test_kronecker_factors_and_diagonal_of_backpack(network, loss):
    case = make_case("mlp", loss)
    if network == "conv_net":
        model = nn.Sequential(
            nn.Conv2d(2, 3, 2, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(27, case.loss.num_outputs),
        )
        object.__setattr__(case, "model", model.double())
        object.__setattr__(case, "inputs", torch.randn(7, 2, 4, 4).double())
    scale = 1.0 if loss == "classification" else 2 * 0.3**2  # the summed squared error is 2σ² times the nll
    blocks, diagonals = [], []
    for parameter in second_order(case, KFLR()).parameters():
        factors = parameter.kflr
        blocks.append(factors[0] if len(factors) == 1 else torch.kron(*factors))
    for parameter in second_order(case, DiagGGNExact()).parameters():
        diagonals.append(parameter.diag_ggn_exact.flatten())
    torch.testing.assert_close(scale * ggn_of(case, "kron"), torch.block_diag(*blocks))
    torch.testing.assert_close(scale * ggn_of(case, "diag"), torch.diag(torch.cat(diagonals)))


@pytest.mark.parametrize("joint", ["kron", "kron_joint"])
def test_one_example_makes_the_factors_of_a_linear_layer_exact(joint):
    case = make_case("linear", "binary", num_examples=1)
    exact, found = ggn_of(case), ggn_of(case, joint)
    if joint == "kron":
        exact[-1, :-1] = exact[:-1, -1] = 0.0  # weight and bias apart
    torch.testing.assert_close(found, exact)


def test_joint_blocks_need_one_layer_of_any_precisions():
    case = make_case("shared_weight")
    separate, joint = ggn_of(case, "kron"), ggn_of(case, "kron_joint")
    head = slice(-4 * 6, None)  # four outputs of five inputs and a bias
    assert not torch.allclose(separate[head, head], joint[head, head])
    assert torch.equal(separate[: -4 * 6], joint[: -4 * 6])  # two layers, one weight: no single bias to join
    apart = ggn_of(case, "kron_joint", **{"head.bias": 0.1})
    torch.testing.assert_close(apart, joint, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("network", "is_kronecker"),
    [
        ("shared_weight", {"one.weight", "head.weight"}),
        ("called_twice", {"step.weight", "head.weight"}),
        ("flattened_time_first", {"inner.weight", "head.weight"}),
        ("conv3d", {"0.weight", "4.weight"}),
        ("conv", {"first.weight", "head.weight"}),
        ("tied", {"inner.weight"}),
        ("functional_reuse", {"head.weight"}),
        ("mixed_positions", {"inner.weight", "head.weight"}),
        ("broadcast", {"head.weight"}),
        ("language_model", {"inner.weight"}),
        ("attention", {"encoder.linear1.weight", "encoder.linear2.weight", "head.weight"}),
        ("custom_layer", {"2.weight"}),
        ("weight_norm", {"2.weight"}),
        ("lstm", {"head.weight"}),
        ("channels_first", {"0.weight", "2.weight"}),
    ],
)
def test_which_tensors_have_factors(network, is_kronecker):
    """Only weights that layer calls account for; every other block is the exact one."""
    case = make_case(network)
    exact, found, start = ggn_of(case), ggn_of(case, "kron"), 0
    differing = set()
    for name, parameter in case.model.named_parameters():
        place = slice(start, start + parameter.numel())
        start = place.stop
        if not torch.equal(exact[place, place], found[place, place]):
            differing.add(name)
    assert differing == is_kronecker


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 3, 2, stride=2, padding=1, dilation=2),
        nn.Conv2d(2, 3, (1, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"),
        nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1, padding_mode="circular"),
    ],
)
def test_patches_times_the_weight_are_the_convolution(layer):
    image = torch.randn(1, 2, *(6, 5, 4)[: len(layer.kernel_size)], dtype=torch.float64)
    layer = layer.double()
    product = patches(layer, image) @ layer.weight.flatten(1).mT + layer.bias
    torch.testing.assert_close(product.mT, layer(image).squeeze(0).flatten(1))
