"""Second moments against the dense matrix, by whichever of their two forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.numerics.second_moment import SecondMoment

WIDTH = 6


def batches_of(sizes, dead, seed):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(size, WIDTH, dtype=torch.float64, generator=generator) for size in sizes]
    for batch in found:
        batch[:, :dead] = 0
    return found


def moment_of(batches):
    moment = SecondMoment()
    for batch in batches:
        moment.add(batch)
    return moment


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dead=st.integers(0, 4),
    scaled=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_spectrum_is_that_of_the_dense_matrix(sizes, dead, scaled, seed):
    """Few vectors and many, with entries that are always zero and without."""
    batches = batches_of(sizes, dead, seed)
    scale = torch.linspace(0.5, 2.0, WIDTH, dtype=torch.float64) if scaled else None
    vectors = torch.cat(batches) * (1.0 if scale is None else scale)
    dense = vectors.mT @ vectors
    spectrum = moment_of(batches).spectrum(torch.float64, scale)
    expected = torch.linalg.eigvalsh(dense).clamp(min=0)
    missing = WIDTH - len(spectrum.values)
    torch.testing.assert_close(spectrum.values, expected[missing:], rtol=1e-9, atol=1e-12)
    assert bool((expected[:missing].abs() < 1e-12).all())
    values = moment_of(batches).eigenvalues(torch.float64, scale)
    torch.testing.assert_close(values, spectrum.values, rtol=1e-9, atol=1e-12)

    rows = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotated, rest = spectrum.coordinates(rows)
    found = (rotated.square() / (1 + spectrum.values)).sum().item() + rest
    solved = torch.linalg.solve(torch.eye(WIDTH, dtype=torch.float64) + dense, rows.mT)
    assert found == pytest.approx((rows.mT * solved).sum().item(), rel=1e-10)
    parts = spectrum.shares(WIDTH, slice(0, 2)) + spectrum.shares(WIDTH, slice(2, WIDTH))
    torch.testing.assert_close(parts, torch.ones_like(parts))


@pytest.mark.parametrize("sizes", [(2, 2), (2, 9), (9, 2), (9, 9), (3, 4)])
def test_merged_is_the_moment_of_all(sizes):
    batches = batches_of(sizes, 0, 0)
    merged = SecondMoment.merged([moment_of([batch]) for batch in batches])
    whole = moment_of(batches)
    torch.testing.assert_close(merged.spectrum(torch.float64).values, whole.spectrum(torch.float64).values)


def test_strips_fill_the_matrix(monkeypatch):
    """Wider than one strip, and no multiple of it."""
    monkeypatch.setattr("lightning_bayes.numerics.second_moment.STRIP", 4)
    vectors = batches_of([20], 0, 0)[0]
    found = moment_of([vectors]).eigenvalues(torch.float64)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(vectors.mT @ vectors))


def test_merging_leaves_the_parts_as_they_were():
    few, many = (moment_of(batches_of([size], 0, size)) for size in (2, 9))
    before = many.eigenvalues(torch.float64)
    SecondMoment.merged([few, many])
    SecondMoment.merged([many, few])
    assert torch.equal(many.eigenvalues(torch.float64), before)
