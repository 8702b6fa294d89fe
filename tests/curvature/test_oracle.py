"""Every structure on every kind of network and loss, against dense float64 matrices.

The reference knows nothing of layers, batches or square roots: see `tests.reference`.
"""

from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch

from lightning_bayes import likelihoods
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.primal import PrimalCurvature
from lightning_bayes.structures.registry import STRUCTURES
from tests.cases import CASES, LOSSES, NETWORKS, made_twin, make_case
from tests.reference import assert_agrees
from tests.refusals import refuses

WAYS = ["primal", "dual", "kron", "kron_joint", "kron_expand", "diag"]
"""Structures, the exact one by either side of Sylvester's identity."""

SIDES = {"primal": PrimalCurvature, "dual": DualCurvature}

HARD = ["conv", "batch_norm", "shared_weight", "called_twice", "lstm", "attention", "tied", "bare_parameter"]
"""Networks for what need not be tried on all."""


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The name for the reference; the engine's "full" then takes the side in question."""
    if request.param not in SIDES:
        return request.param
    monkeypatch.setitem(STRUCTURES, "full", SIDES[request.param])
    return "full"


def hold(evidence, network, loss, precision, structure, curvature="ggn"):
    """Against the dense matrices."""
    twin = made_twin(network, loss)
    if not isinstance(precision, dict):
        precision = dict.fromkeys(twin.names, precision)
    assert_agrees(evidence, twin.evidence(precision, structure, curvature))


def test_there_is_no_network_or_loss_without_a_case():
    assert {network for network, _ in CASES} == set(NETWORKS)
    assert {loss for _, loss in CASES} == set(LOSSES)


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_every_field_agrees_with_the_dense_matrix(network, loss, way):
    evidence = make_case(network, loss).evidence(structure=way, prior_precision=0.3)
    hold(evidence, network, loss, 0.3, way)
    if way == "full":
        assert evidence.lower == evidence.upper == evidence.log_evidence
        assert evidence.effective_parameters_stderr == 0.0


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
@pytest.mark.parametrize(
    "network",
    ["batch_norm", "called_twice", "lstm", "embedding", "attention_seq_first", "flattened_time_first"],
)
def test_any_batch_size(network, batch_size):
    """Of one example, and of as many examples as there are steps, features or channels."""
    case = make_case(network)
    for structure in ("full", "kron", "diag"):
        evidence = case.evidence(structure=structure, prior_precision=0.3, batch_size=batch_size)
        hold(evidence, network, "classification", 0.3, structure)


@pytest.mark.parametrize("precision", [1e-3, 1e2])
@pytest.mark.parametrize("network", HARD)
def test_broad_and_narrow_priors(network, precision, way):
    evidence = make_case(network).evidence(structure=way, prior_precision=precision)
    hold(evidence, network, "classification", precision, way)


@pytest.mark.parametrize("network", HARD)
def test_a_precision_for_each_tensor(network, way):
    case = make_case(network)
    precision = {name: 10.0 ** (i % 5 - 3) for i, name in enumerate(case.names)}
    evidence = case.evidence(structure=way, prior_precision=precision)
    hold(evidence, network, "classification", precision, way)


@pytest.mark.parametrize("network", HARD)
@pytest.mark.parametrize("first", [0, 1])
def test_every_second_tensor_held_fixed(network, first, way):
    """Weights without their biases, biases without their weights, half an attention."""
    case = make_case(network)
    precision = dict.fromkeys(case.names[first::2], 0.7)
    patterns = dict.fromkeys(case.names, 0.0) | precision
    evidence = case.evidence(structure=way, prior_precision=patterns)
    hold(evidence, network, "classification", precision, way)
    assert set(evidence.fixed_parameters) == set(case.names) - set(precision)


