"""The result says what it is, on one screen."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from lightning_bayes.evidence.result import Evidence

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


EVERYTHING = replace(
    EVIDENCE,
    lower=-612_345.25,
    upper=-511_111.75,
    log_evidence_stderr=12.5,
    effective_parameters_stderr=3.25,
    noise_variance=0.5,
    prior_optimized=True,
    prior_precision={f"layers.{i}.weight": 1.0 / (1 + i) for i in range(40)},
    fixed_parameters=tuple(f"layers.{i}.bias" for i in range(40)),
    subset_of_weights=tuple(f"layers.{i}.*" for i in range(9)),
    num_eigenvalues_below_prior=12,
    num_negative_eigenvalues=3,
    num_samples=64,
)


@pytest.mark.parametrize("evidence", [EVIDENCE, EVERYTHING], ids=["plain", "everything"])
def test_one_screen(evidence):
    lines = str(evidence).splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "at a minimum"),
        ({"newton_decrement": 99.0}, "not at a minimum"),
        ({"num_eigenvalues_below_prior": 5, "num_negative_eigenvalues": 0}, "at a minimum"),
        ({"num_eigenvalues_below_prior": 5, "num_negative_eigenvalues": 1}, "negative curvature"),
    ],
)
def test_status(changes, expected):
    evidence = replace(EVIDENCE, **changes)
    assert evidence.status == expected
    assert evidence.at_minimum is (expected == "at a minimum")


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
        ({"structure": "kron", "lower": -math.inf, "upper": math.inf}, "kron; no bounds known"),
        ({"lower": -601.0, "upper": -599.0}, "full; log-evidence in [-601.00, -599.00]"),
        ({"log_evidence_stderr": 0.31}, "± 0.31 from sampling, -0.6000 per example"),
        ({"structure": "diag", "upper": 0.0, "num_samples": 64}, "diag of 64 sampled columns"),
        ({"prior_optimized": True}, "optimized prior                      1"),
        (
            {"prior_optimized": True, "prior_precision": {"a": 2.0, "b": 3.0}},
            "optimized prior                      3  b",
        ),
        ({"subset_of_weights": "last_layer"}, "subset of weights     last_layer"),
        ({"subset_of_weights": ("a.*", "b")}, "subset of weights     a.*, b"),
        ({"curvature": "hessian"}, "exact Hessian"),
        (
            {"num_eigenvalues_below_prior": 12, "num_negative_eigenvalues": 0},
            "12  below the prior's, 0 of them negative",
        ),
        ({"num_eigenvalues_below_prior": 12, "num_negative_eigenvalues": 2}, "NEGATIVE CURVATURE"),
        ({"curvature": "hessian_positive", "upper": 0.0}, "a heuristic"),
    ],
)
def test_the_text_says(changes, expected):
    assert expected in str(replace(EVIDENCE, **changes))


def test_no_ratio_no_line():
    assert "ratio" not in str(replace(EVIDENCE, log_evidence_ratio=None))
