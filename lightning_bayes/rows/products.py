"""Products with the rows of a whole data set, and with the Gauss-Newton matrix, by passes over the data; no row formed.

With the symbols of `rows`, row (n, c) of V is v₍ₙ,c₎ = JₙᵀR[c, n] and G = VᵀV = Σₙ JₙᵀΛₙJₙ, in units of the dispersion:

- Vᵀu = Σₙ Jₙᵀ(Σ_c u₍c,n₎ R[c, n]) is one backward pass of the outputs.
- (Vw)₍ₙ,c₎ = ⟨Jₙw, R[c, n]⟩, and Jw is the derivative of ⟨Jᵀs, w⟩ in s, which is linear in it: one backward pass of a
  backward pass, the *double-backward trick*.
- Gw = Jᵀ(Λ(Jw)) needs no R.

Each pass runs the network once for each batch, whatever the number of vectors.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bayes.capture.autograd_graph import check_differentiable
from lightning_bayes.capture.forward import Forward, forward_of
from lightning_bayes.capture.module_calls import plain_kernels, tensors_of
from lightning_bayes.errors import check_finite
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.rows.backward import quiet_loops, vectorised
from lightning_bayes.rows.reader import BatchRows
from lightning_bayes.rows.rows import RowChunk

BATCHED_BYTES = 2**26
"""Bytes that what a module returns may take for all vectors of one batched backward pass, one vector at least.

The pass holds a few such tensors at a time.
"""


@dataclass
class VectorPasses:
    """Backward passes of several vectors through one graph: batched, or one after the other where vmap cannot."""

    one_by_one: bool = False

    def back(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients [k, *shape] of Σ ⟨seed, output⟩ in each input, None without influence; the graph stays.

        Args:
            outputs: Each of its own shape.
            inputs: On the way to them.
            seeds: k for each output, [k, *shape].
        """

        def of(grads: Sequence[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                outputs, inputs, grads, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        num_vectors = len(seeds[0])
        if num_vectors > 1 and not self.one_by_one:
            try:
                with quiet_loops():
                    return of(seeds, batched=True)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:  # an operation that vmap does not know
                self.one_by_one = True
                logging.getLogger("lightning_bayes").info(
                    "Vectors are taken through the network one by one, which is slower: torch.vmap cannot batch its "
                    "backward pass (%s).",
                    error,
                )
        each = [of([seed[j] for seed in seeds], batched=False) for j in range(num_vectors)]
        return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True))


