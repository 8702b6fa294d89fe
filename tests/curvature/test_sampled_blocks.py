"""Blocks of a random sample of batches: no bias, a standard error that is one, and a certified other side."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_bayes import laplace_evidence
from lightning_bayes.likelihoods import resolve_likelihood
from lightning_bayes.numerics import sampling_estimates
from lightning_bayes.numerics.sampling_estimates import BlockSample, draw_blocks, estimated_total
from lightning_bayes.row_storage import collector
from lightning_bayes.rows.reader import RowReader
from lightning_bayes.structures.base import Budget, Problem
from lightning_bayes.structures.blocks import BlockCurvature
from lightning_bayes.structures.blocks_sampled import SampledBlockCurvature
from tests.cases import make_case
from tests.refusals import refuses

PRECISION, SIZE, BATCHES = 0.4, 2, 20


def test_a_total_over_all_samples_is_right_on_average_and_so_is_its_error():
    """Every sample of three of six: the mean is the sum, and the mean of σ² is the variance."""
    population = [1.0, 4.0, 2.0, 7.0, 0.5, 3.0]
    found = [estimated_total(sample, 6) for sample in itertools.combinations(population, 3)]
    assert statistics.mean(value for value, _ in found) == pytest.approx(sum(population))
    variance = statistics.pvariance(value for value, _ in found)
    assert statistics.mean(error**2 for _, error in found) == pytest.approx(variance)


def test_a_total_of_few():
    assert estimated_total([2.0], 5) == (10.0, math.inf)
    assert estimated_total([2.0, 3.0], 2) == (5.0, 0.0)
    assert estimated_total([], 0) == (0.0, 0.0)


def test_the_draw_has_a_stream_of_its_own():
    before = torch.get_rng_state()
    sample = draw_blocks(50, 9)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample == draw_blocks(50, 9)
    assert (len(sample.base), len(sample.held)) == (4, 5)
    assert not sample.base & sample.held
    assert sample.base | sample.held <= set(range(50))
    assert [sample.role(i) for i in sorted(sample.base | sample.held)] == sample.in_order
    assert draw_blocks(50, 9, seed=1) != sample
    everything = draw_blocks(4, 9)
    assert everything == BlockSample(4, frozenset(range(4)), frozenset())


@pytest.fixture(scope="module")
def read():
    """Blocks of rows of every batch, the sizes, and the dense G of each batch."""
    case = make_case("mlp", "classification", SIZE * BATCHES)
    twin = case.slow_twin()
    of_example = [j.mT @ h @ j for j, h in zip(twin.jacobians, twin.output_hessians, strict=True)]
    dense = [sum(of_example[i : i + SIZE]) for i in range(0, SIZE * BATCHES, SIZE)]
    reader, likelihood = RowReader(case.model.eval(), case.names), resolve_likelihood("classification")
    found = []
    for i in range(0, SIZE * BATCHES, SIZE):
        some = slice(i, i + SIZE)
        forward = lambda some=some: (case.model(case.inputs[some]), case.targets[some])  # noqa: E731
        found.append(list(reader.read(forward, likelihood).chunks))
    shapes = {name: parameter.shape for name, parameter in case.model.named_parameters()}
    sizes = {
        "num_examples": SIZE * BATCHES,
        "rank": 3,
        "batch_size": SIZE,
        "kept_width": 20,
        "gram_width": 20,
        "map_width": 55,
    }
    problem = Problem(shapes, **sizes, dtype=torch.float64, device=torch.device("cpu"))
    return found, problem, dense


def answer(curvature, found, chosen=range(BATCHES)):
    for index in sorted(chosen):
        for block in found[index]:
            curvature.update(block)
    nothing = {name: torch.zeros(shape).double() for name, shape in curvature.problem.shapes.items()}
    return curvature.at(dict.fromkeys(nothing, PRECISION), nothing)


def log_det(matrices):
    total = sum(matrices) / PRECISION
    return torch.linalg.slogdet(torch.eye(len(total)).to(total) + total).logabsdet.item()


def test_the_estimate_has_no_bias_and_its_error_is_calibrated(read):
    """Against the sum over all blocks outside the base, each given the base, from dense autograd."""
    found, problem, dense = read
    differences, errors = [], []
    for seed in range(80):
        sample = draw_blocks(BATCHES, 8, seed)
        curvature = SampledBlockCurvature(replace(problem, block_sample=sample))
        summary = answer(curvature, found, sample.base | sample.held)
        inside = log_det([dense[i] for i in sample.base])
        whole = inside + sum(
            log_det([dense[j] for j in (*sample.base, i)]) - inside for i in set(range(BATCHES)) - sample.base
        )
        assert summary.bounds[0] == pytest.approx(inside, rel=1e-9)
        assert inside < log_det(dense) < whole
        differences.append(summary.bounds[1] - whole)
        errors.append(summary.upper_stderr)
    spread = statistics.stdev(differences)
    assert abs(statistics.mean(differences)) < 4 * spread / math.sqrt(len(differences))
    assert 0.75 < spread / math.sqrt(statistics.mean(error**2 for error in errors)) < 1.33


def test_a_base_that_is_not_kept_whole_has_wider_bounds(read):
    found, problem, dense = read
    sample = draw_blocks(BATCHES, 8)
    chosen, bounds = sample.base | sample.held, []
    for capacity in (1000, 12):
        budget = Budget(least_kept=capacity, kept_flop=0.0)
        curvature = SampledBlockCurvature(replace(problem, block_sample=sample, budget=budget))
        bounds.append(answer(curvature, found, chosen).bounds)
    assert bounds[1][0] < bounds[0][0] < log_det(dense)
    assert bounds[0][1] < bounds[1][1]


def test_what_goes_is_estimated_without_bias(read):
    """The priority sample of the rows that are not kept, against all of them."""
    found, problem, _ = read
    precision = dict.fromkeys(problem.shapes, PRECISION)

    def rest(seed, sampled):
        budget = Budget(pool_rows=8, sampled_rows=sampled)
        curvature = BlockCurvature(replace(problem, budget=budget), seed, capacity=12)
        answer(curvature, found)
        return curvature.part(precision)

    whole = rest(0, 1000)
    assert 0.0 < whole.added[0] < whole.beyond
    assert whole.added[1] == 0.0
    samples = [rest(seed, 6) for seed in range(80)]
    for name in ("added", "added_gamma"):
        some = [getattr(sample, name) for sample in samples]
        spread = statistics.stdev(value for value, _ in some)
        mean = statistics.mean(value for value, _ in some)
        assert abs(mean - getattr(whole, name)[0]) < 4 * spread / math.sqrt(len(some))
        assert 0.7 < spread / math.sqrt(statistics.mean(error**2 for _, error in some)) < 1.4


def test_gamma_is_minus_the_derivative_of_what_is_reported(read):
    found, problem, _ = read
    sample = draw_blocks(BATCHES, 8)
    for curvature, chosen in (
        (BlockCurvature(problem, capacity=12), range(BATCHES)),
        (SampledBlockCurvature(replace(problem, block_sample=sample)), sample.base | sample.held),
    ):
        summary = answer(curvature, found, chosen)
        values = [
            curvature.log_det_and_gamma(dict.fromkeys(problem.shapes, PRECISION * math.exp(step)))[0]
            for step in (1e-4, -1e-4)
        ]
        assert (values[1] - values[0]) / 2e-4 == pytest.approx(summary.effective_parameters, rel=1e-5)


def test_where_all_parameters_are_determined_they_are_no_more_than_there_are(read):
    """120 rows, of which 12 are kept, of 55 parameters under a weak prior: Hadamard's bound is the smaller."""
    found, problem, dense = read
    curvature = BlockCurvature(problem, capacity=12)
    weak = dict.fromkeys(problem.shapes, 1e-6)
    for index in range(BATCHES):
        for block in found[index]:
            curvature.update(block)
    summary = curvature.at(
        weak, {name: torch.zeros(shape).double() for name, shape in problem.shapes.items()}
    )
    diagonal = sum(dense).diagonal()
    assert summary.log_det == pytest.approx(torch.log1p(diagonal / 1e-6).sum().item(), rel=1e-9)
    assert summary.effective_parameters == pytest.approx(
        (diagonal / (diagonal + 1e-6)).sum().item(), rel=1e-9
    )
    assert curvature.log_det_and_gamma(weak) == (summary.log_det, summary.effective_parameters)


