"""What earlier versions have written is read: pickles by the modules of then, advice with all that it must have."""

import json
import pickle

import numpy as np
import pytest

import lightning_bayes
from lightning_bayes import Evidence, Gaussian, Likelihood
from lightning_bayes.functional import Configuration, SavedAdvice, advise
from tests.refusals import refuses


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("evidence", "Evidence"),
        ("curve", "EvidenceCurve"),
        ("eigenvalue", "Eigenvalue"),
        ("stability", "StabilityReading"),
        ("curvature.errors", "EvidenceUnavailableError"),
        ("curvature.likelihoods", "Gaussian"),
        ("curvature.likelihoods.base", "Likelihood"),
        ("curvature.likelihoods.bernoulli", "Bernoulli"),
        ("curvature.likelihoods.categorical", "Categorical"),
        ("curvature.likelihoods.gaussian", "Gaussian"),
        ("curvature.likelihoods.gaussian", "HeteroscedasticGaussian"),
        ("functional.adam_scaling", "AdamConfiguration"),
    ],
)
def test_a_pickle_names_the_module_of_then(module, name):
    stored = f"clightning_bayes.{module}\n{name}\n.".encode()  # the opcode of a global name
    home = lightning_bayes if hasattr(lightning_bayes, name) else lightning_bayes.functional
    assert pickle.loads(stored) is getattr(home, name)


def test_what_is_pickled_now_comes_back():
    assert repr(pickle.loads(pickle.dumps(Gaussian(sigma=0.1)))) == "Gaussian(sigma=0.1)"
    assert pickle.loads(pickle.dumps(Evidence)) is Evidence


def saved():
    present = Configuration(0.1, 32, 1000, 0.9)
    return SavedAdvice({"SGD": present}, (advise(present, target_batch_size=64),))


@pytest.mark.parametrize("field", ["momentum", "dampening", "nesterov", "dataset_size", "learning_rate"])
def test_a_configuration_without_a_field_is_refused(field):
    document = json.loads(saved().to_json())
    del document["configurations"]["SGD"][field]
    with refuses("a part is missing", remedy=field):
        SavedAdvice.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("configurations", None),
        ("configurations", []),
        ("configurations", {"SGD": 3}),
        ("advice", [3]),
        ("advice", 3),
        ("comparisons", "x"),
    ],
)
def test_a_part_of_another_kind_is_refused(part, value):
    document = json.loads(saved().to_json()) | {part: value}
    with refuses("Expected scaling advice as documented"):
        SavedAdvice.from_json(json.dumps(document))


def test_a_reduction_that_was_not_written_is_the_mean():
    document = json.loads(saved().to_json())
    for configuration in (document["configurations"]["SGD"], document["advice"][0]["present"]):
        configuration.pop("reduction", None)
        configuration.pop("averaged_batches", None)
    assert SavedAdvice.from_json(json.dumps(document)) == saved()


class Weighted(Likelihood):
    """With an argument that has no truth value of its own."""

    name = "weighted"

    def __init__(self, weights=None):
        self.weights = weights

    prepare = unit_loss = sqrt_hessian = num_terms = None


def test_a_likelihood_of_the_users_own_prints():
    assert repr(Weighted(np.ones(2))) == "Weighted(weights=array([1., 1.]))"
