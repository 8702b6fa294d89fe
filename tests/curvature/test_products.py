"""Products by passes over the data, against dense rows from one backward pass for each output of each example."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.likelihoods import Categorical, Gaussian, resolve_likelihood
from lightning_bayes.rows import products
from lightning_bayes.rows.products import DataPasses
from lightning_bayes.rows.reader import RowReader
from tests.cases import CASES, Case, make_case
from tests.refusals import refuses

BATCHES = (slice(0, 3), slice(3, 7))
"""Of two sizes."""
F64 = torch.float64
CHOSEN = [
    ("mlp", "classification"),
    ("conv", "binary_3"),
    ("tied", "weighted_smoothed"),
    ("dropout", "classification"),
    ("language_model", "ignored_weighted_smoothed"),
    ("gru", "gaussian_nll"),
]


def passes_of(
    case: Case, held: tuple[str, ...] = (), batches: tuple[slice, ...] = BATCHES
) -> tuple[DataPasses, list[Tensor]]:
    """The passes, and the rows of each batch by the reader, [C, N, p], of the parameters that are not held."""
    likelihood = resolve_likelihood(case.loss.likelihood(case.class_dim))
    network = throw_away_copy(case.model).eval()
    for name in held:
        network.get_parameter(name).requires_grad_(False)
    parameters = {name: p for name, p in network.named_parameters() if name not in held}
    forwards = [lambda some=some: (network(case.inputs[some]), case.targets[some]) for some in batches]
    passes = DataPasses(network, parameters, likelihood, lambda: forwards)
    read = throw_away_copy(case.model).eval()
    reader = RowReader(read, list(parameters))
    rows = [
        dense_rows(reader, lambda some=some: (read(case.inputs[some]), case.targets[some]), likelihood)
        for some in batches
    ]
    return passes, rows


def dense_rows(reader, forward, likelihood) -> Tensor:
    (chunk,) = reader.read(forward, likelihood).chunks
    by_name = {name: rows for layer in chunk.layers for name, rows in layer.dense().items()}
    shape = (chunk.num_columns, chunk.num_examples)
    pieces = [
        by_name.get(name, torch.zeros(*shape, parameter.numel(), dtype=F64))
        for name, parameter in reader.parameters.items()
    ]
    return torch.cat(pieces, dim=2).detach()


def flat(vectors: dict[str, Tensor]) -> Tensor:
    """[k, p]."""
    return torch.cat([vector.reshape(len(vector), -1) for vector in vectors.values()], dim=1)


def of_parameters(passes: DataPasses, num_vectors: int) -> dict[str, Tensor]:
    return {name: torch.randn(num_vectors, *p.shape, dtype=F64) for name, p in passes.parameters.items()}


def of_rows(rows: list[Tensor], num_vectors: int) -> list[Tensor]:
    return [torch.randn(num_vectors, *of_batch.shape[:2], dtype=F64) for of_batch in rows]


def assert_products_are_those_of(rows: list[Tensor], passes: DataPasses, num_vectors: int) -> None:
    coefficients, vectors = of_rows(rows, num_vectors), of_parameters(passes, num_vectors)
    combined, along, image = (
        passes.combine(coefficients),
        list(passes.dot(vectors)),
        passes.product(vectors),
    )
    for products_of in (combined, image):
        assert {name: part.shape for name, part in products_of.items()} == {
            name: part.shape for name, part in vectors.items()
        }
    expected = [torch.einsum("cnp,kp->kcn", of_batch, flat(vectors)) for of_batch in rows]
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(along, expected, **close)
    torch.testing.assert_close(flat(combined), combination(rows, coefficients), **close)
    torch.testing.assert_close(flat(image), combination(rows, expected), **close)
    assert not any(tensor.requires_grad for tensor in [*along, *combined.values(), *image.values()])


def combination(rows: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    pairs = zip(coefficients, rows, strict=True)
    return torch.stack([torch.einsum("kcn,cnp->kp", own, of_batch) for own, of_batch in pairs]).sum(0)


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_products_are_those_of_the_dense_rows(network, loss):
    passes, rows = passes_of(make_case(network, loss))
    assert_products_are_those_of(rows, passes, 3)
    assert not passes._passes.one_by_one  # vmap knows the backward passes of every layer here


@pytest.mark.parametrize("held", [("0.weight",), ("0.weight", "2.bias")])
def test_parameters_that_are_held(held):
    passes, rows = passes_of(make_case("mlp"), held)
    assert_products_are_those_of(rows, passes, 2)


@pytest.mark.parametrize("num_vectors", [1, 5])
@pytest.mark.parametrize("limit", [0, 2 * 4 * 5 * 8, 2**22])
@pytest.mark.parametrize(("network", "loss"), CHOSEN)
def test_the_way_of_the_vectors_is_immaterial(network, loss, limit, num_vectors, monkeypatch):
    """One by one, in chunks of which the last is smaller, or all at once."""
    monkeypatch.setattr(products, "BATCHED_BYTES", limit)
    passes, rows = passes_of(make_case(network, loss))
    assert_products_are_those_of(rows, passes, num_vectors)


class Unbatched(torch.autograd.Function):
    """x², by a backward pass that vmap does not know, since it leaves out what is zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad if bool(grad.any()) else torch.zeros_like(x)


