"""The estimate by random vectors on the data that people have: read again, drawn, ignored, of several lengths."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bayes import laplace_evidence
from lightning_bayes.capture import repeated_forwards
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.likelihoods import Categorical
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.lanczos import parameter_space, row_space
from tests.cases import make_case
from tests.refusals import refuses

FORMS = {"stored": Budget(), "reread": Budget(stored_bytes=0.0), "products": Budget(columns=0)}
NUMBERS = (
    "log_evidence",
    "log_evidence_stderr",
    "lower",
    "upper",
    "log_likelihood",
    "effective_parameters",
    "num_examples",
)


@pytest.fixture(autouse=True)
def _a_tenth_is_selected(monkeypatch):
    monkeypatch.setattr(row_space, "num_selected", lambda problem: max(1, problem.num_rows // 10))
    monkeypatch.setattr(parameter_space, "SKETCHED", 6)


def evidence(model, data, form="stored", structure="lanczos", **arguments) -> Evidence:
    computation = Computation(structure=structure, budget=FORMS[form], **{"prior_precision": 1.0} | arguments)
    return computation.run(model, data, evidence_of)


def assert_same(one, other, rel=1e-8):
    for name in NUMBERS:
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=rel, abs=1e-8), name


def assert_near(found, exact, errors=4.0):
    assert abs(found.log_evidence - exact.log_evidence) < errors * found.log_evidence_stderr
    assert found.log_likelihood == pytest.approx(exact.log_likelihood, rel=1e-12)
    assert found.lower <= exact.log_evidence <= found.upper
    gamma = abs(found.effective_parameters - exact.effective_parameters)
    assert gamma < errors * found.effective_parameters_stderr
    missing = exact.newton_decrement - found.newton_decrement
    slack = 1e-9 * exact.newton_decrement
    assert -slack <= missing <= found.newton_decrement_error + slack


def of_all_forms(model, data, **arguments):
    """All three against the exact value, the two in the space of rows against each other."""
    exact = evidence(model, data, structure="full", **arguments)
    found = {form: evidence(model, data, form, **arguments) for form in FORMS}
    for one in found.values():
        assert_near(one, exact)
    assert_same(found["stored"], found["reread"])
    return found


@pytest.mark.parametrize("batch_size", [7, 40])
def test_batches_of_any_size(batch_size):
    case = make_case("mlp", "classification", 40)
    data = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=5)
    found = of_all_forms(case.model, data, batch_size=batch_size)
    # Rows have other numbers in other batches, so vectors mean others; what is certified stays.
    once = evidence(case.model, (case.inputs, case.targets), batch_size=40)
    for name in ("lower", "upper", "log_likelihood"):
        assert getattr(found["stored"], name) == pytest.approx(getattr(once, name), rel=1e-9)


class Lengths(Dataset):
    """Sequences of one length in each batch; it is its own batch sampler."""

    def __init__(self, tokens, lengths=(2, 5, 3), ignored=()):
        self.batches, self.items = [], []
        for number, length in enumerate(lengths):
            self.batches.append(range(8 * number, 8 * number + 8))
            for _ in range(8):
                x = torch.randint(4, (length,)) if tokens else torch.randn(length, 4, dtype=torch.float64)
                y = torch.randint(3, (length,))
                if number in ignored:
                    y[:] = -100
                self.items.append((x, y))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def loader(self):
        return DataLoader(self, batch_sampler=self.batches)


class EveryPosition(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner(x).cumsum(1).tanh())


def test_sequences_of_several_lengths():
    likelihood = Categorical(class_dim=-1)
    of_all_forms(EveryPosition().double(), Lengths(tokens=False).loader(), likelihood=likelihood)


@pytest.mark.parametrize("ignored", [(0,), (1,), (2,), (0, 2)])
def test_a_batch_whose_targets_are_all_ignored(ignored):
    data = Lengths(tokens=False, ignored=ignored).loader()
    likelihood = Categorical(class_dim=-1, ignore_index=-100)
    of_all_forms(EveryPosition().double(), data, likelihood=likelihood)


class Scaled(nn.Module):
    """A parameter of no dimension."""

    def __init__(self):
        super().__init__()
        self.inner, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return self.inner(x) * self.temperature


def test_a_parameter_of_no_dimension():
    of_all_forms(Scaled().double(), (torch.randn(40, 4).double(), torch.randint(3, (40,))))


class Sometimes(nn.Module):
    """A layer that long inputs alone go through."""

    def __init__(self):
        super().__init__()
        self.inner, self.more, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.inner(x).tanh()
        if x.shape[1] > 2:
            hidden = self.more(hidden).tanh()
        return self.head(hidden)


@pytest.mark.parametrize("lengths", [(2, 3, 2), (3, 2, 3)])
def test_a_layer_that_some_batches_do_not_use(lengths):
    likelihood = Categorical(class_dim=-1)
    of_all_forms(Sometimes().double(), Lengths(tokens=False, lengths=lengths).loader(), likelihood=likelihood)


@pytest.mark.parametrize("subset", ["last_layer", ["2.*"], ["*.bias"]])
def test_a_subset_of_weights(subset):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    data = torch.randn(50, 5).double(), torch.randint(4, (50,))
    found = of_all_forms(model, data, subset_of_weights=subset)
    assert (
        found["stored"].num_parameters
        == {"last_layer": 28, "2.*": 28, "*.bias": 10}[subset if isinstance(subset, str) else subset[0]]
    )
    assert set(found["stored"].fixed_parameters) == set(found["products"].fixed_parameters) != set()


@pytest.mark.parametrize("precision", [{"*weight": 0.3, "*bias": 5.0}, {"0.*": 0.0, "2.*": 1.0}], ids=str)
def test_a_prior_for_each_pattern(precision):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    data = torch.randn(50, 5).double(), torch.randint(4, (50,))
    of_all_forms(model, data, prior_precision=precision)


# Data that are read more than once.


class Counting(Dataset):
    """Noise from torch's stream on every item that is read, and how many were."""

    def __init__(self, noise=0.0):
        self.x, self.y = torch.randn(40, 5).double(), torch.randint(4, (40,))
        self.noise, self.read = noise, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.read += 1
        return self.x[index] + self.noise * torch.randn(5).double(), self.y[index]


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["as it is", "augmented"])
@pytest.mark.parametrize("form", ["reread", "products"])
def test_data_beyond_the_memory_are_read_again(form, noise, monkeypatch):
    model, data = mlp(), Counting(noise)
    before = torch.get_rng_state()
    kept = evidence(model, DataLoader(data, batch_size=16), form)
    assert data.read <= 2 * len(data)  # once, and a look at the first batch
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(repeated_forwards, "KEPT_BYTES", 0.0)
    reads = data.read
    again = evidence(model, DataLoader(data, batch_size=16), form)
    assert data.read - reads > 6 * len(data)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(again, kept)
    assert again.newton_decrement == pytest.approx(kept.newton_decrement, rel=1e-6)
    assert_near(again, evidence(model, DataLoader(data, batch_size=16), structure="full"))