@dataclass(frozen=True)
class BatchJacobian:
    """J of the prepared outputs of one batch in the parameters, by its products.

    Attributes:
        outputs: With their graph, [N, ...].
        targets: Prepared.
        width: Bytes of the largest tensor that a module returned.
    """

    outputs: Tensor
    targets: Any
    parameters: Mapping[str, nn.Parameter]
    width: int
    passes: VectorPasses
    seed: Tensor | None
    """s, where J is to be multiplied from the right."""
    pulled: Mapping[str, Tensor]
    """Jᵀs of the parameters with influence, with its graph."""

    def chunks(self, num_vectors: int) -> Iterator[slice]:
        """Parts of k vectors that go through the network together."""
        size = max(1, BATCHED_BYTES // max(self.width, 1))
        for start in range(0, num_vectors, size):
            yield slice(start, min(start + size, num_vectors))

    def transposed_times(self, seeds: Tensor) -> dict[str, Tensor]:
        """Jᵀ times vectors [k, N, ...], for each parameter with influence [k, *shape]."""
        parts = self.passes.back([self.outputs], list(self.parameters.values()), [seeds])
        return {name: part for name, part in zip(self.parameters, parts, strict=True) if part is not None}

    def times(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """J times vectors [k, *shape] of each parameter, [k, N, ...]."""
        num_vectors = len(next(iter(vectors.values())))
        if not self.pulled:
            return self.outputs.new_zeros(num_vectors, *self.outputs.shape)
        seeds = [vectors[name].to(part.dtype) for name, part in self.pulled.items()]
        (image,) = self.passes.back(list(self.pulled.values()), [self.seed], seeds)
        return image


class DataPasses:
    """V and G of a data set as linear maps, each product one pass over the data.

    Vectors of parameters are {name: [k, *shape]}; those of rows are one tensor [k, C, N] for each batch, C in the order
    of `likelihood.sqrt_hessian`, and may have another C where sequences have another length.

    Args:
        network: A throw-away copy in eval mode.
        parameters: Those that carry a prior, by name.
        likelihood: Of the targets given the outputs.
        forwards: Gives the same batches again at each call.
        read: Returns what one batch says, with its rows.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        likelihood: Likelihood,
        forwards: Callable[[], Iterable[Forward]],
        read: Callable[[Forward], BatchRows] | None = None,
    ) -> None:
        self._read = read
        self.parameters = dict(parameters)
        self._network = network
        self._likelihood = likelihood
        self._forwards = forwards
        self._passes = VectorPasses()
        self._checked = False
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
        for module in network.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False

    def chunks(self) -> Iterator[RowChunk]:
        """The rows of all batches once more."""
        if self._read is None:
            raise TypeError("These passes were made without a reader of rows.")
        for forward in self._forwards():
            yield from self._read(forward).chunks

    def combine(self, coefficients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Vᵀu = Σ u₍c,n₎ v₍ₙ,c₎, {name: [k, *shape]}, for u of each batch [k, C, N]."""
        sums = self._zeros(len(coefficients[0]))
        for batch, own in zip(self._batches(), coefficients, strict=True):
            root = self._likelihood.sqrt_hessian(batch.outputs, batch.targets)
            for chunk in batch.chunks(len(own)):
                seeds = torch.einsum("kcn,cno->kno", own[chunk].to(root), root.flatten(2))
                self._add(sums, chunk, batch.transposed_times(seeds.view(-1, *root.shape[1:])))
        return self._rounded(sums)

    def dot(self, vectors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Vw, for each batch [k, C, N], for w {name: [k, *shape]}."""
        num_vectors = len(next(iter(vectors.values())))
        for batch in self._batches(twice=True):
            root = self._likelihood.sqrt_hessian(batch.outputs, batch.targets).flatten(2)
            along = [batch.times(_part(vectors, chunk)) for chunk in batch.chunks(num_vectors)]
            yield torch.einsum("kno,cno->kcn", torch.cat(along).flatten(2), root)

    def product(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gw, {name: [k, *shape]}, for w of such shapes."""
        num_vectors = len(next(iter(vectors.values())))
        sums = self._zeros(num_vectors)
        for batch in self._batches(twice=True):
            for chunk in batch.chunks(num_vectors):
                along = batch.times(_part(vectors, chunk))
                curved = self._likelihood.hessian_product(batch.outputs, batch.targets, along)
                self._add(sums, chunk, batch.transposed_times(curved))
        return self._rounded(sums)

    def _batches(self, twice: bool = False) -> Iterator[BatchJacobian]:
        for forward in self._forwards():
            with torch.enable_grad(), self._kernels(), _widths(self._network) as widths:
                outputs, targets, _ = forward_of(forward, self._likelihood)
                seed, pulled = None, {}
                if twice:
                    seed = torch.zeros_like(outputs, requires_grad=True)
                    parts = torch.autograd.grad(
                        outputs, list(self.parameters.values()), seed, create_graph=True, allow_unused=True
                    )
                    pulled = {n: p for n, p in zip(self.parameters, parts, strict=True) if p is not None}
                    if not self._checked:
                        check_differentiable(list(pulled.values()))
                        self._checked = True
            width = max([outputs.numel() * outputs.element_size(), *widths])
            yield BatchJacobian(outputs, targets, self.parameters, width, self._passes, seed, pulled)

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(plain_kernels())
            if self._recurrent:
                stack.enter_context(vectorised())
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def _zeros(self, num_vectors: int) -> dict[str, Tensor]:
        return {
            name: torch.zeros(
                num_vectors,
                *parameter.shape,
                dtype=accumulation_dtype(parameter.device),
                device=parameter.device,
            )
            for name, parameter in self.parameters.items()
        }

    def _add(self, sums: dict[str, Tensor], chunk: slice, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            sums[name][chunk] += part

    def _rounded(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: total.to(self.parameters[name].dtype) for name, total in sums.items()}


@contextmanager
def _widths(network: nn.Module) -> Iterator[list[int]]:
    """Note the bytes of each tensor that a module returns."""
    widths: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        widths.extend(tensor.numel() * tensor.element_size() for tensor in tensors_of(output))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    try:
        yield widths
    finally:
        for handle in handles:
            handle.remove()


def _part(vectors: Mapping[str, Tensor], chunk: slice) -> dict[str, Tensor]:
    return {name: vector[chunk] for name, vector in vectors.items()}
