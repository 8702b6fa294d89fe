"""There and back: the advised partner has the noise of the run that it was advised for."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_bayes.functional import (
    AdamConfiguration,
    Configuration,
    advise,
    advise_adam,
    compare,
)

RELATIVE = 1e-9
DATA = 1000

rates = st.floats(1e-5, 10.0)
batches = st.integers(1, DATA - 1)
momenta = st.floats(0.0, 0.99)
dampenings = st.floats(0.0, 0.9)


def g(learning_rate, batch, data, momentum, dampening):
    """The paper's equation with dampening, written anew."""
    return learning_rate * (data / batch - 1) * (1 - dampening) / (1 - momentum)


@st.composite
def configurations(draw):
    momentum = draw(momenta)
    dampening = draw(dampenings) if momentum > 0 else 0.0
    nesterov = draw(st.booleans()) if momentum > 0 and dampening == 0 else False
    return Configuration(draw(rates), draw(batches), DATA, momentum, dampening, nesterov)


def scale_of(configuration):
    return g(
        configuration.learning_rate,
        configuration.batch_size,
        configuration.dataset_size,
        configuration.momentum,
        configuration.dampening,
    )


def near(found, expected):
    # N - B cancels where a solved, real-valued B comes close to N.
    margin = found.dataset_size / (found.dataset_size - found.batch_size)
    return scale_of(found) == pytest.approx(scale_of(expected), rel=RELATIVE * max(1.0, margin))


@given(configurations(), batches, momenta, st.integers(DATA, 10**6))
def test_advised_learning_rate(present, batch, momentum, data):
    advice = advise(present, target_batch_size=batch, target_momentum=momentum, target_dataset_size=data)
    assert (advice.exact.batch_size, advice.exact.momentum) == (batch, momentum)
    assert near(advice.exact, present)


@given(configurations(), rates, momenta)
def test_advised_batch_size(present, rate, momentum):
    advice = advise(present, target_learning_rate=rate, target_momentum=momentum)
    assume(advice.exact is not None and advice.exact.batch_size < DATA)
    assert near(advice.exact, present)


@given(configurations(), momenta)
def test_both_moves_of_a_new_momentum(present, momentum):
    for move in advise(present, target_momentum=momentum).moves:
        if move.exact is not None and move.exact.batch_size < DATA:
            assert near(move.exact, present)


@given(configurations(), batches)
def test_and_back_again(present, batch):
    there = advise(present, target_batch_size=batch).exact
    back = advise(there, target_batch_size=int(present.batch_size)).exact
    assert back.learning_rate == pytest.approx(present.learning_rate, rel=RELATIVE)
    assert back.nesterov == present.nesterov


@given(configurations(), configurations())
def test_each_single_change_restores_the_reference(present, reference):
    comparison = compare(present, reference)
    if not comparison.differs:
        return
    changes = {change.quantity: change.value for change in comparison.restorations}
    assert "learning_rate" in changes and "dataset_size" in changes
    for quantity, value in changes.items():
        fields = {
            "learning_rate": present.learning_rate,
            "batch": present.batch_size,
            "data": present.dataset_size,
            "momentum": present.momentum,
            "dampening": present.dampening,
        }
        fields[{"batch_size": "batch", "dataset_size": "data"}.get(quantity, quantity)] = value
        # 1 - m and N - B cancel where m comes close to 1 and B to N.
        margin = max(1.0, fields["data"] / (fields["data"] - fields["batch"]), 1 / (1 - fields["momentum"]))
        assert g(**fields) == pytest.approx(scale_of(reference), rel=RELATIVE * margin)


@given(
    st.floats(1e-6, 1.0),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.floats(0.5, 0.999),
    st.floats(0.9, 0.99999),
    st.floats(1e-12, 1e-3),
)
def test_adams_advice_is_the_rule_of_malladi(rate, batch, target, beta1, beta2, eps):
    # Malladi et al. 2022, definition 5.2: B <- kB, lr <- lr sqrt(k), b <- 1 - k (1 - b), eps <- eps/sqrt(k).
    present = AdamConfiguration(rate, batch, (beta1, beta2), eps)
    advised = advise_adam(present, target_batch_size=target).advised
    k = target / batch
    if k * (1 - min(beta1, beta2)) >= 1:
        assert advised is None
        return
    assert advised.batch_size == target
    assert advised.learning_rate == pytest.approx(rate * k**0.5, rel=RELATIVE)
    assert 1 - advised.betas[0] == pytest.approx(k * (1 - beta1), rel=RELATIVE)
    # 1 - b cancels: an error of 1e-16 in b.
    assert 1 - advised.betas[1] == pytest.approx(k * (1 - beta2), rel=RELATIVE, abs=1e-15)
    assert advised.eps == pytest.approx(eps * k**-0.5, rel=RELATIVE)
    # And the same from the learning rate, with k = (lr'/lr)^2.
    other = advise_adam(present, target_learning_rate=rate * math.sqrt(k)).advised
    if other is not None and other.batch_size > 1:
        assert other.batch_size == pytest.approx(target, rel=RELATIVE)
        assert other.betas == pytest.approx(advised.betas, abs=1e-9)