class OnceOnly(Unbatched):
    """One whose derivative has none."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def with_function(function) -> tuple[DataPasses, list[Tensor]]:
    network = nn.Sequential(nn.Linear(4, 5), Applied(function), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(7, 4, dtype=F64), torch.randn(7, 3, dtype=F64)
    return passes_over(network, inputs, targets, Gaussian()), jacobian_rows(network, inputs)


def passes_over(network, inputs, targets, likelihood, batches=BATCHES) -> DataPasses:
    forwards = [lambda some=some: (network(inputs[some]), targets[some]) for some in batches]
    return DataPasses(network, dict(network.named_parameters()), likelihood, lambda: forwards)


def jacobian_rows(network, inputs) -> list[Tensor]:
    """Those of a Gaussian: per-example gradients of each output, [C, N, p]."""
    parameters = list(network.parameters())
    outputs = network(inputs)
    rows = [
        torch.stack(
            [
                torch.cat(
                    [
                        part.flatten()
                        for part in torch.autograd.grad(
                            output, parameters, retain_graph=True, materialize_grads=True
                        )
                    ]
                )
                for output in column
            ]
        )
        for column in outputs.mT
    ]
    return [torch.stack(rows)[:, some] for some in BATCHES]


def test_a_backward_pass_that_vmap_does_not_know():
    passes, rows = with_function(Unbatched.apply)
    assert_products_are_those_of(rows, passes, 3)
    assert passes._passes.one_by_one


def test_parameters_without_influence():
    """One that nothing uses, one behind a step whose derivative is zero."""

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)
            self.rounded = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.rounded.round()

    network = Rounded().double()
    inputs, targets = torch.randn(7, 4, dtype=F64), torch.randn(7, 3, dtype=F64)
    passes = passes_over(network, inputs, targets, Gaussian())
    assert_products_are_those_of(jacobian_rows(network, inputs), passes, 3)
    only = {"unused.weight": network.unused.weight}
    passes = DataPasses(network, only, Gaussian(), lambda: [lambda: (network(inputs), targets)])
    (along,) = passes.dot({"unused.weight": torch.randn(2, 2, 2, dtype=F64)})
    assert along.shape == (2, 3, 7)
    assert not along.any()


def test_sequences_of_differing_length():
    """C is T(K − 1): more columns for the longer ones, each by its own batch's rows."""
    case = make_case("language_model", "ignored")
    lengths = (2, 3)
    likelihood = Categorical(class_dim=-1)
    network, read = throw_away_copy(case.model).eval(), throw_away_copy(case.model).eval()
    data = [(case.inputs[some, :t], case.targets[some, :t]) for some, t in zip(BATCHES, lengths, strict=True)]
    forwards = [lambda x=x, y=y: (network(x), y) for x, y in data]
    passes = DataPasses(network, dict(network.named_parameters()), likelihood, lambda: forwards)
    reader = RowReader(read, list(passes.parameters))
    rows = [dense_rows(reader, lambda x=x, y=y: (read(x), y), likelihood) for x, y in data]
    assert len({len(of_batch) for of_batch in rows}) == 2
    assert_products_are_those_of(rows, passes, 2)


def test_sparse_embeddings():
    network = nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Flatten(), nn.Linear(12, 2)).double()
    inputs, targets = torch.randint(6, (7, 4)), torch.randn(7, 2, dtype=F64)
    passes = passes_over(network, inputs, targets, Gaussian())
    assert_products_are_those_of(jacobian_rows(network, inputs), passes, 2)


