"""The examples of docs/contributing.md, run as they are printed, and held against what is known otherwise."""

import math
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.nn import functional as F

from lightning_bayes import laplace_evidence
from lightning_bayes.callbacks.measuring import MeasuringCallback, guarded
from lightning_bayes.likelihoods.base import DiagonalLikelihood
from lightning_bayes.rows.layers import DERIVATIVES
from lightning_bayes.structures.base import Curvature, CurvatureSummary
from lightning_bayes.structures.registry import STRUCTURES

PAGE = (Path(__file__).parent.parent / "docs" / "contributing.md").read_text(encoding="utf-8")


class Scale(nn.Module):
    """y = w ∘ x."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, inputs):
        return self.weight * inputs


@pytest.fixture
def example():
    """What the block under a heading defines."""

    def run(heading):
        names = {
            **{value.__name__: value for value in (Curvature, CurvatureSummary, DiagonalLikelihood)},
            **{value.__name__: value for value in (MeasuringCallback, Scale, guarded)},
            "DERIVATIVES": DERIVATIVES,
            "STRUCTURES": STRUCTURES,
            "math": math,
            "torch": torch,
        }
        section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
        exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
        return names

    yield run
    DERIVATIVES.pop(Scale, None)
    STRUCTURES.pop("scalar", None)


def problem(network, *, counts=False):
    torch.manual_seed(0)
    inputs = torch.randn(30, 4, dtype=torch.float64)
    targets = torch.poisson(torch.ones(30, 2)) if counts else torch.randint(3, (30,))
    return network.double(), inputs, targets


def test_a_likelihood(example):
    network, inputs, targets = problem(nn.Linear(4, 2, bias=False), counts=True)
    evidence = laplace_evidence(network, (inputs, targets), likelihood=example("A likelihood")["Poisson"]())

    def loss(weight):
        return F.poisson_nll_loss(inputs @ weight.mT, targets, log_input=True, reduction="sum")

    hessian = torch.autograd.functional.hessian(loss, network.weight.detach()).reshape(
        8, 8
    )  # of a linear model it is the GGN
    determinant = torch.logdet(torch.eye(8) + hessian).item()
    right = -loss(network.weight).item() - 0.5 * network.weight.square().sum().item() - 0.5 * determinant
    assert evidence.log_evidence == pytest.approx(right, rel=1e-9)


def test_a_layer(example):
    network, inputs, targets = problem(nn.Sequential(Scale(4), nn.Linear(4, 3)))
    replayed = laplace_evidence(network, (inputs, targets))
    assert example("A layer")["DERIVATIVES"][Scale] is DERIVATIVES[Scale]
    read = laplace_evidence(
        network, (inputs, targets), backend="backpack"
    )  # which refuses what it cannot read
    assert read.log_evidence == pytest.approx(replayed.log_evidence, rel=1e-10)


def test_a_structure(example):
    example("A structure")
    network, inputs, targets = problem(nn.Linear(4, 3))
    scalar = laplace_evidence(network, (inputs, targets), structure="scalar", prior_precision=2.0)
    jacobian = torch.func.jacrev(lambda w: F.linear(inputs, w, network.bias))(network.weight)
    probabilities = network(inputs).softmax(1)
    hessians = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    of_weight = torch.einsum("nkab,nkl,nlab->", jacobian, hessians, jacobian)
    trace = (of_weight + hessians.diagonal(dim1=1, dim2=2).sum()).item()
    assert scalar.log_occam_factor == pytest.approx(-0.5 * 15 * math.log1p(trace / 15 / 2.0), rel=1e-9)


def test_a_callback(example, tmp_path):
    callback = example("A callback")["WeightNorm"]()
    module = BoringModel()
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=0,
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(module)
    norm = math.sqrt(sum(weight.square().sum().item() for weight in module.parameters()))
    assert trainer.callback_metrics["bayes/weight_norm"].item() == pytest.approx(norm, rel=1e-5)
