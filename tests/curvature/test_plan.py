"""Every parameter is read in the cheapest way that is right, and each way gives the same rows."""

import pytest
import torch
from torch import Tensor, nn

from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.capture.example_layout import Layout, example_weights, find_layout, mixes_examples
from lightning_bayes.capture.module_calls import plain_kernels
from lightning_bayes.likelihoods import Gaussian
from lightning_bayes.rows import reader as reader_module
from lightning_bayes.rows.reader import RowReader
from lightning_bayes.rows.routes import GRAPH, LAYER, Plan
from lightning_bayes.rows.rows import OuterRows
from tests.cases import NETWORKS, make_case
from tests.refusals import refuses


class Bare(nn.Module):
    """A parameter that no module's call holds: the network below is called, this one's forward is not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(5, 2)

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(x) * self.scale


class OtherShapes(nn.Module):
    """Called on [T, N, d] with a mask whose size is the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(0))


def dense(network, forward, backend="auto", num_examples=None, names=None):
    """Rows by name, and the reader."""
    network = throw_away_copy(network)
    reader = RowReader(network, names or [name for name, _ in network.named_parameters()], backend=backend)
    outputs = {}
    for block in reader.read(lambda: forward(network), Gaussian()).chunks:
        for layer in block.layers:
            for name, rows in layer.dense().items():
                outputs.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) for name, rows in outputs.items()}, reader


def of_case(case, backend="auto"):
    return dense(case.model, lambda network: (network(case.inputs), case.targets), backend)


@pytest.mark.parametrize("network", NETWORKS)
def test_torch_func_alone_gives_the_same_rows(network):
    case = make_case(network, "regression")
    fast, plan = of_case(case)
    slow, reader = of_case(case, "autograd")
    assert LAYER in plan._plan.ways.values() or network in ("custom_linear", "weight_norm")
    assert LAYER not in reader._plan.ways.values()
    for name, rows in fast.items():
        torch.testing.assert_close(rows, slow[name], rtol=1e-9, atol=1e-12)


def test_only_what_needs_torch_func_pays():
    _, reader = of_case(make_case("attention", "regression"))
    by_layer = {name for name, way in reader._plan.ways.items() if way == LAYER}
    assert any("norm" in name for name in by_layer)
    assert any("linear1" in name for name in by_layer)
    assert "MultiheadAttention" in reader.split
    assert "layers by their derivatives" in reader.split
    assert not any("in_proj" in name for name in by_layer)


