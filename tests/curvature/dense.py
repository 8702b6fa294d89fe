"""Hessian and Gauss-Newton matrix of a mean loss, dense, by autograd in float64."""

import copy

import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def as_trained(model):
    """A copy without dropout, whose norms normalise as those of the model do."""
    network = copy.deepcopy(model).eval()
    for theirs, ours in zip(model.modules(), network.modules(), strict=True):
        if isinstance(theirs, NORMS):
            ours.train(theirs.training)
    return network


BATCHED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
"""Whether torch differentiates every layer in a batch: 2.4 does not know group norm."""


def dense_matrix(model, inputs, targets, loss, curvature):
    """[p, p] of loss(model(inputs), targets) in all parameters put end to end."""
    network = as_trained(model)
    named = {name: parameter.detach() for name, parameter in network.named_parameters()}
    flat = torch.cat([value.flatten() for value in named.values()])

    def outputs(vector):
        pieces = vector.split([value.numel() for value in named.values()])
        changed = {n: piece.view_as(named[n]) for n, piece in zip(named, pieces, strict=True)}
        return functional_call(network, changed, (inputs,))

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        if curvature == "hessian":
            return hessian(lambda vector: loss(outputs(vector), targets), flat, vectorize=BATCHED)
        slopes = jacobian(outputs, flat).flatten(0, -2)
        at = outputs(flat).detach()
        bent = hessian(lambda f: loss(f, targets), at).reshape(at.numel(), at.numel())
        return slopes.mT @ bent @ slopes
