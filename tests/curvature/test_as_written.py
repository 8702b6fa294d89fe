"""The copy is of the module as it is written: with what tools hang on it, the numbers are those without."""

import contextlib
import copy

import lightning as L
import pytest
import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, TensorDataset

import lightning_bayes as lb
from lightning_bayes import laplace_evidence
from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.capture.isolation import isolated
from tests.reference import SlowTwin, assert_agrees

F64 = torch.float64
STRUCTURES = ["full", "kron", "diag"]


class Blocks(nn.Module):
    """Two residual blocks, run by a function of (module, input)."""

    def __init__(self, run) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()) for _ in range(2))
        self.head, self.run = nn.Linear(4, 3), run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, x))


def plainly(net, x):
    return net.two(net.one(x))


def nested(net, x):
    def inner(v):
        return checkpoint(net.two, v, use_reentrant=False)

    return checkpoint(lambda v: inner(net.one(v)), x, use_reentrant=False)


def with_context(net, x):
    def contexts():
        return contextlib.nullcontext(), contextlib.nullcontext()

    return checkpoint(plainly, net, x, use_reentrant=False, context_fn=contexts)


CHECKPOINTED = {
    "nested": nested,
    "context": with_context,
    "sequential": lambda net, x: checkpoint_sequential(
        [net.one, net.two], 2, x.requires_grad_(), use_reentrant=True
    ),
    "reentrant": lambda net, x: checkpoint(lambda v: net.two(net.one(v)), x, use_reentrant=True),
    "autocast": torch.autocast("cpu", dtype=torch.bfloat16)(plainly),
    "autocast of a part": lambda net, x: net.two(_half(net.one, x)),
}


def _half(module, x):
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        return module(x)


def data(tokens=False):
    torch.manual_seed(1)
    x = torch.randint(0, 5, (14, 4)) if tokens else torch.randn(14, 4)
    return x, torch.randint(0, 3, (14,))


def made(make, *arguments):
    torch.manual_seed(0)
    return make(*arguments)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("run", CHECKPOINTED)
def test_checkpointing_and_autocast_change_nothing(run, structure):
    plain = laplace_evidence(made(Blocks, plainly), data(), structure=structure)
    got = laplace_evidence(made(Blocks, CHECKPOINTED[run]), data(), structure=structure)
    assert got.log_evidence == pytest.approx(plain.log_evidence, abs=1e-4)


@pytest.mark.parametrize("run", CHECKPOINTED)
def test_the_hessian_and_its_largest_eigenvalue_neither(run):
    arguments = {"curvature": "hessian_positive"}
    plain = laplace_evidence(made(Blocks, plainly), data(), **arguments)
    got = laplace_evidence(made(Blocks, CHECKPOINTED[run]), data(), **arguments)
    assert got.log_evidence == pytest.approx(plain.log_evidence, abs=1e-3)


def test_torch_is_as_it_was_afterwards():
    before = torch.embedding, torch.embedding_bag, torch.autocast.__enter__
    with pytest.raises(KeyError), isolated():
        assert torch.embedding is not before[0]
        raise KeyError
    assert before == (torch.embedding, torch.embedding_bag, torch.autocast.__enter__)
    assert "apply" not in vars(checkpointing.CheckpointFunction)
    assert checkpointing._checkpoint_without_reentrant_generator.__module__ == "torch.utils.checkpoint"


class Bag(nn.Module):
    def __init__(self, **arguments) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 4, **arguments), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


class Functional(nn.Module):
    def __init__(self, **arguments) -> None:
        super().__init__()
        self.table, self.arguments = nn.Parameter(torch.randn(5, 3)), arguments

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table, **self.arguments).sum(1)


@pytest.mark.parametrize("make", [Bag, Functional])
@pytest.mark.parametrize("argument", ["scale_grad_by_freq", "sparse"])
def test_gradients_of_embeddings_are_derivatives(make, argument):
    x, y = data(tokens=True)
    got = laplace_evidence(made(lambda: make(**{argument: True})), (x, y), structure="full")
    plain = made(make).double()
    twin = SlowTwin(plain, x, y, "classification")
    right = twin.evidence(dict.fromkeys(twin.names, 1.0), "full")
    assert got.log_evidence == pytest.approx(right.log_evidence, abs=1e-3)
    if make is Bag:  # torch has no second derivative of it
        return
    hessian = laplace_evidence(made(lambda: make(**{argument: True})), (x, y), curvature="hessian_positive")
    expected = laplace_evidence(made(make), (x, y), curvature="hessian_positive")
    assert hessian.log_evidence == pytest.approx(expected.log_evidence, abs=1e-4)


