"""N and the examples behind it, from any loader, which is left as it was."""

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_bayes import laplace_evidence
from lightning_bayes.capture.examples import examples_from_loader, examples_from_tensors
from tests.refusals import refuses

N = 11
DATASET = TensorDataset(torch.arange(float(N)), torch.arange(N))
PART = [7, 2, 5, 9]


def seen(examples):
    """Targets in the order they come, after a check of the two counts."""
    batches = list(examples.read())
    found = torch.cat([targets for _, targets in batches]).tolist()
    assert len(found) == examples.num_examples
    assert len(batches) == examples.num_batches
    return found


class EveryOther(Sampler):
    """A sampler that nobody knows."""

    def __iter__(self):
        return iter(range(0, N, 2))

    def __len__(self):
        return 6


class Buckets(Sampler):
    """A batch sampler without a sampler of its own."""

    def __iter__(self):
        return iter([[9, 2], [7], [5]])


def sharded(dataset):
    return DistributedSampler(dataset, num_replicas=3, rank=1, shuffle=True)


def generator():
    return torch.Generator().manual_seed(3)


WHOLE, EVEN = list(range(N)), list(range(0, N, 2))
LOADERS = {
    "plain": (lambda: DataLoader(DATASET, batch_size=4), WHOLE),
    "shuffled": (lambda: DataLoader(DATASET, batch_size=4, shuffle=True, generator=generator()), WHOLE),
    "drop_last": (lambda: DataLoader(DATASET, batch_size=4, drop_last=True, shuffle=True), WHOLE),
    "replacement": (lambda: DataLoader(DATASET, sampler=RandomSampler(DATASET, True, 30)), WHOLE),
    "fewer_at_random": (lambda: DataLoader(DATASET, sampler=RandomSampler(DATASET, num_samples=4)), WHOLE),
    "subset_sampler": (
        lambda: DataLoader(DATASET, sampler=SubsetRandomSampler(PART, generator())),
        sorted(PART),
    ),
    "subset_tensor": (
        lambda: DataLoader(list(DATASET), sampler=SubsetRandomSampler(torch.tensor(PART))),
        PART,
    ),
    "subset": (lambda: DataLoader(Subset(DATASET, PART), shuffle=True), sorted(PART)),
    "batch_sampler": (lambda: DataLoader(DATASET, batch_sampler=BatchSampler(EveryOther(), 2, False)), EVEN),
    "batched_subset": (
        lambda: DataLoader(DATASET, batch_sampler=BatchSampler(SubsetRandomSampler(PART), 3, True)),
        PART,
    ),
    "buckets": (lambda: DataLoader(DATASET, batch_sampler=Buckets()), PART),
    "unknown": (lambda: DataLoader(DATASET, sampler=EveryOther()), EVEN),
    "weighted": (
        lambda: DataLoader(DATASET, sampler=WeightedRandomSampler([1.0, 0.0] * 5 + [2.0], 40)),
        EVEN,
    ),
    "distributed": (lambda: DataLoader(DATASET, sampler=sharded(DATASET)), WHOLE),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_each_example_once(kind):
    make, expected = LOADERS[kind]
    found = seen(examples_from_loader(make(), None, None))
    assert sorted(found) == sorted(expected)
    assert found == seen(examples_from_loader(make(), None, None))  # in the same order every time


@pytest.mark.parametrize("kind", LOADERS)
def test_the_loader_goes_on_as_if_nobody_had_looked(kind):
    make, _ = LOADERS[kind]

    def two_epochs(look):
        torch.manual_seed(5)
        loader = make()
        first = [batch[1].tolist() for batch in loader]
        if look:
            state = torch.random.get_rng_state()
            seen(examples_from_loader(loader, None, None))
            torch.random.set_rng_state(state)  # `isolated` does this for the global generator
        return first, [batch[1].tolist() for batch in loader]

    assert two_epochs(look=True) == two_epochs(look=False)


def test_batches_are_no_smaller_than_is_efficient():
    data = TensorDataset(torch.zeros(100), torch.zeros(100))
    sizes = [len(x) for x, _ in examples_from_loader(DataLoader(data, batch_size=2), None, None).read()]
    assert sizes == [32, 32, 32, 4]
    sizes = [len(x) for x, _ in examples_from_loader(DataLoader(data, batch_size=60), None, None).read()]
    assert sizes == [60, 40]
    sizes = [len(x) for x, _ in examples_from_loader(DataLoader(data, batch_size=60), 7, None).read()]
    assert set(sizes) == {7, 2}


def test_the_collate_function_is_the_loaders():
    loader = DataLoader(
        DATASET, collate_fn=lambda items: (torch.tensor([-x for x, _ in items]), torch.ones(1))
    )
    ((inputs, _),) = examples_from_loader(loader, None, None).read()
    assert inputs.tolist() == [-float(i) for i in range(N)]


@pytest.mark.parametrize("source", ["loader", "tensors"])
def test_max_examples_is_a_fixed_random_subset(source):
    def make(at_most):
        if source == "loader":
            return examples_from_loader(DataLoader(DATASET, shuffle=True), None, at_most)
        return examples_from_tensors(DATASET.tensors, None, at_most)

    found = seen(make(5))
    assert len(set(found)) == 5
    assert found == seen(make(5)) == sorted(found)
    assert found != [0, 1, 2, 3, 4]
    assert seen(make(N)) == seen(make(N + 1)) == WHOLE


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATASET)


