"""Architectures as they are published, against one backward pass for each output of each example.

The matrices are too large to write down: `diag` is held against the sum of squares of the dense rows, the
exact structure against the Gram matrix of those rows, by the formulas of MacKay and Smith & Le alone.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from lightning_bayes.evidence.laplace import laplace_evidence
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.likelihoods import Categorical
from lightning_bayes.structures.base import DEFAULT_BUDGET, Budget
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.diagonal import DiagonalCurvature
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.primal import PrimalCurvature
from lightning_bayes.structures.registry import STRUCTURES
from tests.cases import evidence_within
from tests.reference import Density, SlowTwin, assert_agrees, categorical
from tests.refusals import refuses

CLASSES = 3
PRECISION = 0.5


class DigitRows(nn.Module):
    """A transformer that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 6)
        self.position = nn.Parameter(torch.randn(1, 8, 6))
        layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


class RowsByLSTM(nn.Module):
    """An LSTM of two layers over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 5, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        return self.head(hidden[-1])


class CausalLanguageModel(nn.Module):
    """Tokens to tokens, [N, T, V]: a mask, pre-norm, the head tied to the embedding."""

    def __init__(self, vocabulary: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 6, norm_first=True, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64)
        return self.head(self.encoder(self.embed(tokens), mask=mask, is_causal=True)).transpose(1, 2)


def convnext() -> nn.Module:
    setting = [CNBlockConfig(4, 6, 1), CNBlockConfig(6, None, 1)]
    return ConvNeXt(setting, stochastic_depth_prob=0.5, layer_scale=0.3, num_classes=CLASSES)


def vision_transformer() -> nn.Module:
    net = torchvision.models.VisionTransformer(8, 4, 1, 2, 6, 10, num_classes=CLASSES)
    nn.init.normal_(net.heads.head.weight)  # zero in a new one, which leaves the body no gradient
    return net


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=CLASSES)


def mobilenet() -> nn.Module:
    """Inverted residuals, ReLU6, depthwise convolutions, narrow."""
    settings = [[1, 4, 1, 1], [2, 6, 1, 2], [2, 6, 1, 1]]
    return torchvision.models.MobileNetV2(CLASSES, 0.25, settings)


class PaddedTokens(nn.Module):
    """Sequences of any length: a padding token embeds as zero and stays zero up to the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.inner = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(tokens))).sum(1))


class Routed(nn.Module):
    """Two layers that see some of the examples each; called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 4)
        self.right = nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        to_left = x[:, 0] > 0
        hidden = x.new_zeros(len(x), 4)
        hidden[to_left] = torch.tanh(self.left(input=x[to_left]))
        hidden[~to_left] = torch.tanh(self.right(input=x[~to_left]))
        return self.head(input=hidden)


@dataclass(frozen=True)
class Architecture:
    """A factory, the shape of its inputs, and the size of its vocabulary where these are tokens."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0


SMALL = {
    "transformer": Architecture(DigitRows, (8, 8)),
    "lstm": Architecture(RowsByLSTM, (8, 8)),
    "language_model": Architecture(CausalLanguageModel, (5,), tokens=7),
    "vision_transformer": Architecture(vision_transformer, (3, 8, 8)),
    "convnext": Architecture(convnext, (3, 16, 16)),
}
"""Up to about 1,500 parameters: a dense matrix is possible."""

LARGE = {"resnet": Architecture(resnet, (3, 32, 32)), "mobilenet": Architecture(mobilenet, (3, 16, 16))}


