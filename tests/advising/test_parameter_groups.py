"""Optimizers of somebody's own: what cannot be read is a ValueError with a way out, and nothing else."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_bayes.advice.optimizer_groups import groups_of, optimizer_notes, scheduled_learning_rate
from tests.refusals import refuses

PARAMETERS = [nn.Parameter(torch.zeros(2))]


class Own(torch.optim.Optimizer):
    def __init__(self, **defaults):
        super().__init__(PARAMETERS, defaults)

    def step(self, closure=None):
        pass


UNREADABLE = {
    "no lr": Own(),
    "lr of several elements": Own(lr=torch.ones(3)),
    "lr a function": Own(lr=lambda step: 0.1),
    "lr None": Own(lr=None),
    "lr text": Own(lr="fast"),
    "lr NaN": Own(lr=float("nan")),
    "lr on no device": Own(lr=torch.empty((), device="meta")),
    "lr below 0": Own(lr=-0.1),
    "momentum a list": Own(lr=0.1, momentum=[0.9, 0.8]),
    "momentum None": Own(lr=0.1, momentum=None),
    "momentum 1": Own(lr=0.1, momentum=1.0),
    "betas a number": Own(lr=0.1, betas=0.9),
    "betas None": Own(lr=0.1, betas=None),
    "betas of text": Own(lr=0.1, betas=("a", "b")),
    "eps None": Own(lr=0.1, betas=(0.9, 0.99), eps=None),
    "LBFGS": torch.optim.LBFGS(PARAMETERS),
    "Rprop": torch.optim.Rprop(PARAMETERS),
    "no groups": SimpleNamespace(),
    "groups None": SimpleNamespace(param_groups=None),
    "groups no dicts": SimpleNamespace(param_groups=[PARAMETERS]),
}
READABLE = {
    "lr a tensor": torch.optim.Adam(PARAMETERS, lr=torch.tensor(0.1), foreach=False),
    "betas a list of tensors": Own(lr=0.1, betas=[torch.tensor(0.9), torch.tensor(0.99)]),
    "a numbered name": Own(lr=0.1, name=3),
    "without momentum": Own(lr=0.1),
}


def read(optimizer, scheduled=False):
    groups = groups_of("Own", optimizer, 8, 100, lambda group: float(group["lr"]), scheduled=scheduled)
    optimizer_notes(optimizer)
    return groups


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_says_so(name, scheduled):
    with refuses("Remove the callback"):
        read(UNREADABLE[name], scheduled)


@pytest.mark.parametrize("name", READABLE)
def test_what_can_be_read(name):
    (group,) = read(READABLE[name])
    assert group.configuration.learning_rate == pytest.approx(0.1)


def test_no_groups_are_none():
    assert read(SimpleNamespace(param_groups=[])) == []
    assert scheduled_learning_rate({"lr": torch.tensor(0.1), "max_lr": None}) == pytest.approx(0.1)
