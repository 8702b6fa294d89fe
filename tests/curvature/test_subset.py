"""Sub-networks: which layer is the last one, and what evidence the rest leaves it."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_bayes import laplace_evidence
from lightning_bayes.priors.subset import last_layer, matching
from tests.cases import make_case
from tests.reference import assert_agrees
from tests.refusals import refuses


class Backwards(nn.Module):
    """The head stands first in the definition, and an auxiliary head is called after it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.token = nn.Parameter(torch.ones(4))
        self.stem = nn.Linear(5, 4)
        self.aside = nn.Linear(4, 2)

    def forward(self, x):
        features = torch.tanh(self.stem(x)) * self.token
        outputs = self.head(features)
        self.loss = self.aside(features).square().mean()
        with torch.no_grad():
            self.stem(x)  # for a metric
        return outputs


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(1))[0][:, -1]


NETWORKS = {
    "order of calls": (Backwards, ["head.weight", "head.bias"]),
    "one layer": (lambda: nn.Linear(5, 3), ["weight", "bias"]),
    "no bias": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False)), ["1.weight"]),
    "norm behind": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Softmax(1)),
        ["1.weight", "1.bias"],
    ),
    "parametrized": (
        lambda: nn.Sequential(nn.Linear(5, 4), weight_norm(nn.Linear(4, 3))),
        ["1.bias", "1.parametrizations.weight.original0", "1.parametrizations.weight.original1"],
    ),
    "recurrent": (
        Recurrent,
        ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_layer_is_the_one_called_last_on_the_way_to_the_outputs(name):
    make, expected = NETWORKS[name]
    network, x = make(), torch.randn(2, 5)
    hooks = [len(module._forward_pre_hooks) for module in network.modules()]
    assert last_layer(network, lambda: network(x)) == expected
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_a_frozen_last_layer_is_still_the_last_layer():
    network, x = Backwards(), torch.randn(2, 5)
    network.head.requires_grad_(False)
    with refuses("last layer, ['head.weight', 'head.bias'], is frozen", remedy="Unfreeze it"):
        last_layer(network, lambda: network(x))
    assert not network.head.weight.requires_grad
    network.head.bias.requires_grad_(True)
    assert last_layer(network, lambda: network(x)) == ["head.bias"]


@pytest.mark.parametrize("make", [nn.ReLU, Backwards])
def test_outputs_that_no_layer_leads_to(make):
    network, x = make(), torch.randn(2, 5)
    with refuses("no layer of", remedy=("leads to the outputs", "subset_of_weights=['head")):
        last_layer(network, lambda: network(x).detach())


def test_patterns():
    names = ["stem.weight", "stem.bias", "head.weight", "head.bias"]
    assert matching(names, ["head.*"]) == ["head.weight", "head.bias"]
    assert matching(names, ["head.weight", "*.bias"]) == ["stem.bias", "head.weight", "head.bias"]
    with refuses("patterns ['tail.*'] of subset_of_weights match no trainable", remedy="'stem"):
        matching(names, ["head.*", "tail.*"])


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize(
    ("subset", "kept"),
    [("last_layer", ["4.weight", "4.bias"]), (["*.bias", "2.*"], ["0.bias", "2.weight", "2.bias", "4.bias"])],
    ids=str,
)
def test_the_rest_is_conditioned_on(subset, kept, structure):
    case = make_case("mlp", "classification")
    evidence = case.evidence(subset_of_weights=subset, structure=structure, prior_precision=0.7)
    assert_agrees(evidence, case.reference(dict.fromkeys(kept, 0.7), structure))
    assert set(evidence.fixed_parameters) == set(case.names) - set(kept)
    assert evidence.subset_of_weights == (subset if isinstance(subset, str) else tuple(subset))
    assert "subset of weights" in str(evidence) and "held fixed" in str(evidence)
    optimum = case.evidence(subset_of_weights=subset, structure=structure, prior_precision="optimize")
    assert optimum.log_evidence > evidence.log_evidence
    assert optimum.num_parameters == evidence.num_parameters


def test_the_last_layers_evidence_is_that_of_a_linear_model_of_its_features():
    torch.manual_seed(0)
    network, x, y = Backwards().double(), torch.randn(12, 5).double(), torch.randint(3, (12,))
    features = (torch.tanh(network.stem(x)) * network.token).detach()
    found = laplace_evidence(network, (x, y), subset_of_weights="last_layer", prior_precision=2.0)
    expected = laplace_evidence(network.head, (features, y), prior_precision=2.0)
    assert found.log_evidence == pytest.approx(expected.log_evidence, rel=1e-12)
    hessian = laplace_evidence(
        network, (x, y), subset_of_weights="last_layer", prior_precision=2.0, curvature="hessian"
    )
    assert hessian.log_evidence == pytest.approx(expected.log_evidence, rel=1e-10)


def test_a_prior_for_the_subset_alone_is_enough():
    case = make_case("mlp")
    for subset in ("last_layer", ["4.*"]):
        evidence = case.evidence(subset_of_weights=subset, prior_precision={"4.weight": 1.0, "4.bias": 2.0})
        assert evidence.prior_precision == {"4.weight": 1.0, "4.bias": 2.0}
        with refuses("no pattern for ['4.bias']"):
            case.evidence(subset_of_weights=subset, prior_precision={"4.weight": 1.0})


def test_a_pattern_without_a_parameter():
    with refuses("patterns ['head.*'] of subset_of_weights match no trainable"):
        make_case("mlp").evidence(subset_of_weights=["head.*"])