class SizedStream(Stream):
    def __len__(self):
        return N


class Sizeless(Dataset):
    def __getitem__(self, index):
        return DATASET[index]


def test_a_sized_stream_is_read_whole():
    assert seen(examples_from_loader(DataLoader(SizedStream(), batch_size=4), None, None)) == WHOLE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), ("Stream has no length", "__len__")),
        (lambda: DataLoader(Sizeless(), sampler=EveryOther()), "Sizeless has no length"),
        (lambda: DataLoader(DATASET, batch_size=None), ("batch_size=None", "cannot be counted")),
        (lambda: DataLoader(TensorDataset(torch.zeros(0), torch.zeros(0))), "DataLoader is empty"),
        (lambda: DataLoader(Subset(DATASET, [])), "DataLoader is empty"),
        (
            lambda: DataLoader(DATASET, sampler=sharded(Subset(DATASET, PART))),
            ("part of the dataset", "Subset"),
        ),
    ],
)
def test_loaders_that_cannot_be_counted(make, message):
    with refuses(message):
        examples_from_loader(make(), None, None)


class Endless(SizedStream):
    def __iter__(self):
        while True:
            yield from DATASET


class Longer(SizedStream):
    def __iter__(self):
        yield from (*DATASET, *DATASET)


class Shards(SizedStream):
    """The idiom of PyTorch's documentation."""

    def __iter__(self):
        info = get_worker_info()
        yield from list(DATASET) if info is None else list(DATASET)[info.id :: info.num_workers]


class Counts(SizedStream):
    """Goes on where it has stopped."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            self.position += 1
            yield DATASET[(self.position - 1) % N]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", [SizedStream, Endless, Longer, Shards, Counts])
def test_a_stream_is_read_for_as_long_as_it_says(stream, workers, drop_last):
    """Two workers of a stream that does not divide itself would give each example twice."""
    loader = DataLoader(stream(), batch_size=4, num_workers=workers, drop_last=drop_last)
    examples = examples_from_loader(loader, 4, None)
    assert seen(examples) == WHOLE
    assert seen(examples) == WHOLE
    assert getattr(loader.dataset, "position", 0) == 0


@pytest.mark.parametrize("stream", [SizedStream, Endless])
def test_the_first_examples_of_a_stream(stream):
    examples = examples_from_loader(DataLoader(stream()), None, 3)
    assert seen(examples) == WHOLE[:3]
    assert "first 3 examples" in examples.notes[0]
    assert (
        seen(examples_from_loader(DataLoader(stream(), batch_size=2), None, None, num_batches=2)) == WHOLE[:4]
    )


class Shorter(SizedStream):
    def __iter__(self):
        yield from (DATASET[i] for i in range(5))


class Empty(SizedStream):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_a_stream_that_ends_early_counts_what_it_gave(batch_size):
    inputs = nn.Linear(1, N)
    loader = DataLoader(
        Shorter(),
        batch_size=batch_size,
        collate_fn=lambda batch: (
            torch.stack([x for x, _ in batch]).unsqueeze(1),
            torch.stack([y for _, y in batch]),
        ),
    )
    with pytest.warns(UserWarning, match="ended after 5 examples, of 11"):
        evidence = laplace_evidence(inputs, loader)
    assert evidence.num_examples == 5
    x, y = DATASET.tensors
    right = laplace_evidence(inputs, (x[:5].unsqueeze(1), y[:5]))
    assert evidence.log_evidence == pytest.approx(right.log_evidence, abs=1e-4)


class Once(SizedStream):
    """Its examples are gone when they have been read."""

    def __init__(self):
        self.examples = (example for example in DATASET)

    def __iter__(self):
        yield from self.examples


class Itself(SizedStream):
    def __iter__(self):
        return self

    def __next__(self):
        return DATASET[0]


@pytest.mark.parametrize("stream", [Once, Itself])
def test_a_stream_that_can_be_read_once_is_left_to_training(stream):
    loader = DataLoader(stream(), batch_size=4)
    with refuses(f"{stream.__name__} can be read only once", remedy="make its iterator anew"):
        examples_from_loader(loader, None, None)
    assert next(iter(loader))[1].tolist()[0] == 0


def test_a_weighted_sampler_is_said_to_count_each_example_once():
    sampler = WeightedRandomSampler([1.0] * (N - 1) + [0.0], 30)
    examples = examples_from_loader(DataLoader(DATASET, sampler=sampler), None, None)
    assert examples.num_examples == N - 1
    assert "counts once" in examples.notes[0]
    assert examples_from_loader(DataLoader(DATASET), None, None).notes == ()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(3),), ("argument `data`", "got (Tensor)")),
        ((torch.zeros(3), [0, 1, 2]), ("argument `data`", "(Tensor, list)")),
        ((torch.zeros(3), torch.tensor(1)), "argument `data`"),
        ((torch.zeros(3), torch.zeros(2)), ("equally many inputs and targets", "got 3 and 2")),
        ((torch.zeros(0, 3), torch.zeros(0)), "at least one; got 0 and 0"),
    ],
)
def test_tensors_that_are_no_examples(tensors, message):
    with refuses(message):
        examples_from_tensors(tensors, None, None)