def test_gradients_without_a_derivative():
    passes, rows = with_function(OnceOnly.apply)
    torch.testing.assert_close(
        flat(passes.combine(coefficients := of_rows(rows, 2))), combination(rows, coefficients)
    )
    for product in (lambda vectors: list(passes.dot(vectors)), passes.product):
        with refuses("no derivative (Error", remedy=("once_differentiable", 'structure="full"')):
            product(of_parameters(passes, 2))


class Refusing(torch.autograd.Function):
    """x, whose double backward raises an error of its own, as that of torchvision's roi_align does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return RefusingGradient.apply(grad)


class RefusingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad):
        return grad.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("double backwards on it not supported")


def test_gradients_whose_derivative_is_an_error():
    passes, _ = with_function(Refusing.apply)
    with refuses("double backwards on it not supported", remedy=("ordinary operations", 'structure="full"')):
        passes.product(of_parameters(passes, 2))


@cache
def kept_passes(network: str, loss: str) -> tuple[DataPasses, list[Tensor]]:
    return passes_of(make_case(network, loss))


@settings(max_examples=15)
@given(which=st.sampled_from(CHOSEN), seed=st.integers(0, 10**6), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_products_are_linear_and_adjoint(which, seed, a, b):
    """⟨u, Vw⟩ = ⟨Vᵀu, w⟩, ⟨x, Gw⟩ = ⟨Vx, Vw⟩, and each is linear."""
    passes, rows = kept_passes(*which)
    torch.manual_seed(seed)
    u, w = of_rows(rows, 2), of_parameters(passes, 2)
    along = torch.cat(list(passes.dot(w)), 2).flatten(1)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(
        torch.cat(u, 2).flatten(1) @ along.mT, flat(passes.combine(u)) @ flat(w).mT, **close
    )
    torch.testing.assert_close(flat(passes.product(w)) @ flat(w).mT, along @ along.mT, **close)
    mixed = {name: a * part[:1] + b * part[1:] for name, part in w.items()}
    ab = torch.tensor([[a, b]], dtype=F64)
    torch.testing.assert_close(flat(passes.product(mixed)), ab @ flat(passes.product(w)), **close)
    torch.testing.assert_close(torch.cat(list(passes.dot(mixed)), 2).flatten(1), ab @ along, **close)
    torch.testing.assert_close(
        flat(passes.combine([a * own[:1] + b * own[1:] for own in u])), ab @ flat(passes.combine(u)), **close
    )


def test_a_pass_leaves_no_trace():
    """Gradients, modes, hooks, weights and torch's random stream; the draws of all passes are alike."""

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), Noisy(), nn.Tanh(), nn.Linear(5, 3)).double()
    network.eval()
    network[0].weight.grad = marked = torch.randn(5, 4, dtype=F64)
    inputs, targets = torch.randn(7, 4, dtype=F64), torch.randint(3, (7,))
    passes = passes_over(network, inputs, targets, Categorical())
    vectors = of_parameters(passes, 2)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    stream, before = torch.get_rng_state(), marked.clone()
    along = list(passes.dot(vectors))
    combined, image = passes.combine(along), passes.product(vectors)
    torch.testing.assert_close(flat(combined), flat(image))
    assert torch.equal(torch.get_rng_state(), stream)
    assert network[0].weight.grad is marked
    assert torch.equal(marked, before)
    assert all(parameter.grad is None for name, parameter in network.named_parameters() if name != "0.weight")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in network.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_coefficients_of_another_number_of_batches():
    passes, rows = passes_of(make_case("mlp"))
    with refuses("shorter"):
        passes.combine(of_rows(rows, 2)[:1])


def test_products_in_float32():
    case = make_case("mlp")
    passes, _ = passes_of(case)
    vectors = of_parameters(passes, 3)
    network = throw_away_copy(case.model).eval().float()
    single = passes_over(network, case.inputs.float(), case.targets, Categorical())
    image = single.product({name: part.float() for name, part in vectors.items()})
    assert {part.dtype for part in image.values()} == {torch.float32}
    exact = flat(passes.product(vectors))
    assert (flat(image) - exact).norm() <= 1e-5 * exact.norm()