class ComplexLinear(nn.Module):
    """A complex map of a complex input, and a complex list; what is real of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3, dtype=torch.complex128)
        self.shifts = nn.ParameterList([nn.Parameter(torch.randn(3, dtype=torch.complex128))])
        self.nothing = nn.Parameter(torch.empty(0, 3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(torch.complex(x, x.cos())) + self.shifts[0].conj()
        return hidden.abs() + hidden.imag


class ComplexTied(nn.Module):
    """One complex parameter under two names, beside a real one, in the network's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.same, self.head = self.phase, nn.Linear(4, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * self.phase).abs() + (torch.fft.fft(x) * self.same).real)


class RealTwin(nn.Module):
    """The same with a real parameter for each complex one, by hand."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        network = copy.deepcopy(network)
        self.hold = [network]
        for name, parameter in network.named_parameters():
            parts = torch.view_as_real(parameter.detach()) if parameter.is_complex() else parameter.detach()
            self.register_parameter(name.replace(".", "_"), nn.Parameter(parts.clone()))

    def forward(self, x: Tensor) -> Tensor:
        values = {}
        for name, parameter in self.hold[0].named_parameters():
            mine = getattr(self, name.replace(".", "_"))
            values[name] = torch.complex(mine[..., 0], mine[..., 1]) if parameter.is_complex() else mine
        return torch.func.functional_call(self.hold[0], values, (x,), tie_weights=True)


@pytest.mark.filterwarnings("ignore:The per-example gradients of:UserWarning")
@pytest.mark.parametrize("make", [ComplexLinear, ComplexTied])
def test_a_complex_parameter_is_two_real_ones(make):
    torch.manual_seed(0)
    network, (x, y) = make(), data()
    x = x.double()
    twin = SlowTwin(RealTwin(network), x, y, "classification")
    right = twin.evidence(dict.fromkeys(twin.names, 0.7), "full")
    got = laplace_evidence(network, (x, y), structure="full", prior_precision=0.7)
    assert got.num_parameters == right.num_parameters
    assert_agrees(got, right)
    hessian = {"curvature": "hessian_positive", "prior_precision": 0.7}
    assert laplace_evidence(network, (x, y), **hessian).log_evidence == pytest.approx(
        laplace_evidence(RealTwin(network), (x, y), **hessian).log_evidence, abs=1e-8
    )
    for structure in ("kron", "diag", "blocks"):
        laplace_evidence(network, (x, y), structure=structure)
    assert all(
        p.is_complex() == q.is_complex()
        for p, q in zip(make().parameters(), network.parameters(), strict=True)
    )


class Module(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, weight_decay=0.1)


def fitted(tmp_path, module, **arguments):
    callbacks = [lb.LaplaceEvidence(), lb.GradientNoiseScale(every_n_steps=1), lb.Stability()]
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **quiet, **arguments
    )
    trainer.fit(module, DataLoader(TensorDataset(*data()), 7))
    return callbacks[0].history[-1][1].log_evidence, trainer


def compiled_part(module):
    module.network.one.compile(backend="eager")


def compiled_step(module):
    module.training_step = torch.compile(module.training_step, backend="eager")


def wrapped_part(module):
    module.network.two = torch.compile(module.network.two, backend="eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*num_workers:")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*logging interval:", "ignore:.*GradientNoiseScale:")
@pytest.mark.parametrize("change", [compiled_part, compiled_step, wrapped_part])
def test_compiled_parts_and_steps(tmp_path, change):
    right, _ = fitted(tmp_path, Module(made(Blocks, plainly)))
    module = Module(made(Blocks, plainly))
    change(module)
    got, _ = fitted(tmp_path, module)
    assert got == pytest.approx(right, abs=1e-3)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_tools_are_left_and_those_of_the_user_kept(hook):
    class Watch:
        """Holds what cannot be copied."""

        __module__ = "wandb.watching"

        def __init__(self) -> None:
            self.stream = (i for i in range(3))

        def note(self, *args):
            next(self.stream)

    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    getattr(network[0], hook)(Watch().note)
    network[1].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(3, 2)
    expected = 2 * network[1].forward(network[0].forward(x))
    torch.testing.assert_close(throw_away_copy(network)(x), expected)
