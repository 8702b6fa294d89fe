"""Models with their losses and data: what the evidence engine is held against its slow twin on.

Everything is float64 and seeded.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation, laplace_evidence
from lightning_bayes.evidence.options import Method
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.structures.base import Budget
from tests.losses import LOSSES, Loss
from tests.networks import NETWORKS, VOCABULARY
from tests.reference import Reference, SlowTwin

__all__ = ["CASES", "LOSSES", "NETWORKS", "Case", "evidence_within", "made_twin", "make_case", "use_budget"]

_SEVERAL_OUTPUTS = ["sequence_output", "channels_first", "pixels", "language_model"]
_OF_CLASSES = ["class_probabilities", "smoothed", "ignored", "ignored_weighted_smoothed"]

CASES: list[tuple[str, str]] = [
    *((network, "classification") for network in NETWORKS),
    *(("mlp", loss) for loss in LOSSES if loss != "classification"),
    *((network, "binary_3") for network in ("conv", "batch_norm", "residual", "attention", "lstm")),
    *(
        (network, "regression")
        for network in ("layer_norm", "bare_parameter", "called_twice", "shared_weight")
    ),
    *((network, "weighted_smoothed") for network in ("convnext_block", "embedding", "tied", "flattened")),
    *((network, "gaussian_nll") for network in ("resnet_block", "gru")),
    *((network, loss) for network in _SEVERAL_OUTPUTS for loss in _OF_CLASSES),
    *((network, loss) for network in ("sequence_output", "pixels") for loss in ("binary", "regression")),
]
"""Every network, every loss, and where they meet in ways of their own."""


def evidence_within(budget: Budget, model: nn.Module, data: Any, **arguments: Any) -> Evidence:
    """Return what `laplace_evidence` does with another budget."""
    return Computation(**arguments, budget=budget).run(model, data, evidence_of)


def use_budget(monkeypatch: pytest.MonkeyPatch, budget: Budget) -> None:
    """Give every `LaplaceEvidence` that is made from now on another budget."""
    with_budget = partial(Method, budget=budget)
    monkeypatch.setattr("lightning_bayes.callbacks.laplace_evidence.Method", with_budget)


@dataclass(frozen=True)
class Case:
    """One model with its data, ready to be asked for its evidence."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Loss
    class_dim: int = 1
    made_by: tuple[str, str, int] | None = None

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [name for name, _ in self.model.named_parameters()]

    def evidence(self, budget: Budget | None = None, **arguments: Any) -> Evidence:
        """The engine's answer, from batches of three: several, and the last one incomplete."""
        arguments = {"likelihood": self.loss.likelihood(self.class_dim), "batch_size": 3} | arguments
        data = self.inputs, self.targets
        if budget is None:
            return laplace_evidence(self.model, data, **arguments)
        return evidence_within(budget, self.model, data, **arguments)

    def reference(
        self, precision: float | dict[str, float], structure: str = "full", curvature: str = "ggn"
    ) -> Reference:
        """The literal answer."""
        if not isinstance(precision, dict):
            precision = dict.fromkeys(self.names, precision)
        return self.slow_twin().evidence(precision, structure, curvature)

    def slow_twin(self) -> SlowTwin:
        """The one of all cases that are made alike; one of its own where the test has changed something."""
        if self.made_by is not None and self._is(original := made_twin(*self.made_by)):
            self.model.eval()  # as by a twin of its own
            return original
        density = self.loss.density(self.class_dim)
        return SlowTwin(self.model, self.inputs, self.targets, density, self.loss.sigma)

    def _is(self, twin: SlowTwin) -> bool:
        """Whether a twin has the same weights, buffers, data and trainable parameters."""
        assert self.made_by is not None
        mine, its = self.model.state_dict(), twin.model.state_dict()
        trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return (
            self.loss is LOSSES[self.made_by[1]]
            and mine.keys() == its.keys()
            and trainable == twin.names
            and str(self.model) == str(twin.model)
            and all(torch.equal(value, its[name]) for name, value in mine.items())
            and torch.equal(self.inputs, twin.inputs)
            and torch.equal(self.targets, twin.targets)
        )


@cache
def made_twin(network: str, loss: str, num_examples: int = 7) -> SlowTwin:
    """Of a case that no test can change: its dense derivatives are what takes the time."""
    case = make_case(network, loss, num_examples)
    density = case.loss.density(case.class_dim)
    return SlowTwin(case.model, case.inputs, case.targets, density, case.loss.sigma)


def make_case(network: str = "mlp", loss: str = "classification", num_examples: int = 7) -> Case:
    """The same case at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        kind, target = NETWORKS[network], LOSSES[loss]
        model = kind.make(target.num_outputs)
        if target.head is not None:
            model = nn.Sequential(model, target.head())
        model = model.double().eval()
        if kind.tokens:
            inputs = torch.randint(VOCABULARY, (num_examples, *kind.shape))
        else:
            inputs = torch.randn(num_examples, *kind.shape, dtype=torch.float64)
        with torch.no_grad():
            outputs = model(inputs)
        model.train()
        targets = target.targets(outputs.shape, kind.class_dim)
        return Case(model, inputs, targets, target, kind.class_dim, (network, loss, num_examples))