def test_all_examples_have_their_likelihood_and_some_their_rows():
    case = make_case("conv", "classification", 36)
    before = torch.get_rng_state()
    exact, found = case.evidence(), case.evidence(structure="blocks", num_blocks=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.log_likelihood == pytest.approx(exact.log_likelihood, rel=1e-12)
    assert (found.num_examples, found.num_blocks) == (36, 8)
    assert found.upper >= exact.log_evidence
    assert found.lower == found.log_evidence
    assert found.lower_stderr == found.log_evidence_stderr > 0.0
    assert "estimated from 8 batches, not certified" in str(found)
    assert found.newton_decrement >= exact.newton_decrement
    whole = case.evidence(structure="blocks", num_blocks=1000)
    assert whole.log_evidence == pytest.approx(exact.log_evidence, rel=1e-9)
    assert whole.lower_stderr == 0.0
    assert "certified" not in str(whole)


def test_one_block_has_an_infinite_error(monkeypatch):
    monkeypatch.setattr("lightning_bayes.evidence.options.FEWEST_BLOCKS", 2)
    evidence = make_case().evidence(structure="blocks", num_blocks=2)
    assert evidence.lower_stderr == math.inf
    assert math.isfinite(evidence.lower)


class OfTwoLengths(Dataset):
    """Batches of three short sequences, then of three long ones, and so on; it is its own batch sampler."""

    def __init__(self, long):
        lengths = [long if i // 3 % 2 else 1 for i in range(3 * BATCHES)]
        self.inputs = [torch.randn(length, 12).double() for length in lengths]
        self.targets = torch.randint(3, (len(lengths),))

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]

    def __len__(self):
        return len(self.inputs)

    def loader(self):
        return DataLoader(self, batch_sampler=[range(i, i + 3) for i in range(0, len(self), 3)])


class MeanOverPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.outer(self.inner(x).tanh().mean(1))


def test_how_rows_are_kept_changes_nothing(monkeypatch):
    """Rows of long sequences are kept in other forms than those of short ones, were each batch by itself."""
    loader, model = OfTwoLengths(long=30).loader(), MeanOverPositions().double()

    def found(seed):
        monkeypatch.setattr(sampling_estimates, "SEED", seed)
        return laplace_evidence(model, loader, prior_precision=0.3, structure="blocks", num_blocks=8)

    freely, plan = [found(seed) for seed in range(3)], collector._plan
    monkeypatch.setattr(collector, "_plan", lambda *sizes: (True, True, *plan(*sizes)[2:]))
    for seed, evidence in enumerate(freely):
        paired = found(seed)
        assert evidence.lower == pytest.approx(paired.lower, rel=1e-9)
        assert evidence.effective_parameters == pytest.approx(paired.effective_parameters, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_blocks": 8}, "`num_blocks` to be None beside structure='auto'"),
        ({"num_blocks": 0, "structure": "blocks"}, "num_blocks"),
        (
            {"num_blocks": 1, "structure": "blocks"},
            ("`num_blocks` to be 8 or more, got 1", "num_blocks=8, or None"),
        ),
        ({"num_blocks": 7, "structure": "blocks"}, "`num_blocks` to be 8 or more, got 7"),
        ({"num_blocks": 8, "structure": "blocks", "tolerance": 1.0}, "tolerance"),
    ],
)
def test_wrong_use_is_refused(arguments, words):
    with refuses(words):
        make_case().evidence(**arguments)


def test_seed_is_not_the_users(monkeypatch):
    case = make_case("mlp", "classification", 30)
    once = case.evidence(structure="blocks", num_blocks=8)
    torch.manual_seed(99)
    again = laplace_evidence(
        case.model, (case.inputs, case.targets), structure="blocks", num_blocks=8, batch_size=3
    )
    assert again.log_evidence == once.log_evidence
    monkeypatch.setattr(sampling_estimates, "SEED", 1)
    assert case.evidence(structure="blocks", num_blocks=8).log_evidence != once.log_evidence
