import json
import math

import pytest

from lightning_bayes.functional import (
    AdamConfiguration,
    Configuration,
    SavedAdvice,
    advise,
    advise_adam,
    compare,
)
from tests.refusals import refuses

SGD = Configuration(0.1, 256, 50_000, 0.9, nesterov=True)
ADAM = AdamConfiguration(1e-3, 256, dataset_size=50_000)
SAVED = [
    SavedAdvice({"SGD": SGD}, (advise(SGD, target_batch_size=8192, name="SGD"),)),
    SavedAdvice(
        {"SGD": SGD}, (advise(SGD, target_momentum=0.5),), (compare(SGD, 100.0, name="SGD", source="x"),)
    ),
    SavedAdvice({"SGD": SGD}, (advise(SGD, target_batch_size=50_000),)),  # no solution
    SavedAdvice(
        {"SGD": SGD}, (advise(SGD, target_batch_size=512, largest_eigenvalue=1e6),)
    ),  # infinite variance
    SavedAdvice({"SGD": SGD}, (advise(SGD, target_batch_size=512, largest_eigenvalue=0.0),)),  # infinite edge
    SavedAdvice({"Adam": ADAM}, (advise_adam(ADAM, target_batch_size=512),), (compare(ADAM, ADAM),)),
    SavedAdvice({"Adam": ADAM}, (advise_adam(ADAM, target_batch_size=20_000),)),
    SavedAdvice({"Adam": AdamConfiguration(1e-3, 8)}),
]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("saved", SAVED)
def test_round_trip(saved):
    text = saved.to_json()
    # Strict: the reader is told of NaN and Infinity, which JSON does not have.
    json.loads(text, parse_constant=refuse)
    back = SavedAdvice.from_json(text)
    assert back == saved
    assert back.to_json() == text


def test_what_a_reader_finds():
    (advice,) = json.loads(SAVED[0].to_json())["advice"]
    assert advice["verdict"] == "doubtful" and "; asked, batch 8192: lr 3.807" in advice["summary"]
    assert advice["present"]["noise_scale"] == pytest.approx(SGD.noise_scale)
    (move,) = advice["moves"]
    assert move["range"] == pytest.approx([3.2, 3.80742], rel=1e-5)
    assert {"name", "passed", "value", "limit", "sentence", "action"} == move["checks"][0].keys()


def test_non_finite_numbers_are_strings():
    (advice,) = json.loads(SAVED[3].to_json())["advice"]
    (variance,) = [one for one in advice["moves"][0]["checks"] if one["name"] == "variance"]
    assert variance["value"] == "Infinity"
    (advice,) = SavedAdvice.from_json(SAVED[3].to_json()).advice
    assert math.inf in [one.value for one in advice.checks]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "other JSON"),
        ('{"format": "lightning-bayes scaling advice", "version": 2}', "version 1, but got 2"),
        ('{"format": "lightning-bayes scaling advice", "version": 1}', "a part is missing"),
    ],
)
def test_other_files_are_refused(text, message):
    with refuses(message):
        SavedAdvice.from_json(text)


def without(entry, *names):
    return {name: value for name, value in entry.items() if name not in names}


@pytest.mark.parametrize(("saved", "key"), [(SAVED[0], "exact"), (SAVED[5], "advised")])
def test_files_of_earlier_versions_are_read(saved, key):
    """A move had one name for its solution, "exact" for SGD and "advised" for Adam; the reduction was not written."""
    document = json.loads(saved.to_json())
    newer = ("reduction", "averaged_batches")
    document["configurations"] = {
        name: without(one, *newer) for name, one in document["configurations"].items()
    }
    for advice in document["advice"]:
        for move in advice["moves"]:
            solution = move.pop("exact")
            assert move.pop("advised") == solution
            move[key] = without(solution, *newer)
            move["safe"] = None if move["safe"] is None else without(move["safe"], *newer)
    assert SavedAdvice.from_json(json.dumps(document)) == saved
