"""The rows of a bracket and the factor that begins before they are known, against dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.row_storage.collector import principal_rows, smallest_set
from lightning_bayes.row_storage.stored import KeptDense
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.bracket import factor as bracket_factor
from lightning_bayes.structures.bracket import selection
from lightning_bayes.structures.bracket.factor import factor_of
from lightning_bayes.structures.bracket.selection import operations, select

PRECISION = {"w": 0.7}
THREE = Budget(marked_rows=3, marked_share=2)
"""Columns three at a time."""


def rows_of(seed, examples=12, columns=3, width=25, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(columns, examples, 1, generator=generator, dtype=dtype).pow(4)
    rows = scale * torch.randn(columns, examples, width, generator=generator, dtype=dtype)
    kept = KeptDense(rows, "w", torch.Size([width]))
    return principal_rows([kept], kept.example_grams(PRECISION).double())


def dense(rows):
    """I + K over all rows, in the numbers of `PrincipalRows`."""
    matrix = rows.layers[0].rows.double().flatten(0, 1)
    return torch.eye(len(matrix)).double() + matrix @ matrix.mT / PRECISION["w"]


seeds = st.integers(0, 10_000)


@given(seeds, st.floats(0.01, 20.0))
def test_the_head_is_the_beginning_of_the_factor(seed, width):
    rows = rows_of(seed)
    found = select(rows, width, PRECISION, 1, THREE)
    whole = dense(rows)
    chosen, marked = found.chosen, found.head.shape[1]
    assert len(chosen.unique()) == len(chosen)
    factor = torch.linalg.cholesky(whole[chosen][:, chosen])
    torch.testing.assert_close(found.head, factor[:, :marked])


@given(seeds, st.floats(0.01, 20.0))
def test_what_is_left_is_a_schur_complement_and_stays_within_the_width(seed, width):
    rows = rows_of(seed)
    found = select(rows, width, PRECISION, 1, THREE)
    whole = dense(rows)
    residual, expected = left_outside(found, whole)
    assert (residual >= expected - 1e-9).all()  # the negligible rows keep their whole diagonal
    assert found.residual.log1p().sum() <= width * (1 + 1e-9)
    log_det = torch.logdet(whole[found.chosen][:, found.chosen])
    assert log_det - 1e-9 <= torch.logdet(whole) <= log_det + found.residual.log1p().sum() + 1e-9


def left_outside(found, whole):
    """`residual` of the rows outside S, and the diagonal of the Schur complement of L there, less 1."""
    left = found.chosen[: found.head.shape[1]]
    others = torch.tensor(sorted(set(range(len(whole))) - set(found.chosen.tolist())), dtype=torch.long)
    schur = whole - whole[:, left] @ torch.linalg.solve(whole[left][:, left], whole[left])
    return found.residual[others], schur.diagonal()[others] - 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_share_directions_leave_little_of_each_other(dtype):
    rows = rows_of(0, examples=40, width=4, dtype=dtype)
    found = select(rows, 3.0, PRECISION, 1, THREE)
    marked = found.head.shape[1]
    assert marked >= 6  # two blocks at least
    residual, expected = left_outside(found, dense(rows))
    tight = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    outside = torch.ones(len(found.residual), dtype=torch.bool)
    outside[found.chosen] = False
    lowered = residual < found.rows.eigenvalues[outside] - tight
    assert lowered.sum() > 20
    torch.testing.assert_close(residual[lowered], expected[lowered], rtol=tight, atol=tight)
    # Fewer rows than without.
    unmarked = smallest_set(rows.eigenvalues, 3.0)
    assert len(found.chosen) < 0.8 * len(unmarked)
    chosen = dense(rows)[found.chosen][:, found.chosen]
    torch.testing.assert_close(
        found.head.double().tril(), torch.linalg.cholesky(chosen)[:, :marked], rtol=tight, atol=tight
    )


@given(seeds, st.floats(0.01, 20.0), st.booleans())
def test_the_split_factor_answers_as_the_dense_one(seed, width, headless):
    rows = rows_of(seed)
    found = select(rows, width, PRECISION, 1, THREE)
    found, factor = factor_of(found.headless() if headless else found, PRECISION, torch.float64, 4096)
    matrix = dense(rows)[found.chosen][:, found.chosen]
    lower = torch.linalg.cholesky(matrix)
    vectors = torch.randn(len(matrix), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert factor.log_det == pytest.approx(torch.logdet(matrix).item(), rel=1e-10)
    torch.testing.assert_close(factor.whiten(vectors), torch.linalg.solve(lower, vectors))
    torch.testing.assert_close(factor.unwhiten(vectors), torch.linalg.solve(lower.mT, vectors))
    torch.testing.assert_close(factor.solve(vectors[:, :1].mT), torch.linalg.solve(matrix, vectors[:, :1]).mT)
    exact, none = factor.trace_of_shrinkage(2, len(matrix))
    expected = len(matrix) - torch.linalg.inv(matrix).trace().item()
    assert exact == pytest.approx(expected, abs=1e-9)
    assert none == 0.0
    estimate, stderr = factor.trace_of_shrinkage(2000, 0)
    assert abs(estimate - expected) <= 5 * stderr + 1e-9


def test_a_head_that_spoils_the_rest_is_done_without(monkeypatch):
    found = select(rows_of(1, examples=40, width=4, dtype=torch.float32), 3.0, PRECISION, 1, THREE)
    assert found.head.shape[1] > 0
    original, calls = bracket_factor.factorise, []

    def refusing(layers, precision, dtypes, *rest):
        calls.append((len(precision), dtypes))
        if len(precision) > 1:
            raise EvidenceUnavailableError("the head")
        return original(layers, precision, dtypes, *rest)

    monkeypatch.setattr(bracket_factor, "factorise", refusing)
    again, factor = factor_of(found, PRECISION, torch.float64, 4096)
    assert calls == [(2, (torch.float32,)), (1, (torch.float32, torch.float64))]
    assert again.head.shape[1] == 0
    matrix = dense(found.rows)[again.chosen][:, again.chosen]
    assert factor.log_det == pytest.approx(torch.logdet(matrix).item(), rel=1e-4)


def test_nothing_is_marked_where_float32_loses_the_identity(monkeypatch):
    monkeypatch.setattr(selection._Deflation, "mark", lambda self, size: pytest.fail("marked"))
    rows = rows_of(2, examples=40, width=4, dtype=torch.float32)
    strong = {"w": 1e-7}
    grams = rows.layers[0].example_grams(strong).double()
    assert select(principal_rows(rows.layers, grams), 3.0, strong, 1, THREE).head.shape[1] == 0


def test_operations_and_the_smallest_set():
    assert operations(10, 6) == 10**2 * 6 + 10**3 / 3
    residual = torch.tensor([0.5, 3.0, 0.1, 0.0], dtype=torch.float64)
    assert smallest_set(residual, 0.1).tolist() == [0, 1]
    assert smallest_set(residual, 100.0).tolist() == [1]  # one at least
    assert sorted(smallest_set(residual, 0.0).tolist()) == [0, 1, 2]
