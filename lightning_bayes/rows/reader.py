"""Runs a network over batches and reads the rows of its parameters.

Why not `backpack.extend`: its hooks make each layer's output a view that no in-place operation may touch,
form weight gradients that nobody asked for, and keep one call per module. The hook here notes arguments and
output and hands a clone on, so `x += y`, `relu_` and modules called twice are ordinary graph. The network must
be a throw-away copy all the same: BackPACK reads `input0` and `output` off the module.
"""

from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_bayes.capture.forward import check_apart, forward_of
from lightning_bayes.capture.module_calls import Call, plain_kernels, recorded_calls
from lightning_bayes.errors import check_finite
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.rows.backward import Batch, ColumnPasses, find_layouts, proof_of
from lightning_bayes.rows.layers import CONVOLUTIONS, derivatives_of, pad_beforehand
from lightning_bayes.rows.routes import Plan, PlanMismatch, find_ways
from lightning_bayes.rows.rows import RowChunk, Rows

CHUNK_BYTES = 5e8
"""Gradients in layer outputs that are held at one time, one column of the root at least."""


@dataclass(frozen=True)
class BatchRows:
    """Everything that one batch says about the evidence; sums over its examples."""

    num_examples: int
    num_terms: float
    """What PyTorch's mean-reduced loss divides by."""
    num_observed: float
    """Summed weights of the log-densities in `unit_loss`."""
    unit_loss: float
    """In units of the dispersion."""
    null_loss: float | None
    """Summed unit loss of guessing, None where there is no guess."""
    gradient: dict[str, Tensor]
    """Gradient of `unit_loss`, per parameter, in its shape."""
    chunks: Iterator[RowChunk]
    """To be consumed once, before the next batch is read."""


@dataclass
class BatchSums:
    """What batches add up to beside their rows."""

    gradient: dict[str, Tensor]
    unit_loss: float = 0.0
    null_loss: float | None = 0.0
    num_terms: float = 0.0
    num_observed: float = 0.0
    num_examples: int = 0
    num_batches: int = 0

    def add(self, batch: BatchRows) -> None:
        """Add all of a batch but its rows."""
        self.num_examples += batch.num_examples
        self.num_batches += 1
        self.unit_loss += batch.unit_loss
        self.num_terms += batch.num_terms
        self.num_observed += batch.num_observed
        if self.null_loss is not None:
            self.null_loss = None if batch.null_loss is None else self.null_loss + batch.null_loss
        for name, part in batch.gradient.items():
            self.gradient[name] += part