class OwnStream(Counting):
    """Noise from a generator of its own, another one at each pass."""

    generator = torch.Generator()

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.3 * torch.randn(5, generator=self.generator, dtype=torch.float64), y


@pytest.mark.parametrize("form", ["reread", "products"])
def test_data_that_are_drawn_anew_are_refused_where_they_are_not_kept(form, monkeypatch):
    model, loader = mlp(), DataLoader(OwnStream(), batch_size=16)
    assert evidence(model, loader, form).log_evidence_stderr > 0.0
    monkeypatch.setattr(repeated_forwards, "KEPT_BYTES", 0.0)
    with refuses("drawn anew", remedy="leave augmentation out"):
        evidence(model, loader, form)


def test_a_shuffled_loader_is_the_same_at_every_pass(monkeypatch):
    model, data = mlp(), Counting()
    loader = DataLoader(data, batch_size=16, shuffle=True)
    kept = evidence(model, loader, "reread")
    monkeypatch.setattr(repeated_forwards, "KEPT_BYTES", 0.0)
    assert_same(evidence(model, loader, "reread"), kept)


class Drawing(nn.Module):
    """Dropout without training=self.training."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 20), nn.Linear(20, 4)

    def forward(self, x):
        return self.head(F.dropout(self.inner(x).tanh(), 0.5, True))


def test_a_network_that_draws_in_eval_with_its_rows_stored():
    model, data = Drawing().double(), (torch.randn(40, 5).double(), torch.randint(4, (40,)))
    before = torch.get_rng_state()
    found = evidence(model, data, batch_size=16)
    assert torch.equal(torch.get_rng_state(), before)
    exact = evidence(model, data, structure="auto", batch_size=16)  # as many draws before the pass
    assert exact.structure == "full"
    assert_near(found, exact)


def test_a_network_that_draws_in_eval_with_its_rows_read_again():
    model, data = Drawing().double(), (torch.randn(40, 5).double(), torch.randint(4, (40,)))
    stored = evidence(model, data, batch_size=16)
    assert_same(evidence(model, data, "reread", batch_size=16), stored)


def test_the_model_is_left_as_it_was():
    model = mlp()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for form in FORMS:
        evidence(model, (torch.randn(40, 5).double(), torch.randint(4, (40,))), form)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_float32_is_near_float64():
    model, x, y = mlp(), torch.randn(60, 5).double(), torch.randint(4, (60,))
    precise = evidence(model, (x, y))
    single = model.float()
    for form in ("stored", "reread"):
        found = evidence(single, (x.float(), y), form)
        assert found.log_evidence == pytest.approx(precise.log_evidence, abs=1e-2)
        assert found.log_evidence_stderr == pytest.approx(precise.log_evidence_stderr, rel=1e-2)
        assert found.lower <= precise.log_evidence <= found.upper


def test_progress_says_where_it_is(monkeypatch):
    said = []
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: said.append(text))
    data = torch.randn(60, 5).double(), torch.randint(4, (60,))
    laplace_evidence(mlp(), data, structure="lanczos", progress=True)
    assert said[0].startswith("evidence: lanczos, step 2: ")
