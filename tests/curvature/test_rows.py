"""Rows are the Jacobian's, whatever the graph; what cannot be read is refused by name."""

import pytest
import torch
from torch import Tensor, nn

from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.evidence.laplace import laplace_evidence
from lightning_bayes.likelihoods import Gaussian
from lightning_bayes.rows.reader import RowReader
from lightning_bayes.rows.rows import DenseRows, OuterRows
from tests.cases import NETWORKS, make_case
from tests.reference import per_example_jacobians
from tests.refusals import refuses


def read(case, likelihood=None):
    network = throw_away_copy(case.model)
    reader = RowReader(network, case.names)
    return reader.read(lambda: (network(case.inputs), case.targets), likelihood or Gaussian())


def read_block(case, likelihood=None):
    (block,) = read(case, likelihood).chunks
    return block


@pytest.mark.parametrize("network", NETWORKS)
def test_rows_of_a_gaussian_are_the_jacobian(network):
    """R is the identity for unit variance: column c's rows are output c's per-example gradients."""
    case = make_case(network, "regression")
    batch = read(case)
    (block,) = batch.chunks
    jacobians, outputs = per_example_jacobians(case.model, case.inputs, case.names)
    found = {name: rows for layer in block.layers for name, rows in layer.dense().items()}
    start = 0
    for name, parameter in case.model.named_parameters():
        expected = torch.stack([j[:, start : start + parameter.numel()] for j in jacobians], dim=1)
        start += parameter.numel()
        torch.testing.assert_close(
            found.get(name, torch.zeros_like(expected)), expected, rtol=1e-10, atol=1e-13
        )
    assert batch.num_examples == block.num_examples == len(case.inputs)
    assert batch.num_terms == outputs.numel()
    assert (block.columns, block.num_columns) == (slice(0, outputs.shape[1]), outputs.shape[1])


@pytest.mark.parametrize("network", NETWORKS)
def test_ways_of_asking_for_the_rows_agree(network):
    case = make_case(network, "regression")
    for layer in read_block(case).layers:
        dense = layer.dense()
        assert tuple(dense) == layer.names
        for name, squares in layer.sum_squares().items():
            assert squares.shape == case.model.get_parameter(name).shape
            torch.testing.assert_close(squares.flatten(), dense[name].square().sum((0, 1)))
        if isinstance(layer, DenseRows):
            torch.testing.assert_close(torch.stack(list(layer.columns())), dense[layer.name])
        one = layer.with_uses(lambda use: use.example(4))
        for name, rows in one.dense().items():
            torch.testing.assert_close(rows, dense[name][:, 4:5])


@pytest.mark.parametrize("network", ["mlp", "residual", "dropout"])
def test_linear_layers_stay_factored(network):
    assert all(isinstance(layer, OuterRows) for layer in read_block(make_case(network, "regression")).layers)


def test_gradient_is_that_of_the_summed_loss():
    case = make_case("batch_norm", "regression")
    case.model.eval()
    loss = 0.5 * (case.model(case.inputs) - case.targets).square().sum()
    truth = torch.autograd.grad(loss, list(case.model.parameters()))
    block = read(case)
    assert block.unit_loss == pytest.approx(loss.item())
    for name, expected in zip(case.names, truth, strict=True):
        torch.testing.assert_close(block.gradient[name], expected)


class Mixing(nn.Module):
    """An output that depends on the other examples of the batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return self.head(hidden - hidden.mean(0))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


class Tuple(Detached):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


def norms(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), *layers, nn.Linear(4, 3))


UNREADABLE = {
    "mixing": (Mixing, r"rows of \['layer.weight', 'layer.bias'\].*mixes the examples of a batch"),
    "mixing_norm": (lambda: norms(nn.BatchNorm1d(4, affine=False, track_running_stats=False)), "mixes"),
    "no_running_statistics": (
        lambda: norms(nn.BatchNorm1d(4, track_running_stats=False)),
        r"rows of \['0.weight', '0.bias', .*batch norm without running statistics",
    ),
    "detached": (Detached, "no graph back to its parameters"),
    "tuple": (Tuple, "returned tuple; the evidence needs one tensor"),
}


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("which", UNREADABLE)
def test_what_cannot_be_read_is_refused(which, structure):
    make, message = UNREADABLE[which]
    with pytest.raises(ValueError, match=message):
        laplace_evidence(make(), (torch.randn(5, 5), torch.tensor([0, 1, 2, 0, 1])), structure=structure)


def test_freezing_is_the_way_out_that_the_message_names():
    model = Mixing()
    model.layer.requires_grad_(False)
    data = (torch.randn(5, 5), torch.tensor([0, 1, 2, 0, 1]))
    with pytest.warns(UserWarning, match="mixes the examples of a batch before .* changes with batch_size="):
        assert laplace_evidence(model, data).fixed_parameters == ("layer.weight", "layer.bias")


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_gradients_that_are_not_finite_are_no_evidence(structure):
    """√ has none at zero."""

    class Root(Detached):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(0.0 * self.layer(x).square())

    data = (torch.randn(5, 5), torch.tensor([0, 1, 2, 0, 1]))
    with refuses("gradient of the parameter 'layer.weight'", error=EvidenceUnavailableError):
        laplace_evidence(Root(), data, structure=structure)
