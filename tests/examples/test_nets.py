"""Nets of (a), (b) and (c): they settle, stop where they should, and their curvature is autograd's."""

import math

import pytest
import torch
from torch.nn import functional as F

from examples.smith_le_2018.data import load_digits, pixels, training_set
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.model import network
from examples.smith_le_2018.settled import NetSettings, decrement_bound, measure, settle
from examples.smith_le_2018.sharpness import hessian_trace, train_to_loss
from lightning_bayes import laplace_evidence
from tests.examples.digits import made_digits


def small(seed=0):
    """A Linear-ReLU-Linear net of 6 inputs, 5 hidden units and 3 classes, in float64, with data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
        return net, torch.randn(12, 6).double(), torch.randint(3, (12,))


def flat_cost(net, inputs, labels):
    """The mean loss as a function of all weights in one vector."""
    parameters = dict(net.named_parameters())

    def cost(flat):
        parts = flat.split([part.numel() for part in parameters.values()])
        shaped = {
            name: part.reshape(parameters[name].shape) for name, part in zip(parameters, parts, strict=True)
        }
        return F.cross_entropy(torch.func.functional_call(net, shaped, (inputs,)), labels)

    return cost, torch.nn.utils.parameters_to_vector(parameters.values()).detach()


def test_the_trace_is_that_of_the_dense_hessian():
    net, inputs, labels = small()
    cost, point = flat_cost(net, inputs, labels)
    assert hessian_trace(net, inputs) == pytest.approx(
        torch.autograd.functional.hessian(cost, point).trace().item(), rel=1e-10
    )


def test_the_bound_is_above_the_newton_decrement_and_settling_ends_at_a_minimum():
    net, inputs, labels = small()
    net[1] = torch.nn.Tanh()  # a minimum at a kink of the ReLU has no small gradient
    evidence = laplace_evidence(net, (inputs, labels), structure="full", prior_precision=0.5)
    assert evidence.newton_decrement <= decrement_bound(net, inputs, labels, 0.5)
    settle(net, inputs, labels, 0.5)
    settled = laplace_evidence(net, (inputs, labels), structure="full", prior_precision=0.5)
    assert settled.newton_decrement <= decrement_bound(net, inputs, labels, 0.5) < 1e-6
    assert settled.log_likelihood - settled.weight_penalty > evidence.log_likelihood - evidence.weight_penalty


def test_training_ends_at_the_loss_that_was_asked_for():
    digits = made_digits()
    images, labels = training_set(digits, 32, 0)
    net = network(0, hidden=64).double()
    run = Run(32, 8, 0.01, 0.9, 0.0, steps=2000, seed=0)
    train_to_loss(net, pixels(images, torch.float64), labels, run, 0.5)
    loss = F.cross_entropy(net(pixels(images, torch.float64)), labels).item()
    assert loss == pytest.approx(0.5, rel=1e-6)


def test_a_loss_out_of_reach_is_said():
    digits = made_digits()
    images, labels = training_set(digits, 32, 0)
    run = Run(32, 8, 0.1, 0.9, 0.0, steps=10, seed=0)
    with pytest.raises(ValueError, match=r"training loss of 1e-06 within 10 steps at B = 8"):
        train_to_loss(network(0, hidden=20), pixels(images), labels, run, 1e-6)


@pytest.mark.slow
def test_a_net_memorises_random_labels_and_its_exact_evidence_says_so():
    true, random = (
        measure(load_digits(), NetSettings(150, 200, labels, 0.1, 0)) for labels in ("true", "random")
    )
    assert true.train_accuracy == random.train_accuracy == 1.0
    assert true.test_accuracy > 0.6 and random.test_accuracy < 0.15
    assert random.log_evidence_ratio < 0 < true.log_evidence_ratio
    for found in (true, random):
        assert found.newton_decrement < 3
        assert found.diag_log_evidence_ratio < found.log_evidence_ratio
        assert math.isfinite(found.kron_log_evidence_ratio)
