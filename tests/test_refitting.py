"""What a search over refits leaves behind when it cannot end well."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_bayes import Gaussian, laplace_evidence, refit_prior_precision
from tests.refusals import refuses

X = torch.tensor([[1.0], [2.0], [-1.0], [0.5]], dtype=torch.float64)
NOISE = torch.tensor([[0.3], [-0.2], [0.1], [0.4]], dtype=torch.float64)


def model_at(weight: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(weight)
    return model


class Ridge:
    """The minimum in closed form for unit noise; the round of number `broken` changes the weights and raises."""

    def __init__(self, targets: torch.Tensor, broken: int = -1, error: type[BaseException] = RuntimeError):
        self.targets, self.broken, self.error = targets, broken, error
        self.weights: list[float] = []

    def __call__(self, model: nn.Module, precision: float) -> None:
        if len(self.weights) == self.broken:
            model.weight.data.fill_(1e3)
            raise self.error("out of memory")
        self.weights.append(((X * self.targets).sum() / (X.square().sum() + precision)).item())
        model.weight.data.fill_(self.weights[-1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("broken", range(5))
def test_a_refit_that_raises_leaves_the_best_round_so_far(broken, error):
    targets = 2 * X + NOISE
    model, refit = model_at(7.0), Ridge(targets, broken, error)
    with pytest.raises(error, match="out of memory"):
        refit_prior_precision(model, (X, targets), refit, start=30.0, likelihood=Gaussian(1.0))
    assert len(refit.weights) == broken
    if broken == 0:
        assert model.weight.item() == 7.0
        return

    def value(weight: float) -> float:
        precision = (X * targets).sum().item() / weight - X.square().sum().item()
        data = (X, targets)
        found = laplace_evidence(
            model_at(weight), data, likelihood=Gaussian(1.0), prior_precision=precision, structure="full"
        )
        return found.log_evidence

    assert model.weight.item() == max(refit.weights, key=value)


@pytest.mark.parametrize(
    ("sign", "way"),
    [
        (1.0, ("grows: ", "the largest has the most")),
        (-1.0, ("falls towards 0: ", "the smallest has the most")),
    ],
)
def test_evidence_without_a_maximum_says_which_end_it_rises_to(sign, way, monkeypatch):
    """By evidence made up for the purpose: ±ln λ."""
    targets = 2 * X + NOISE
    model, refit = model_at(7.0), Ridge(targets)

    def made_up(*args, prior_precision, **options):
        found = laplace_evidence(*args, prior_precision=prior_precision, **options)
        slope = 0.0 if prior_precision == "optimize" else sign * math.log(prior_precision)
        return replace(found, log_evidence=slope)

    monkeypatch.setattr("lightning_bayes.evidence.refit.laplace_evidence", made_up)
    with refuses(("rises as the prior precision ", *way)):
        refit_prior_precision(model, (X, targets), refit, likelihood=Gaussian(1.0))
    best = min(refit.weights) if sign > 0 else max(refit.weights)
    assert model.weight.item() == best


@pytest.mark.parametrize("refit", [None, 3, "train"])
def test_a_refit_that_is_no_function_is_refused(refit):
    with refuses("`refit` to be a function", got=refit, remedy="(model, prior_precision)"):
        refit_prior_precision(nn.Linear(1, 1), (X, X), refit)


@pytest.mark.parametrize("model", [nn.Linear, 3, None])
def test_a_model_that_is_no_module_is_refused(model):
    remedy = "give an instance" if model is nn.Linear else type(model).__name__
    with refuses("`model` to be a torch.nn.Module", remedy=remedy):
        refit_prior_precision(model, (X, X), lambda model, precision: None)
    with refuses("`model` to be a torch.nn.Module", remedy=remedy):
        laplace_evidence(model, (X, X), likelihood="regression")