@contextmanager
def same_draws(number: int, device: torch.device) -> Iterator[None]:
    """Let torch's streams draw what they draw for this number, and leave them as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            torch.cuda.manual_seed_all(number)
        yield


class RowReader:
    """Reads the rows of some parameters of a network, one batch at a time.

    Args:
        network: A throw-away copy in eval mode; it is left with hooks and attributes of its own.
        parameters: Names, as in `network.named_parameters()`, of the parameters that carry a prior.
        num_samples: Columns of the root to sample, None for all of it.
        backend: "auto" takes the derivatives of layers where they are known and torch.func elsewhere;
            "backpack" the former alone, "autograd" the latter.

    Attributes:
        parameters: Those that carry a prior.
        split: What is read in which way, after the first batch; one line.
    """

    _proofs: Container[int] | None = None
    """Numbers of the batches at which the plan is tried; None for all."""

    def __init__(
        self,
        network: nn.Module,
        parameters: Collection[str],
        num_samples: int | None = None,
        backend: str = "auto",
    ) -> None:
        self.split = ""
        named = dict(network.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in parameters}
        self._network = network
        self._num_samples = num_samples
        self._backend = backend
        self._generator: torch.Generator | None = None
        self._plan: Plan | None = None
        self._passes = ColumnPasses()
        self._read = 0  # batches
        self._apart = False  # whether examples have been seen not to influence each other
        wanted = {id(parameter) for parameter in self.parameters.values()}
        self._holders = [
            module for module in network.modules() if any(id(p) in wanted for p in module.parameters())
        ]
        self._recorded = self._holders  # modules whose calls are noted: fewer once there is a plan
        for module in self._holders:
            if isinstance(module, CONVOLUTIONS):
                pad_beforehand(module)
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # gradients are compared entry by entry

    def read(
        self,
        forward: Callable[[], tuple[Tensor, Tensor]],
        likelihood: Likelihood,
        draw: int | None = None,
    ) -> BatchRows:
        """Run one batch through the network and return its rows.

        Args:
            forward: Runs the network and returns its outputs, with their graph, and the targets. A
                `BatchForward` lets all outputs be held against those of the same examples regrouped.
            likelihood: Of the targets given the outputs.
            draw: Number that a network which draws at random draws by; None for the stream as it stands.

        Raises:
            EvidenceUnavailableError: If the outputs, targets or gradients are not finite.
            ValueError: If outputs and targets do not fit the likelihood, or if the examples of the batch are
                not independent.
        """
        run = self._run if draw is None else partial(self._run_alike, draw)
        outputs, targets, unit_loss, calls = run(forward, likelihood, self._recorded)
        gradient = torch.autograd.grad(
            unit_loss, list(self.parameters.values()), retain_graph=True, materialize_grads=True
        )
        for name, part in zip(self.parameters, gradient, strict=True):
            check_finite(part, f"the gradient of the parameter {name!r}")
        if self._num_samples is None:
            roots = likelihood.sqrt_hessian(outputs, targets)
        else:
            if self._generator is None:  # one stream for all batches of a pass
                self._generator = torch.Generator(device=outputs.device).manual_seed(0)
            roots = likelihood.sample_columns(outputs, targets, self._num_samples, self._generator)
        num_terms = likelihood.num_terms(outputs.detach(), targets)
        null_loss = likelihood.null_loss(outputs.detach(), targets)
        num_observed = likelihood.num_observed(outputs.detach(), targets)
        with plain_kernels():
            self._apart = check_apart(forward, outputs, likelihood, self._network, self.parameters)
        return BatchRows(
            num_examples=len(outputs),
            num_terms=num_terms,
            num_observed=num_observed,
            unit_loss=unit_loss.item(),
            null_loss=null_loss,
            gradient=dict(zip(self.parameters, gradient, strict=True)),
            chunks=self._chunks(calls, outputs, roots, lambda: run(forward, likelihood, self._holders)),
        )

    def _run_alike(
        self,
        draw: int,
        forward: Callable[[], tuple[Tensor, Tensor]],
        likelihood: Likelihood,
        modules: list[nn.Module],
    ) -> tuple[Tensor, Tensor, Tensor, list[Call]]:
        """`_run` with the random numbers of one number: the same whenever the batch is read."""
        with same_draws(draw, next(iter(self.parameters.values())).device):
            return self._run(forward, likelihood, modules)

    def _run(
        self, forward: Callable[[], tuple[Tensor, Tensor]], likelihood: Likelihood, modules: list[nn.Module]
    ) -> tuple[Tensor, Tensor, Tensor, list[Call]]:
        with torch.enable_grad(), plain_kernels(), recorded_calls(modules) as calls:
            outputs, targets, unit_loss = forward_of(forward, likelihood)
        return outputs, targets, unit_loss, calls

    def _chunks(
        self,
        calls: list[Call],
        outputs: Tensor,
        roots: Tensor,
        run_again: Callable[[], tuple[Tensor, Tensor, Tensor, list[Call]]],
    ) -> Iterator[RowChunk]:
        """The rows, as many columns at a time as `CHUNK_BYTES` hold gradients of."""
        width = sum(tensor.numel() * tensor.element_size() for call in calls for tensor in call.outputs)
        step = max(1, int(CHUNK_BYTES // max(width, 1)))
        for start in range(0, len(roots), step):
            columns = slice(start, min(start + step, len(roots)))
            make = partial(self._passes.back, calls, outputs, roots[columns])

            def again(columns: slice = columns) -> Batch:
                nonlocal outputs, calls  # which the columns that follow need too
                outputs, _, _, calls = run_again()  # with all calls
                return self._passes.back(calls, outputs, roots[columns])

            # What holds for all columns together is tried once, with the first of them.
            proved = roots if start == 0 else None
            yield RowChunk(len(outputs), columns, len(roots), self._layers(make, again, proved))

    def _layers(
        self, make: Callable[[], Batch], again: Callable[[], Batch], roots: Tensor | None
    ) -> list[Rows]:
        """The rows of a batch, by the plan, or by a new one where there is none or it is not right.

        Args:
            make: Takes the columns back, to the calls that the plan wants, or all of them.
            again: Runs the batch once more and takes the columns back to all calls.
            roots: All columns of the batch where these are the first of them; None where the plan has been tried.
        """
        if roots is not None:  # the first columns of a batch
            self._read += 1
        layers = self._by_plan(make, roots)
        if layers is None:
            layers = self._by_new_plan(make if self._plan is None else again, roots)
        return layers

    def _by_plan(self, make: Callable[[], Batch], roots: Tensor | None) -> list[Rows] | None:
        """The rows of a batch by the plan, tried where that is due; None where there is no plan, or it is not right.

        A network that takes another way for some examples may not have done so in the batches before.
        """
        plan, is_due = self._plan, self._proofs is None or self._read in self._proofs
        if plan is None:
            return None
        batch = make()
        try:
            layers = plan.layers(batch)
            proof = proof_of(batch, roots) if is_due and roots is not None else None
            if proof is not None:
                of_all_columns = len(batch.roots) == len(proof.columns)
                if plan.wrong(proof, layers if of_all_columns else None):
                    return None
        except PlanMismatch:
            return None
        return layers

    def _by_new_plan(self, make: Callable[[], Batch], roots: Tensor | None) -> list[Rows]:
        """The rows of a batch, taken back to all calls, by a plan that is made on it."""
        batch = make()
        proof = proof_of(batch, batch.roots if roots is None else roots)
        tried = batch if proof is None else proof.batch  # one column tells as much as all
        layouts = find_layouts(tried)
        known = ((module, derivatives_of(module)) for module in self._holders)
        derivatives = {
            module: its for module, its in known if its is not None and self._backend != "autograd"
        }
        blank = Plan(self._network, self.parameters, {}, layouts, batch.num_examples, derivatives)
        plan = find_ways(blank, tried, proof, self._backend, self._apart)
        self.split = plan.summary()
        # What is not proved is made anew on the next batch.
        self._plan, self._recorded = (None, self._holders) if proof is None else (plan, plan.modules)
        return plan.layers(batch)
