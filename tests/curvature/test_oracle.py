"""Every structure on every kind of network and loss, against dense float64 matrices.

The reference knows nothing of layers, batches or square roots: see `tests.reference`.
"""

import functools

import pytest

from lightning_bayes.curvature.full import DualCurvature, PrimalCurvature
from lightning_bayes.curvature.structures import STRUCTURES
from lightning_bayes.evidence import Evidence
from tests.cases import CASES, LOSSES, NETWORKS, Case, make_case
from tests.reference import assert_agrees

WAYS = ["primal", "dual", "kron", "kron_joint", "diag"]
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


@functools.cache
def reference(network, loss, structure, precision):
    return make_case(network, loss).reference(precision, structure)


def hold(case: Case, structure: str, precision: dict[str, float]) -> Evidence:
    """Against the reference, with λ = 0 for the parameters that `precision` leaves out."""
    patterns = {name: precision.get(name, 0.0) for name in case.names}
    evidence = case.evidence(structure=structure, prior_precision=patterns)
    assert_agrees(evidence, case.reference(precision, structure))
    return evidence


def test_there_is_no_network_or_loss_without_a_case():
    assert {network for network, _ in CASES} == set(NETWORKS)
    assert {loss for _, loss in CASES} == set(LOSSES)


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_every_field_agrees_with_the_dense_matrix(network, loss, way):
    evidence = make_case(network, loss).evidence(structure=way, prior_precision=0.3)
    assert_agrees(evidence, reference(network, loss, way, 0.3))
    if way == "full":
        assert evidence.lower == evidence.upper == evidence.log_evidence
        assert evidence.effective_parameters_stderr == 0.0


@pytest.mark.parametrize("precision", [1e-3, 1e2])
@pytest.mark.parametrize("network", HARD)
def test_broad_and_narrow_priors(network, precision, way):
    evidence = make_case(network).evidence(structure=way, prior_precision=precision)
    assert_agrees(evidence, reference(network, "classification", way, precision))


@pytest.mark.parametrize("network", HARD)
def test_a_precision_for_each_tensor(network, way):
    case = make_case(network, "weighted_smoothed")
    hold(case, way, {name: 10.0 ** (i % 5 - 3) for i, name in enumerate(case.names)})


@pytest.mark.parametrize("network", HARD)
@pytest.mark.parametrize("first", [0, 1])
def test_every_second_tensor_held_fixed(network, first, way):
    """Weights without their biases, biases without their weights, half an attention."""
    case = make_case(network, "weighted")
    chosen = case.names[first::2]
    evidence = hold(case, way, dict.fromkeys(chosen, 0.7))
    assert set(evidence.fixed_parameters) == set(case.names) - set(chosen)


@pytest.mark.parametrize("network", ["sequence_output", "language_model"])
@pytest.mark.parametrize("loss", ["classification", "ignored_weighted_smoothed"])
def test_classes_in_the_last_dimension_are_recognised_beside_indices(network, loss):
    """[N, 3, 4] beside [N, 3] can mean nothing else."""
    case = make_case(network, loss)
    evidence = case.evidence(likelihood=case.loss.likelihood(), prior_precision=0.3, structure="full")
    assert_agrees(evidence, reference(network, loss, "full", 0.3))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "gaussian_nll"])
def test_hessian_of_a_linear_model(loss):
    """It is the generalized Gauss-Newton matrix, where the loss is convex in the outputs."""
    case = make_case("linear", loss)
    evidence = case.evidence(structure="full", curvature="hessian", prior_precision=0.3)
    assert_agrees(evidence, case.reference(0.3, curvature="hessian"))
    assert_agrees(evidence, reference("linear", loss, "full", 0.3))


@pytest.mark.parametrize("network", ["mlp", "conv", "layer_norm", "tied", "bare_parameter"])
@pytest.mark.parametrize("loss", ["weighted_smoothed", "regression", "gaussian_nll"])
def test_hessian_where_the_prior_makes_it_positive_definite(network, loss):
    """A Hessian has directions that curve down; λ = 300 outweighs them."""
    case = make_case(network, loss)
    evidence = case.evidence(structure="full", curvature="hessian", prior_precision=300.0)
    assert_agrees(evidence, case.reference(300.0, curvature="hessian"))
