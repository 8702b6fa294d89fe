"""Training steps and networks that the evidence cannot be read from end before the first optimizer step."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.refusals import fit_refuses
from tests.scenarios import Module, cross_entropy, mlp


def call(function, **kwargs):
    return lambda module, batch: function(module(batch[0]), batch[1], **kwargs)


def one_hot(function):
    return lambda module, batch: function(module(batch[0]), F.one_hot(batch[1], 3).double())


DOUBLE = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
DIRECTLY = "LaplaceEvidence(likelihood=..., network=...) reads the network directly"

STEPS = {
    "called for show": (
        lambda m, b: (cross_entropy(m, b), m(b[0]).square().mean().sqrt())[1],
        "F.cross_entropy was called, but the loss does not depend on it",
        "it is no sum over examples",
        DIRECTLY,
    ),
    "negative weight": (
        call(F.cross_entropy, weight=-DOUBLE),
        "`weight` to be finite and at least 0, got -3",
    ),
    "regulariser": (
        lambda m, b: cross_entropy(m, b) + 1e-4 * sum(p.square().sum() for p in m.parameters()),
        "a further term is in the loss",
        "a parameter reaches it by a way that no example is on",
        "through the optimizer's weight_decay",
        DIRECTLY,
    ),
    "raw logits in nll_loss": (call(F.nll_loss), "F.nll_loss expects log-probabilities", "log_softmax"),
    "none returned": (lambda m, b: None, "training_step returned NoneType; a scalar loss", DIRECTLY),
    "no loss in the dict": (lambda m, b: {"nll": 1}, "training_step returned dict;", "'loss'", DIRECTLY),
    "not reduced": (
        call(F.cross_entropy, reduction="none"),
        "training_step returned Tensor of shape [8]",
        DIRECTLY,
    ),
    "broadcast variance": (
        lambda m, b: F.gaussian_nll_loss(m(b[0])[:, :1], b[0][:, 0], m(b[0])[:, 1:2].exp()),
        "F.gaussian_nll_loss with outputs [8, 1] and targets [8]: PyTorch broadcasts",
    ),
    "detached": (
        lambda m, b: F.cross_entropy(m(b[0]).detach().requires_grad_(), b[1]),
        "carry no graph back to a parameter of Module: they were detached",
        DIRECTLY,
    ),
    "sets something on the Trainer": (
        lambda m, b: setattr(m.trainer, "memory", b) or cross_entropy(m, b),
        "training_step sets trainer.memory;",
        "in another hook, such as on_train_batch_end",
        DIRECTLY,
    ),
}


@pytest.mark.situation("Losses and steps that have no evidence")
@pytest.mark.parametrize("name", STEPS)
def test_steps_that_cannot_be_read(tmp_path, name):
    step, subject, *remedy = STEPS[name]
    fit_refuses(tmp_path, Module(mlp(), step), subject, remedy=remedy)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(x)
        return x - x.mean(0)


def test_a_network_that_mixes_examples(tmp_path):
    subject, remedy = (
        "rows of ['network.layer.weight'",
        "cannot be formed: the network mixes the examples of a batch",
    )
    fit_refuses(tmp_path, Module(Mixing(), cross_entropy), subject, remedy=remedy)