@pytest.mark.parametrize("network", ["sequence_output", "language_model"])
@pytest.mark.parametrize("loss", ["classification", "ignored_weighted_smoothed"])
def test_classes_in_the_last_dimension_are_recognised_beside_indices(network, loss):
    """[N, 3, 4] beside [N, 3] can mean nothing else."""
    case = make_case(network, loss)
    evidence = case.evidence(likelihood=case.loss.likelihood(), prior_precision=0.3, structure="full")
    hold(evidence, network, loss, 0.3, "full")


@pytest.mark.parametrize("class_dim", [1, -1])
def test_where_either_dimension_could_hold_the_classes_the_user_says_which(class_dim):
    """[N, 4, 4] beside [N, 4]."""
    case = make_case("sequence_output")
    inputs, targets = torch.randn(7, 4, 4, dtype=torch.float64), torch.randint(4, (7, 4))
    case = replace(case, inputs=inputs, targets=targets, class_dim=class_dim)
    likelihood = likelihoods.Categorical(class_dim=class_dim)
    evidence = case.evidence(likelihood=likelihood, structure="full", prior_precision=0.3)
    assert_agrees(evidence, case.reference(0.3))
    with refuses("class_dim"):
        case.evidence(likelihood="classification")


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("network", HARD)
def test_per_example_jacobians_alone(network, structure):
    """Without a table of layers, the same numbers."""
    case = make_case(network)
    evidence = case.evidence(structure=structure, prior_precision=0.3, backend="autograd")
    hold(evidence, network, "classification", 0.3, structure)


@pytest.mark.parametrize("subset", ["last_layer", ["head.*"], ["*.weight", "*.bias"]], ids=str)
@pytest.mark.parametrize("network", ["conv", "called_twice", "lstm", "attention", "bare_parameter"])
def test_parts_of_a_network(network, subset, way):
    """The rest is held fixed."""
    case = make_case(network)
    evidence = case.evidence(structure=way, prior_precision=0.3, subset_of_weights=subset)
    patterns = ["head.*"] if subset == "last_layer" else subset
    chosen = [name for name in case.names if any(fnmatch(name, pattern) for pattern in patterns)]
    hold(evidence, network, "classification", dict.fromkeys(chosen, 0.3), way)
    assert set(evidence.fixed_parameters) == set(case.names) - set(chosen)


@pytest.mark.parametrize("tolerance", [0.05, 5.0])
@pytest.mark.parametrize("loss", ["classification", "gaussian_nll"])
@pytest.mark.parametrize("network", HARD)
def test_a_bracket_holds_the_truth(network, loss, tolerance):
    case = make_case(network, loss)
    evidence = case.evidence(structure="full", prior_precision=0.05, tolerance=tolerance)
    twin = made_twin(network, loss)
    truth = twin.evidence(dict.fromkeys(twin.names, 0.05)).log_evidence
    assert evidence.lower - 1e-9 <= truth <= evidence.upper + 1e-9
    assert evidence.lower <= evidence.log_evidence <= evidence.upper
    assert evidence.upper - evidence.lower <= tolerance


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "gaussian_nll"])
def test_hessian_of_a_linear_model(loss):
    """It is the generalized Gauss-Newton matrix, where the loss is convex in the outputs."""
    case = make_case("linear", loss)
    evidence = case.evidence(structure="full", curvature="hessian", prior_precision=0.3)
    hold(evidence, "linear", loss, 0.3, "full", "hessian")
    hold(evidence, "linear", loss, 0.3, "full", "ggn")


@pytest.mark.parametrize("network", ["mlp", "conv", "layer_norm", "tied", "bare_parameter"])
@pytest.mark.parametrize("loss", ["weighted_smoothed", "regression", "gaussian_nll"])
def test_hessian_where_the_prior_makes_it_positive_definite(network, loss):
    """A Hessian has directions that curve down; λ = 300 outweighs them."""
    case = make_case(network, loss)
    evidence = case.evidence(structure="full", curvature="hessian", prior_precision=300.0)
    hold(evidence, network, loss, 300.0, "full", "hessian")