class Positioned(nn.Module):
    """Attention, in a layer of its own if wanted, and a bare parameter, for which the whole network is replayed."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(3, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True) if nested else None
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + self.places
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        if self.layer is not None:
            hidden = self.layer(hidden)
        return self.head(hidden.mean(1))


@pytest.mark.parametrize("nested", [False, True])
def test_a_module_within_one_that_is_replayed_anyway_goes_with_it(nested):
    torch.manual_seed(0)
    model, x = Positioned(nested).double(), torch.randn(4, 3, 4, dtype=torch.float64)
    rows, reader = dense(model, lambda network: (network(x), torch.zeros(4, 2)))
    hosts = set(reader._plan.ways.values()) - {LAYER}
    assert hosts == {""}
    by_itself = torch.func.vmap(
        torch.func.jacrev(
            lambda parameters, one: torch.func.functional_call(model, parameters, (one[None],))[0]
        ),
        (None, 0),
    )
    with plain_kernels():
        jacobians = by_itself({name: p.detach() for name, p in model.named_parameters()}, x)
    for name, right in jacobians.items():
        torch.testing.assert_close(
            rows[name].flatten(2), right.transpose(0, 1).flatten(2), rtol=1e-9, atol=1e-12
        )


def test_what_is_not_right_together_stays_apart(monkeypatch):
    torch.manual_seed(0)
    model, x = Positioned(False).double(), torch.randn(4, 3, 4, dtype=torch.float64)
    proved = Plan.wrong

    def wrong_together(plan, *arguments):
        return ["places"] if plan.ways["attention.in_proj_weight"] == "" else proved(plan, *arguments)

    monkeypatch.setattr(Plan, "wrong", wrong_together)
    _, reader = dense(model, lambda network: (network(x), torch.zeros(4, 2)))
    assert reader._plan.ways["places"] == ""
    assert reader._plan.ways["attention.in_proj_weight"] == "attention"


def test_a_parameter_that_no_call_holds_takes_the_graph_and_says_so():
    torch.manual_seed(0)
    model, x = Bare().double(), torch.randn(4, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"\['scale'\] take one backward pass for each row, which is slow"):
        rows, reader = dense(model, lambda network: (network.outputs(x), torch.zeros(4, 2)))
    assert reader._plan.ways == {"scale": GRAPH, "head.weight": LAYER, "head.bias": LAYER}
    torch.testing.assert_close(rows["scale"], torch.diag_embed(model.head(x)).transpose(0, 1).detach())


def test_backpack_alone_refuses_what_it_lacks():
    with refuses('backend="backpack" has no derivatives for', remedy="in_proj"):
        of_case(make_case("attention", "regression"), "backpack")


@pytest.mark.parametrize("length", [3, 4])
def test_masks_and_sequences_of_the_batch_size_are_told_apart(length):
    """Four examples: a mask [4, 4] beside inputs [4, 4, d] is shared by all, and found to be."""
    torch.manual_seed(0)
    model, x = OtherShapes().double(), torch.randn(4, length, 4, dtype=torch.float64)
    batch, reader = dense(model, lambda network: (network(x), torch.zeros(4, 2)))
    assert "attention.in_proj_weight" in reader.split
    for n in range(4):
        alone, _ = dense(model, lambda network, n=n: (network(x[n : n + 1]), torch.zeros(1, 2)))
        for name, rows in batch.items():
            torch.testing.assert_close(rows[:, n : n + 1], alone[name], rtol=1e-9, atol=1e-12)


def test_columns_in_chunks_are_the_same_columns(monkeypatch):
    case = make_case("attention", "regression")
    whole, _ = of_case(case)
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", 1.0)
    parts, _ = of_case(case)
    for name, rows in whole.items():
        torch.testing.assert_close(parts[name], rows)


def test_a_plan_made_on_one_batch_serves_others_and_is_made_again_when_calls_change():
    class Growing(nn.Module):
        """A second output of its attention from the third example on."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if len(x) > 2 else self.layer(x.unsqueeze(0)).squeeze(0)

    network = throw_away_copy(Growing().double())
    reader = RowReader(network, ["layer.weight", "layer.bias"])
    for size in (4, 2, 1, 3):
        x = torch.randn(size, 5, dtype=torch.float64)
        batch = reader.read(lambda x=x: (network(x), torch.zeros(len(x), 2)), Gaussian())
        (block,) = batch.chunks
        (layer,) = block.layers
        assert isinstance(layer, OuterRows)
        expected = torch.eye(2, dtype=torch.float64)[:, None, :, None] * x[:, None]
        torch.testing.assert_close(layer.dense()["layer.weight"], expected.flatten(2))


@pytest.mark.parametrize(
    "layout", [Layout(0), Layout(1), Layout(2), Layout(0, False), Layout(1, True), Layout(1, False)]
)
def test_layouts_are_found_whatever_the_other_sizes(layout):
    """N = 4 among dimensions of 4 and 8."""
    torch.manual_seed(0)
    for shape in ((4, 4, 4), (8, 4, 4), (4, 8, 4)):
        plain = torch.randn(shape, dtype=torch.float64)
        entries = shape[layout.axis] // 4
        weights = example_weights(4, plain)
        along = weights.repeat_interleave(entries) if layout.major else weights.repeat(entries)
        weighted = plain * along.reshape(-1, *[1] * (2 - layout.axis))
        found = find_layout(plain, weighted, 4)
        if entries == 1:
            assert found == Layout(layout.axis)
        else:
            assert found == layout
        assert not mixes_examples(plain, weighted, 4)
        apart = found.apart(weighted / plain, 4)
        torch.testing.assert_close(apart, weights.reshape(4, 1, 1, 1).expand_as(apart))


def test_shared_entries_have_no_layout():
    plain = torch.ones(4, 2, dtype=torch.float64)
    assert find_layout(plain, plain * 1.4, 4) is None
    assert mixes_examples(plain, plain * 1.4, 4)
