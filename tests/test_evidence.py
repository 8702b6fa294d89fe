"""The result says what it is, on one screen."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from lightning_bayes.evidence import Evidence

EVIDENCE = Evidence(
    log_evidence=-600.0,
    lower=-600.0,
    upper=-600.0,
    log_evidence_ratio=1700.0,
    log_likelihood=-200.0,
    weight_penalty=100.0,
    log_occam_factor=-300.0,
    effective_parameters=123.4,
    newton_decrement=0.5,
    prior_precision=1.0,
    num_examples=1000,
    num_parameters=636_010,
    structure="full",
    curvature="ggn",
    seconds=3.8,
)


def test_it_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        EVIDENCE.log_evidence = 0.0


@pytest.mark.parametrize(
    ("decrement", "ratio", "evidence", "expected"),
    [
        (1.0, 1.0, -1e6, True),
        (1.1, 1.0, -1e6, False),
        (16.9, -1700.0, 0.0, True),
        (17.1, 1700.0, -1e6, False),
        (9.9, None, -1000.0, True),
        (10.1, None, -1000.0, False),
    ],
)
def test_minimum_is_one_nat_or_one_percent(decrement, ratio, evidence, expected):
    found = replace(EVIDENCE, newton_decrement=decrement, log_evidence_ratio=ratio, log_evidence=evidence)
    assert found.at_minimum is expected


def test_one_screen():
    lines = str(EVIDENCE).splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "1,000 examples, nats (full ggn)"),
        ({}, "-600.0000  -0.6000 per example"),
        ({}, "exact GGN"),
        ({}, "the data believe the model"),
        ({}, "123.4000  of 636,010"),
        ({}, "at a minimum"),
        ({"log_evidence_ratio": -1.0}, "the data prefer guessing"),
        ({"newton_decrement": 99.0}, "NOT AT A MINIMUM"),
        ({"effective_parameters_stderr": 0.25}, "± 0.25 of 636,010"),
        ({"structure": "diag", "upper": -300.0}, "diag; log-evidence in [-600.00, -300.00]"),
        ({"structure": "kron", "lower": -math.inf, "upper": -300.0}, "kron; log-evidence at most -300.00"),
        ({"noise_variance": 0.25}, "noise variance                  0.2500"),
        ({"prior_precision": {"a": 2.0, "b": 2.0, "c": 0.5}}, "2  a, b"),
        ({"fixed_parameters": tuple("abcdef")}, "a, b, c, d and 2 more"),
    ],
)
def test_the_text_says(changes, expected):
    assert expected in str(replace(EVIDENCE, **changes))


def test_no_ratio_no_line():
    assert "ratio" not in str(replace(EVIDENCE, log_evidence_ratio=None))
