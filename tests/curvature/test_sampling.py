"""Sampled columns: estimates within their own standard errors of the number from all columns."""

import math
import statistics

import pytest
import torch

from lightning_bayes.structures.column_groups import jackknife
from tests.cases import make_case


def test_the_jackknife_of_a_mean_is_the_mean_with_its_standard_error():
    values = [1.0, 4.0, 2.0, 7.0]
    left_out = [(sum(values) - value) / 3 for value in values]
    estimate, error = jackknife(sum(values) / 4, left_out)
    assert estimate == pytest.approx(3.5)
    assert error == pytest.approx(statistics.stdev(values) / 2)


def test_the_jackknife_takes_away_the_bias_of_a_squared_mean():
    """E m² = μ² + σ²/n, the textbook case: what is left is m² − s²/n, without bias."""
    values = [1.0, 4.0, 2.0, 7.0]
    left_out = [((sum(values) - value) / 3) ** 2 for value in values]
    estimate, _ = jackknife(3.5**2, left_out)
    assert estimate == pytest.approx(3.5**2 - statistics.variance(values) / 4)


def test_one_group_tells_nothing_of_its_error():
    assert jackknife(2.0, []) == (2.0, math.inf)


@pytest.mark.parametrize("structure", ["kron", "kron_joint", "kron_expand", "diag"])
@pytest.mark.parametrize("network", ["mlp", "conv", "batch_norm", "lstm"])
def test_samples_agree_with_all_columns_within_their_error(network, structure):
    """5 standard errors: with 7 degrees of freedom that happens by chance in 0.2 % of cases; the seed is fixed."""
    case = make_case(network, num_examples=20)
    whole = case.evidence(structure=structure, prior_precision=0.3)
    sampled = case.evidence(structure=structure, prior_precision=0.3, num_samples=64)
    error = sampled.log_evidence_stderr
    assert 0 < error < 0.2 * abs(whole.log_occam_factor)
    assert abs(sampled.log_occam_factor - whole.log_occam_factor) < 5 * error
    gamma_error = sampled.effective_parameters_stderr
    assert abs(sampled.effective_parameters - whole.effective_parameters) < 5 * gamma_error
    assert sampled.log_likelihood == whole.log_likelihood


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_one_sample_has_an_infinite_error(structure):
    evidence = make_case().evidence(structure=structure, num_samples=1)
    assert evidence.log_evidence_stderr == math.inf
    assert math.isfinite(evidence.log_evidence)


@pytest.mark.parametrize("num_samples", [2, 3, 11])
def test_groups_of_unequal_size_are_scaled(num_samples, monkeypatch):
    """Were every sample the same, leaving some out would change nothing: no spread, no correction."""
    case = make_case("mlp", num_examples=5)

    def same(self, outputs, targets, num_columns, generator):
        root = self.sqrt_hessian(outputs, targets)
        return root.sum(0, keepdim=True).expand(num_columns, *root.shape[1:]) / math.sqrt(num_columns)

    monkeypatch.setattr("lightning_bayes.likelihoods.categorical.Categorical.sample_columns", same)
    for structure in ("kron", "diag"):
        evidence = case.evidence(structure=structure, num_samples=num_samples)
        assert evidence.log_evidence_stderr == pytest.approx(0, abs=1e-7)
        once = case.evidence(structure=structure, num_samples=1)
        assert evidence.log_evidence == pytest.approx(once.log_evidence, rel=1e-9)


def test_no_certified_bound_from_samples():
    evidence = make_case().evidence(structure="diag", num_samples=8)
    assert evidence.lower == -math.inf
    assert torch.isfinite(torch.tensor(evidence.upper))
