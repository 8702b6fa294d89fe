"""Rows of a stream: which are kept, that they are still themselves, and sums from a weighted sample."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.row_storage.factored import KeptOuter
from lightning_bayes.row_storage.largest_rows import PrioritySample, RowReservoir, RowSet
from lightning_bayes.row_storage.stored import KeptDense

UNIT = {"w": 1.0, "b": 1.0, "u": 1.0}


def rows_of(start, number, first=True, second=True):
    """Rows whose entries tell their number; of two layers, either of which may be missing."""
    numbers = torch.arange(start, start + number).double()
    layers = {}
    if first:  # two rows for each input, as the columns of one example
        owners = torch.arange(number) // 2
        inputs = torch.stack([numbers[::2].floor(), torch.ones(-(-number // 2)).double()], 1).unsqueeze(1)
        grads = torch.stack([numbers, -numbers], 1).view(1, number, 1, 2)
        layers[("w", "b")] = KeptOuter(grads, inputs, "w", "b", torch.Size([2, 2]), True, owners)
    if second:
        layers[("u",)] = KeptDense((numbers + 0.5).view(1, number, 1), "u", torch.Size([1]))
    return RowSet(layers, numbers.unsqueeze(1))


def written_down(rows):
    """[R, p] with zeros for a layer that is not there."""
    parts = []
    for names, width in ((("w", "b"), 6), (("u",), 1)):
        if names not in rows.layers:
            parts.append(torch.zeros(len(rows), width).double())
            continue
        layer = rows.layers[names]
        if width == 1:
            parts.append(layer.rows[0])
            continue
        inputs = layer.inputs if layer.owners is None else layer.inputs[layer.owners]
        parts.append(torch.einsum("nto,nti->noi", layer.rows[0], inputs).flatten(1))
        parts.append(layer.rows[0].sum(1))
    return torch.cat(parts, 1)


pieces = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.booleans()), min_size=1, max_size=6)


@given(pieces, st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_largest_keys_stay_with_their_rows(pieces, capacity, random):
    reservoir, away, everything, start = RowReservoir(capacity), [], [], 0
    keys_of = {}
    for number, first, second in pieces:
        rows = rows_of(start, number, first, second or not first)
        keys = torch.tensor([random.random() for _ in range(number)]).double()
        everything.append(written_down(rows))
        keys_of |= dict(zip(range(start, start + number), keys.tolist(), strict=True))
        away += reservoir.offer(rows, keys)
        start += number
    away += reservoir.close()
    kept, keys = reservoir.rows()
    literal = torch.cat(everything)
    numbers = kept.values[:, 0].long()
    assert sorted(keys.tolist()) == sorted(keys_of.values())[-capacity:]
    assert [keys_of[number] for number in numbers.tolist()] == keys.tolist()
    torch.testing.assert_close(written_down(kept), literal[numbers])
    gone = torch.cat([rows.values[:, 0] for rows, _ in away]).long().tolist() if away else []
    assert sorted([*gone, *numbers.tolist()]) == list(range(start))
    for rows, _ in away:
        torch.testing.assert_close(written_down(rows), literal[rows.values[:, 0].long()])
    # What is kept multiplies as its rows do, whatever was joined and taken.
    gram = sum(layer.cross(layer, UNIT) for layer in kept.layers.values())
    torch.testing.assert_close(gram, literal[numbers] @ literal[numbers].mT)


def test_a_priority_sample_estimates_sums_without_bias():
    number, size = 40, 8
    weights = torch.arange(1, number + 1).double() ** 2
    values = weights.sqrt() + 3.0  # any sum, not that of the weights
    estimates, variances = [], []
    for seed in range(400):
        sample = PrioritySample(size, seed)
        for start in range(0, number, 10):
            sample.offer(rows_of(start, 10), weights[start : start + 10])
        rows, likely = sample.rows()
        chosen = values[rows.values[:, 0].long()] / likely
        assert len(rows) == size
        estimates.append(chosen.sum().item())
        variances.append((chosen.square() * (1.0 - likely)).sum().item())
    spread = statistics.stdev(estimates)
    assert abs(statistics.mean(estimates) - values.sum().item()) < 4 * spread / math.sqrt(len(estimates))
    assert 0.85 < spread / math.sqrt(statistics.mean(variances)) < 1.15


def test_a_sample_of_all_is_the_sum():
    sample = PrioritySample(50, 0)
    sample.offer(rows_of(0, 9), torch.ones(9).double())
    rows, likely = sample.rows()
    assert rows.values[:, 0].sum().item() == pytest.approx(36.0)
    assert likely.tolist() == [1.0] * 9
