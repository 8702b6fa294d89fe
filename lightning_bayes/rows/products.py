"""Products with the rows of a whole data set and with its Gauss-Newton matrix, by passes over the data.

No row is formed. With v₍ₙ,c₎ = JₙᵀR[c, n] row (n, c) of V, and G = VᵀV = Σₙ JₙᵀΛₙJₙ in units of the dispersion:

- Vᵀu = Σₙ Jₙᵀ(Σ_c u₍c,n₎ R[c, n]) is one backward pass of the outputs.
- (Vw)₍ₙ,c₎ = ⟨Jₙw, R[c, n]⟩, and Jw is the derivative of ⟨Jᵀs, w⟩ in s, which is linear in it: one backward pass of a
  backward pass, the *double-backward trick*.
- Gw = Jᵀ(Λ(Jw)) needs no R.

Each pass runs the network once for each batch, whatever the number of vectors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bayes.capture.autograd_graph import IN_ORDINARY_OPERATIONS, check_differentiable
from lightning_bayes.capture.forward import Forward, forward_of
from lightning_bayes.capture.module_calls import output_widths, plain_kernels
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.rows.backward import VectorPasses, vectorised
from lightning_bayes.rows.reader import BatchRows, same_draws
from lightning_bayes.rows.rows import RowChunk

BATCHED_BYTES = 2**22
"""Bytes that what one module returns may take for all vectors of one batched backward pass, one vector at least."""
ANOTHER = 1e-3
"""Relative difference of the losses of two batches that are not the same."""
OTHERWISE = 'structure="full", "blocks", "kron" and "diag" do without.'


@dataclass(frozen=True)
class BatchJacobian:
    """The Jacobian J of the prepared outputs of one batch in the parameters, as a linear map.

    Attributes:
        outputs: [N, ...], with their graph.
        targets: Prepared.
        width: Bytes of the largest tensor that a module returned.
        dual: s, of the outputs' shape, None where J itself is not asked for.
        pulled_back: Jᵀs of the parameters with influence, a function of s.
    """

    outputs: Tensor
    targets: Any
    parameters: Mapping[str, nn.Parameter]
    width: int
    passes: VectorPasses
    dual: Tensor | None
    pulled_back: Mapping[str, Tensor]

    def chunks(self, num_vectors: int) -> Iterator[slice]:
        """Parts of k vectors that go through the network together."""
        size = max(1, BATCHED_BYTES // max(self.width, 1))
        for start in range(0, num_vectors, size):
            yield slice(start, min(start + size, num_vectors))

    def transposed_times(self, seeds: Tensor) -> dict[str, Tensor]:
        """Jᵀ times vectors [k, N, ...]: [k, *shape] for each parameter with influence."""
        parts = self.passes.back([self.outputs], list(self.parameters.values()), [seeds])
        return {name: part for name, part in zip(self.parameters, parts, strict=True) if part is not None}

    def times(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """J times vectors [k, *shape] of each parameter: [k, N, ...].

        Raises:
            ValueError: If PyTorch cannot differentiate the gradient of this network.
        """
        shape = (_num_vectors(vectors), *self.outputs.shape)
        if self.dual is None or not self.pulled_back:
            return self.outputs.new_zeros(shape)
        seeds = [vectors[name].to(part.dtype) for name, part in self.pulled_back.items()]
        try:
            (image,) = self.passes.back(list(self.pulled_back.values()), [self.dual], seeds)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"The gradient of this network has no derivative: {error}. {IN_ORDINARY_OPERATIONS} {OTHERWISE}"
            ) from error
        return self.outputs.new_zeros(shape) if image is None else image


class DataPasses:
    """V and G of a whole data set as linear maps: a product with k vectors is one pass over the data.

    Vectors of parameters are {name: [k, *shape]}. Those of rows are one tensor [k, C, N] for each batch, with the
    columns in the order of `likelihood.sqrt_hessian`; C differs between batches whose sequences differ in length.

    Networks that draw random numbers draw the same ones at each pass, and leave the streams of torch as they are.

    Args:
        network: A throw-away copy in eval mode.
        parameters: Those that carry a prior.
        likelihood: Of the targets given the outputs.
        forwards: Gives the same batches again at each call.
        read: That of a reader of rows; None where these are not wanted again.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        likelihood: Likelihood,
        forwards: Callable[[], Iterable[Forward]],
        read: Callable[..., BatchRows] | None = None,
    ) -> None:
        self._read = read
        self._losses: dict[int, float] = {}  # of each batch, in the first pass
        self.parameters = dict(parameters)
        self._network = network
        self._likelihood = likelihood
        self._forwards = forwards
        self._passes = VectorPasses()
        self._is_checked = False  # that the gradient has a derivative
        self._is_recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
        for module in network.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # a sparse gradient has no derivative

    def chunks(self) -> Iterator[RowChunk]:
        """The rows of all batches once more."""
        if self._read is None:
            raise TypeError("These passes were made without a reader of rows.")
        for number, forward in enumerate(self._forwards()):
            yield from self._read(forward, self._likelihood, number).chunks

    def combine(self, coefficients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Vᵀu = Σ u₍c,n₎ v₍ₙ,c₎: {name: [k, *shape]}, for u of each batch [k, C, N].

        Raises:
            ValueError: If there are not as many u as batches.
        """
        sums = self._zeros(len(coefficients[0]))
        for number, (forward, own) in enumerate(zip(self._forwards(), coefficients, strict=True)):
            batch = self._batch(number, forward)
            root = self._likelihood.sqrt_hessian(batch.outputs, batch.targets)
            for chunk in batch.chunks(len(own)):
                seeds = torch.einsum("kcn,cno->kno", own[chunk].to(root), root.flatten(2))
                _add(sums, chunk, batch.transposed_times(seeds.view(-1, *root.shape[1:])))
            del batch  # its graph, before there is another one
        return self._rounded(sums)

    def dot(self, vectors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Vw: the inner products ⟨v₍ₙ,c₎, w⟩ of each batch, [k, C, N], for w {name: [k, *shape]}.

        Raises:
            ValueError: If PyTorch cannot differentiate the gradient of this network.
        """
        for number, forward in enumerate(self._forwards()):
            yield self._dot_batch(number, forward, vectors)

    def _dot_batch(self, number: int, forward: Forward, vectors: Mapping[str, Tensor]) -> Tensor:
        batch = self._batch(number, forward, right=True)
        root = self._likelihood.sqrt_hessian(batch.outputs, batch.targets).flatten(2)
        images = [batch.times(_some(vectors, chunk)) for chunk in batch.chunks(_num_vectors(vectors))]
        return torch.einsum("kno,cno->kcn", torch.cat(images).flatten(2), root)

    def product(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gw: {name: [k, *shape]}, for w of such shapes; no column of a root is formed.

        Raises:
            ValueError: If PyTorch cannot differentiate the gradient of this network.
        """
        sums = self._zeros(_num_vectors(vectors))
        for number, forward in enumerate(self._forwards()):
            batch = self._batch(number, forward, right=True)
            for chunk in batch.chunks(_num_vectors(vectors)):
                image = batch.times(_some(vectors, chunk))
                curved = self._likelihood.hessian_product(batch.outputs, batch.targets, image)
                _add(sums, chunk, batch.transposed_times(curved))
            del batch  # its graph, before there is another one
        return self._rounded(sums)

    def _batch(self, number: int, forward: Forward, right: bool = False) -> BatchJacobian:
        """Run the network on one batch, with what J itself needs where it is multiplied from the right."""
        dual: Tensor | None = None
        pulled_back: dict[str, Tensor] = {}
        with (
            same_draws(number, next(iter(self.parameters.values())).device),
            torch.enable_grad(),
            self._kernels(),
            output_widths(self._network) as widths,
        ):
            outputs, targets, loss = forward_of(forward, self._likelihood)
            self._check_repeated(number, loss.item())
            if right:
                # Any s does; some people's backward passes leave out what is 0.
                dual = torch.ones_like(outputs, requires_grad=True)
                parts = torch.autograd.grad(
                    outputs, list(self.parameters.values()), dual, create_graph=True, allow_unused=True
                )
                pulled_back = {
                    name: part
                    for name, part in zip(self.parameters, parts, strict=True)
                    if part is not None and part.requires_grad
                }
                if not self._is_checked:  # once: the batches go through the same operations
                    check_differentiable(list(pulled_back.values()), OTHERWISE)
                    self._is_checked = True
        width = max(outputs.numel() * outputs.element_size(), *widths)
        return BatchJacobian(outputs, targets, self.parameters, width, self._passes, dual, pulled_back)

    def _check_repeated(self, number: int, loss: float) -> None:
        """Raise where a batch is another one than in the first pass."""
        first = self._losses.setdefault(number, loss)
        if abs(loss - first) > ANOTHER * max(abs(first), 1.0):
            raise EvidenceUnavailableError(
                f"Batch {number} has a loss of {loss:.6g}, and had {first:.6g} when the data were read before: this "
                "structure reads them more than once, and they are drawn anew each time. Let transforms draw from "
                "torch's, NumPy's or Python's own random stream, which is the same in each pass, or leave "
                "augmentation out; " + OTHERWISE
            )

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Those whose backward pass has a backward pass, which fused ones of recurrent layers do not."""
        with ExitStack() as stack:
            stack.enter_context(plain_kernels())
            if self._is_recurrent:
                stack.enter_context(vectorised())
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def _zeros(self, num_vectors: int) -> dict[str, Tensor]:
        # In float64 the additions would take a quarter of the time of wide layers, whose gradients of one batch have
        # been rounded already.
        return {
            name: parameter.new_zeros(
                (num_vectors, *parameter.shape), dtype=torch.promote_types(parameter.dtype, torch.float32)
            )
            for name, parameter in self.parameters.items()
        }

    def _rounded(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: total.to(self.parameters[name].dtype) for name, total in sums.items()}


def _num_vectors(vectors: Mapping[str, Tensor]) -> int:
    return len(next(iter(vectors.values())))


def _some(vectors: Mapping[str, Tensor], chunk: slice) -> dict[str, Tensor]:
    return {name: vector[chunk] for name, vector in vectors.items()}


def _add(sums: Mapping[str, Tensor], chunk: slice, parts: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        sums[name][chunk] += part
