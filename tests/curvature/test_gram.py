"""Kept rows: the factored ways to a share of K against rows that are written down."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.likelihoods import resolve_likelihood
from lightning_bayes.numerics.cholesky import log_det_of
from lightning_bayes.row_storage import factored
from lightning_bayes.row_storage.collector import RowKeeper, cross_all, keep, kept_widths
from lightning_bayes.row_storage.factored import KeptOuter
from lightning_bayes.row_storage.stored import KeptDense
from lightning_bayes.rows.reader import RowReader
from lightning_bayes.structures.dual_system import System
from tests.cases import make_case

sizes = st.integers(1, 4)
precision = {"w": 0.7, "b": 3.0}


def layer(columns, examples, positions, out, width, paired, has_weight=True, has_bias=True):
    generator = torch.Generator().manual_seed(columns + 7 * examples + 31 * positions + out + width)
    normal = {"generator": generator, "dtype": torch.float64}
    names = ("w" if has_weight else None, "b" if has_bias else None)
    grads = torch.randn(columns, examples, positions, out, **normal)
    inputs = torch.randn(examples, positions, width, **normal)
    return KeptOuter(grads, inputs, *names, torch.Size([out, width]), paired)


def written_down(kept):
    """The literal rows [C·N, p], scaled by the prior."""
    inputs = kept.inputs if kept.owners is None else kept.inputs[kept.owners]
    parts = []
    if kept.weight:
        rows = torch.einsum("cnto,nti->cnoi", kept.rows, inputs)
        parts.append(rows.flatten(2) * precision["w"] ** -0.5)
    if kept.bias:
        parts.append(kept.rows.sum(2) * precision["b"] ** -0.5)
    return torch.cat(parts, dim=2).flatten(0, 1)


@pytest.mark.parametrize("paired", [True, False])
@given(
    sizes,
    sizes,
    sizes,
    sizes,
    sizes,
    st.sampled_from([(1, 1), (1, 0), (0, 1)]),
    st.integers(1, 64),
    st.data(),
)
def test_shares_of_k_are_those_of_the_rows(
    paired, columns, examples, positions, out, width, has, numbers, data
):
    kept = layer(columns, examples, positions, out, width, paired, *map(bool, has))
    rows = written_down(kept)
    indices = st.lists(st.integers(0, columns * examples - 1), min_size=1, max_size=6)
    chosen = torch.tensor(data.draw(indices))
    some = kept.select(chosen // examples, chosen % examples)
    part = slice(*sorted(data.draw(st.tuples(st.integers(0, examples - 1), st.just(examples)))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factored, "PART_NUMBERS", numbers)
        torch.testing.assert_close(kept.cross(kept, precision), rows @ rows.mT)
        torch.testing.assert_close(kept.cross(some, precision), rows @ rows[chosen].mT)
        torch.testing.assert_close(some.cross(kept, precision), rows[chosen] @ rows.mT)
        by_example = rows.view(columns, examples, -1)
        tile = by_example[:, part].flatten(0, 1)
        torch.testing.assert_close(kept.examples(part).cross(kept, precision), tile @ rows.mT)
        half = slice(len(chosen) // 2, len(chosen))
        torch.testing.assert_close(some.examples(half).cross(kept, precision), rows[chosen[half]] @ rows.mT)
        expected = torch.einsum("cnp,dnp->ncd", by_example, by_example)
        torch.testing.assert_close(kept.example_grams(precision), expected)


@given(sizes, sizes, sizes, sizes, sizes)
def test_products_with_vectors_of_selected_rows(columns, examples, positions, out, width):
    kept = layer(columns, examples, positions, out, width, True)
    order = torch.randperm(columns * examples)
    for rows in (kept, kept.select(order // examples, order % examples)):
        inputs = rows.inputs if rows.owners is None else rows.inputs[rows.owners]
        flat = {"w": torch.einsum("cnto,nti->cnoi", rows.rows, inputs), "b": rows.rows.sum(2)}
        vectors = {"w": torch.randn(3, out, width).double(), "b": torch.randn(3, out).double()}
        expected = torch.einsum("cnoi,koi->kcn", flat["w"], vectors["w"])
        expected += torch.einsum("cno,ko->kcn", flat["b"], vectors["b"])
        torch.testing.assert_close(rows.dot(vectors), expected)
        coefficients = torch.randn(3, *rows.rows.shape[:2]).double()
        for name, combined in rows.combine(coefficients).items():
            torch.testing.assert_close(combined, torch.einsum("kcn,cn...->k...", coefficients, flat[name]))


@pytest.mark.parametrize("paired", [True, False])
def test_rotated_rows_give_the_rotated_k(paired):
    kept = layer(3, 4, 2, 3, 2, paired)
    grams = kept.example_grams(precision)
    values, rotations = torch.linalg.eigh(grams)
    torch.testing.assert_close(kept.rotate(rotations).example_grams(precision), torch.diag_embed(values))


@pytest.mark.parametrize("paired", [True, False])
def test_columns_of_zeros_leave_the_determinant_and_the_trace(paired):
    kept = layer(2, 3, 2, 3, 2, paired)
    wider = kept.widen(5)
    rows = torch.cat([written_down(kept), torch.zeros(9, 3 * 2 + 3, dtype=torch.float64)])
    torch.testing.assert_close(wider.cross(kept, precision), rows @ rows[:6].mT)
    torch.testing.assert_close(kept.cross(wider, precision), rows[:6] @ rows.mT)
    gram, padded = kept.cross(kept, precision), wider.cross(wider, precision)
    factor, padded_factor = (torch.linalg.cholesky(torch.eye(len(k)).to(k) + k) for k in (gram, padded))
    assert log_det_of(padded_factor) == pytest.approx(log_det_of(factor), rel=1e-12)
    expected = torch.linalg.solve(torch.eye(6).to(gram) + gram, gram).trace().item()
    exact, _ = System(padded_factor, []).trace_of_shrinkage(4, 15)
    assert exact == pytest.approx(expected, rel=1e-10)
    estimates = [System(one, []).trace_of_shrinkage(10_000, 0) for one in (factor, padded_factor)]
    for estimate, stderr in estimates:
        assert abs(estimate - expected) < 4 * stderr
    assert estimates[1][1] == pytest.approx(estimates[0][1], rel=0.1)  # rows of zeros add no variance


def blocks_of(network, chunk, monkeypatch, num_examples=5):
    case = make_case(network, "classification", num_examples)
    monkeypatch.setattr("lightning_bayes.rows.reader.CHUNK_BYTES", chunk)
    reader = RowReader(case.model.eval(), case.names)
    for start in (0, 3):
        some = slice(start, start + 3)
        forward = lambda some=some: (case.model(case.inputs[some]), case.targets[some])  # noqa: E731
        yield from reader.read(forward, resolve_likelihood("classification")).chunks


@pytest.mark.parametrize("network", ["mlp", "conv", "batch_norm", "sequence", "called_twice"])
def test_columns_that_come_in_chunks(network, monkeypatch):
    """Blocks of one column each, and of all columns, are the same K."""
    grams, counts = [], []
    for chunk in (1.0, 1e9):
        keeper = RowKeeper()
        blocks = list(blocks_of(network, chunk, monkeypatch))
        counts.append(len(blocks))
        for block in blocks:
            keeper.add(block)
        assert keeper.num_rows == 15
        layers = keeper.layers()
        names = {name for kept in layers for name in kept.names}
        grams.append(cross_all(layers, layers, dict.fromkeys(names, 0.3)))
    assert counts == [6, 2]
    torch.testing.assert_close(*grams)


def test_a_map_at_few_positions_is_paired_one_at_many_is_written_down(monkeypatch):
    block = next(blocks_of("conv", 1e9, monkeypatch))
    head = next(found for found in block.layers if "head.weight" in found.names)
    first = next(found for found in block.layers if "first.weight" in found.names)
    assert [(type(kept), getattr(kept, "paired", None)) for kept in keep(head, 3, {})] == [(KeptOuter, True)]
    # 6 positions of a 4 x 18 weight: too many pairs of them, yet fewer numbers than the weight has
    assert [(type(kept), getattr(kept, "paired", None)) for kept in keep(first, 3, {})] == [
        (KeptOuter, False)
    ]
    assert kept_widths(replace(block, layers=[head])) == (4 + 2, 4 + 1, 4 * 4)
    assert kept_widths(replace(block, layers=[first])) == (6 * (4 + 6), 4 * 18 + 4, 6 * 4 * 18)
    one_column = replace(block, layers=[first], num_columns=1)
    assert {type(kept) for kept in keep(first, 1, {})} == {KeptDense}
    assert kept_widths(one_column) == (4 * 18 + 4, 4 * 18 + 4, 6 * 4 * 18)