def twin_of(name: str) -> SlowTwin:
    """The network with its data, in float64."""
    architecture = (SMALL | LARGE)[name]
    num_examples = 3 if name in SMALL else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = architecture.make()
        for module in model.modules():  # norms at the identity, biases at zero, would hide mistakes
            for local, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1:
                    nn.init.normal_(parameter, 0.2 if local == "bias" else 1.0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        if architecture.tokens:
            inputs = torch.randint(architecture.tokens, (num_examples, *architecture.shape))
            targets = torch.randint(architecture.tokens, inputs.shape)
        else:
            inputs = torch.randn(num_examples, *architecture.shape, dtype=torch.float64)
            targets = torch.randint(CLASSES, (num_examples,))
        return SlowTwin(model.double(), inputs, targets, "classification")


small_twin = functools.cache(twin_of)
large_twin = functools.lru_cache(maxsize=1)(twin_of)


def evidence_of(twin: SlowTwin, structure: str) -> Evidence:
    """The engine's, in batches of two."""
    model = twin.model.train()  # as in a training run
    evidence = laplace_evidence(
        model, (twin.inputs, twin.targets), structure=structure, prior_precision=PRECISION, batch_size=2
    )
    model.eval()
    return evidence


def rows_of(twin: SlowTwin) -> Tensor:
    """V [N·K, p] with G = VᵀV, from symmetric roots of the output Hessians."""
    rows = []
    for jacobian, hessian in zip(twin.jacobians, twin.output_hessians, strict=True):
        values, vectors = torch.linalg.eigh(hessian)
        rows.append((vectors * values.clamp(min=0).sqrt()).mT @ jacobian)
    return torch.cat(rows)


@pytest.mark.situation("Networks, by structure")
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("name", SMALL)
def test_every_field_agrees_with_the_dense_matrix(name, structure):
    twin = small_twin(name)
    expected = twin.evidence(dict.fromkeys(twin.names, PRECISION), structure)
    assert_agrees(evidence_of(twin, structure), expected)


@pytest.mark.slow
@pytest.mark.situation("Networks, by structure")
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", LARGE)
def test_every_field_agrees_with_rows_of_plain_autograd(name, structure):
    twin = large_twin(name)
    rows = rows_of(twin)
    weights = torch.cat([twin.model.get_parameter(name).detach().flatten() for name in twin.names])
    slope = twin.slope + PRECISION * weights
    if structure == "diag":
        curvature = rows.square().sum(0)
        log_det = (curvature / PRECISION).log1p().sum().item()
        gamma = (curvature / (curvature + PRECISION)).sum().item()
        quadratic = (slope.square() / (curvature + PRECISION)).sum().item()
    else:  # the nonzero eigenvalues of VVᵀ are those of G, and Vᵀu/√μ its eigenvectors
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        kept = values > 1e-10 * values[-1]
        values, along = values[kept], (rows.mT @ vectors[:, kept] / values[kept].sqrt()).mT @ slope
        log_det = (values / PRECISION).log1p().sum().item()
        gamma = (values / (values + PRECISION)).sum().item()
        rest = (slope.square().sum() - along.square().sum()) / PRECISION
        quadratic = ((along.square() / (values + PRECISION)).sum() + rest).item()
    found = evidence_of(twin, structure)
    penalty = 0.5 * PRECISION * weights.square().sum().item()
    assert found.log_occam_factor == pytest.approx(-0.5 * log_det, rel=1e-8)
    assert found.effective_parameters == pytest.approx(gamma, rel=1e-8)
    assert found.newton_decrement == pytest.approx(0.5 * quadratic, rel=1e-8)
    assert found.log_likelihood == pytest.approx(-twin.loss.item(), rel=1e-10)
    assert found.log_evidence == pytest.approx(-twin.loss.item() - penalty - 0.5 * log_det, rel=1e-8)
    assert found.num_parameters == len(weights)
    if name == "resnet":
        assert found.num_parameters == 11_178_051  # the published network
    assert math.isfinite(found.log_evidence_ratio)


@pytest.mark.parametrize("structure", ["full", "diag"])  # kron sums gradients over padded places too
def test_batches_of_different_lengths(structure):
    """Each batch is padded to its own longest sequence; the reference takes each example as it is."""
    model = PaddedTokens().double()
    assert not model.embed.weight[0].any()
    lengths = [2, 1, 2, 5, 3, 4, 1]
    tokens = [torch.randint(1, 9, (length,)) for length in lengths]
    targets = torch.randint(CLASSES, (len(lengths),))

    def padded(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        sequences, labels = zip(*examples, strict=True)
        return nn.utils.rnn.pad_sequence(list(sequences), batch_first=True), torch.stack(labels)

    pairs = list(zip(tokens, targets, strict=True))
    loader = DataLoader(pairs, batch_size=3, collate_fn=padded)
    found = laplace_evidence(model, loader, structure=structure, prior_precision=PRECISION, batch_size=3)
    twin = SlowTwin(model, tokens, targets, "classification")
    assert_agrees(found, twin.evidence(dict.fromkeys(twin.names, PRECISION), structure))


@pytest.mark.filterwarnings(
    "ignore:The per-example gradients of .* one backward pass for each row:UserWarning"
)
@pytest.mark.parametrize(("structure", "batch_size"), [("full", 3), ("diag", 3), ("diag", 1)])
def test_examples_that_take_different_roads(structure, batch_size):
    """In a batch of one example, one of the layers sees none."""
    model, inputs = Routed().double(), torch.randn(7, 5, dtype=torch.float64)
    inputs[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    targets = torch.randint(CLASSES, (7,))
    found = laplace_evidence(
        model, (inputs, targets), structure=structure, prior_precision=PRECISION, batch_size=batch_size
    )
    twin = SlowTwin(model, inputs, targets, "classification")
    assert_agrees(found, twin.evidence(dict.fromkeys(twin.names, PRECISION), structure))


class Sorted(nn.Module):
    """Examples in another order between two layers, the order that of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.inner(x[order]))[order.argsort()])


@pytest.mark.filterwarnings(
    "ignore:The per-example gradients of .* one backward pass for each row:UserWarning"
)
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_examples_that_change_places(structure):
    model, inputs = Sorted().double(), torch.randn(6, 5, dtype=torch.float64)
    targets = torch.randint(CLASSES, (6,))
    found = laplace_evidence(
        model, (inputs, targets), structure=structure, prior_precision=PRECISION, batch_size=3
    )
    twin = SlowTwin(model, inputs, targets, "classification")
    assert_agrees(found, twin.evidence(dict.fromkeys(twin.names, PRECISION), structure))


def test_places_that_change_only_in_a_later_batch_are_noticed():
    """The first batch happens to be in order. Never a wrong number for it."""
    inputs = torch.randn(6, 5, dtype=torch.float64)
    inputs[:, 0] = torch.tensor([1.0, 2.0, 3.0, 3.0, 2.0, 1.0])
    targets = torch.randint(CLASSES, (6,))
    with refuses("in different layers for different batches"):
        laplace_evidence(Sorted().double(), (inputs, targets), structure="full", batch_size=3)


class Packed(nn.Module):
    """An LSTM over packed sequences, as it is used for texts of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, :, 0].ne(0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])


@pytest.mark.filterwarnings(
    "ignore:The per-example gradients of .* one backward pass for each row:UserWarning"
)
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_packed_sequences(structure):
    model, inputs = Packed().double(), torch.randn(7, 4, 3, dtype=torch.float64)
    for example, length in enumerate([2, 4, 1, 3, 3, 4, 2]):
        inputs[example, length:] = 0.0
    targets = torch.randint(CLASSES, (7,))
    found = laplace_evidence(
        model, (inputs, targets), structure=structure, prior_precision=PRECISION, batch_size=3
    )
    twin = SlowTwin(model, inputs, targets, "classification")
    assert_agrees(found, twin.evidence(dict.fromkeys(twin.names, PRECISION), structure))


class Tagger(nn.Module):
    """A label for each token, [N, T, d] to [N, T, C]; long sentences have a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)
        self.long = nn.Linear(4, 4)
        self.routed = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        return self.head(self.long(hidden) if x.shape[1] > 5 or not self.routed else hidden)


LENGTHS = [4] * 3 + [7] * 3 + [2] * 3 + [5]
"""Three examples a batch: T(C - 1) columns, more in the second batch than in the first, fewer in the third."""


def tagged(routed: bool) -> tuple[SlowTwin, DataLoader]:
    model = Tagger().double()
    model.routed = routed
    inputs = [torch.randn(length, 3, dtype=torch.float64) for length in LENGTHS]
    targets = [torch.randint(CLASSES, (length,)) for length in LENGTHS]
    loader = DataLoader(list(zip(inputs, targets, strict=True)), batch_size=3)
    return SlowTwin(model, inputs, targets, Density(categorical(class_dim=-1))), loader


def tags_evidence(
    twin: SlowTwin,
    loader: DataLoader,
    precision: float = PRECISION,
    budget: Budget = DEFAULT_BUDGET,
    **options: object,
) -> Evidence:
    """The engine's."""
    return evidence_within(
        budget,
        twin.model,
        loader,
        likelihood=Categorical(class_dim=-1),
        prior_precision=precision,
        batch_size=3,
        **options,
    )


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("side", [PrimalCurvature, DualCurvature, DiagonalCurvature])
def test_tokens_in_batches_of_different_lengths(side, routed, monkeypatch):
    monkeypatch.setitem(STRUCTURES, "full", side)
    twin, loader = tagged(routed)
    structure = "diag" if side is DiagonalCurvature else "full"
    expected = twin.evidence(dict.fromkeys(twin.names, PRECISION), structure)
    assert_agrees(tags_evidence(twin, loader, structure="full"), expected)


@pytest.mark.parametrize("precision", [0.5, 5.0])
def test_bracket_about_tokens_in_batches_of_different_lengths(precision, monkeypatch):
    monkeypatch.setitem(STRUCTURES, "full", BracketCurvature)
    twin, loader = tagged(routed=True)
    expected = twin.evidence(dict.fromkeys(twin.names, precision))
    found = tags_evidence(twin, loader, precision, structure="full", tolerance=0.5)
    assert found.lower < found.upper <= found.lower + 0.5
    assert found.lower <= expected.log_evidence <= found.upper
    assert found.effective_parameters == pytest.approx(expected.effective_parameters, rel=0.1)
    assert found.newton_decrement == pytest.approx(expected.newton_decrement, rel=2e-3)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("pool", [1, 30, 8192])
def test_landmarks_from_tokens_in_batches_of_different_lengths(pool, routed):
    """From two batches or all they are more than parameters: the bounds meet."""
    twin, loader = tagged(routed)
    expected = twin.evidence(dict.fromkeys(twin.names, PRECISION))
    found = tags_evidence(twin, loader, structure="blocks", budget=Budget(pool_rows=pool))
    assert found.lower <= expected.log_evidence <= found.upper
    if pool > 1:
        assert_agrees(found, expected)


class ScalarPReLU(nn.Module):
    """One parameter on one number an example, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.activation, self.head = nn.Linear(5, 1), nn.PReLU(), nn.Linear(1, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.inner(x).squeeze(1)).unsqueeze(1))


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_prelu_of_one_number_an_example(structure):
    inputs, targets = torch.randn(8, 5, dtype=torch.float64), torch.randint(CLASSES, (8,))
    twin = SlowTwin(ScalarPReLU().double(), inputs, targets, "classification")
    assert_agrees(
        evidence_of(twin, structure), twin.evidence(dict.fromkeys(twin.names, PRECISION), structure)
    )
