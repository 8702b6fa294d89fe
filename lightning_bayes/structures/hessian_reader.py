"""The Hessian of the negative log-likelihood of one batch, row by row or by products, in float64."""

import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_bayes.capture.autograd_graph import check_differentiable, gradient_to_differentiate
from lightning_bayes.capture.forward import check_apart, forward_of
from lightning_bayes.errors import check_finite
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.rows.reader import BatchRows
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import DEFAULT_BUDGET, Budget

ROWS_AT_ONCE = 64
"""Rows of the Hessian that one batched backward pass gives."""


@dataclass(frozen=True)
class HessianChunk(RowChunk):
    """The Hessian of the unit loss of one batch, whose p rows are no rows of a root.

    Attributes:
        rounding: Relative, of the type that it was computed in.
    """

    matrix: Tensor  # [p, p]
    rounding: float


class HessianReader:
    """Forms the Hessian of the unit loss in some parameters of a network, one batch at a time.

    In float64, whatever the network's type: eigenvalues may be negative, so what float32 makes of small ones is not
    told from what they are. A network that does not run in float64 is read as it is, with a warning.

    Args:
        network: A throw-away copy in eval mode; it becomes float64.
        parameters: Names, as in `network.named_parameters()`, of the parameters that carry a prior.
        budget: Memory that the matrix may take.

    Raises:
        ValueError: If the matrix would not fit into it.
    """

    split = "The Hessian is formed by autograd, twice"

    def __init__(
        self, network: nn.Module, parameters: Collection[str], budget: Budget = DEFAULT_BUDGET
    ) -> None:
        self._network = network
        named = dict(network.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in parameters}
        self._one_by_one = False
        dtypes = {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}
        on = next(network.parameters()).device
        self._widened = dtypes != {torch.float64} and accumulation_dtype(on) == torch.float64
        size = sum(parameter.numel() for parameter in self.parameters.values())
        memory = 4.0 * 8 * size**2
        if memory > budget.hessian_memory:
            raise ValueError(
                f"The Hessian of {size:,} parameters takes {memory / 1e9:.3g} GB beside as many backward "
                f"passes as parameters; up to {int(math.sqrt(budget.hessian_memory / 32)):,} are accepted. Use "
                'curvature="ggn", or subset_of_weights= for a part of the network.'
            )
        if self._widened:
            network.double()

    def read(
        self,
        forward: Callable[[], tuple[Tensor, Tensor]],
        likelihood: Likelihood,
        draw: int | None = None,
    ) -> BatchRows:
        """Run one batch through the network and differentiate its unit loss twice; it is read once only.

        Raises:
            EvidenceUnavailableError: If the outputs, targets or gradients are not finite.
            ValueError: If outputs and targets do not fit the likelihood, or the second derivative is wrong
                or missing.
        """
        if self._widened:
            try:
                return self._read(forward, likelihood)
            except (RuntimeError, TypeError, ValueError) as error:
                # What float64 is not to blame for fails again.
                self._widened, self._one_by_one = False, False
                self._network.float()
                batch = self._read(forward, likelihood)
                warnings.warn(
                    "The Hessian is formed in float32, whose rounding the bounds hold: the network "
                    f"does not run in float64 ({type(error).__name__}: {error}). Give a model that runs after "
                    'model.double(), or use curvature="ggn".',
                    stacklevel=2,
                )
                return batch
        return self._read(forward, likelihood)

    def _read(self, forward: Callable[[], tuple[Tensor, Tensor]], likelihood: Likelihood) -> BatchRows:
        parameters = list(self.parameters.values())
        with torch.enable_grad(), _twice_differentiable():
            with InFloat64() if self._widened else nullcontext():
                outputs, targets, unit_loss = forward_of(forward, likelihood)
            gradient = gradient_to_differentiate(unit_loss, parameters)
            check_differentiable(gradient, 'curvature="ggn" does without.')
            for name, part in zip(self.parameters, gradient, strict=True):
                check_finite(part.detach(), f"the gradient of the parameter {name!r}")
            flat = torch.cat([part.flatten() for part in gradient])
            matrix = torch.cat(list(self._rows(flat, parameters)))
            _check_symmetric(matrix, flat.dtype)
            with InFloat64() if self._widened else nullcontext():
                check_apart(forward, outputs, likelihood, self._network, self.parameters)
        size, rounding = len(flat), torch.finfo(flat.dtype).eps
        return BatchRows(
            num_examples=len(outputs),
            num_terms=likelihood.num_terms(outputs, targets),
            num_observed=likelihood.num_observed(outputs, targets),
            unit_loss=unit_loss.item(),
            null_loss=likelihood.null_loss(outputs, targets),
            gradient={n: part.detach() for n, part in zip(self.parameters, gradient, strict=True)},
            chunks=iter([HessianChunk(len(outputs), slice(0, size), size, [], matrix, rounding)]),
        )

    def _rows(self, flat: Tensor, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
        accurate = accumulation_dtype(flat.device)
        if not flat.requires_grad:  # no parameter is in its graph
            yield flat.new_zeros(len(flat), len(flat), dtype=accurate)
            return
        for start in range(0, len(flat), ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, len(flat) - start)
            seeds = flat.new_zeros(rows, len(flat))
            seeds[:, start:].fill_diagonal_(1.0)
            yield self._products(flat, parameters, seeds).to(accurate)

    def _products(self, flat: Tensor, parameters: list[nn.Parameter], seeds: Tensor) -> Tensor:
        """Rows `seeds` of the Hessian [rows, p], all in one backward pass where the graph allows it."""
        if not self._one_by_one:
            try:
                parts = torch.autograd.grad(
                    flat, parameters, seeds, retain_graph=True, is_grads_batched=True, allow_unused=True
                )
                return torch.cat(
                    [
                        seeds.new_zeros(len(seeds), parameter.numel())
                        if part is None
                        else part.reshape(len(seeds), -1)
                        for parameter, part in zip(parameters, parts, strict=True)
                    ],
                    dim=1,
                )
            except RuntimeError as error:  # an operation that vmap does not know
                self._one_by_one = True
                logging.getLogger("lightning_bayes").info(
                    "The Hessian is formed row by row, which is slower: torch.vmap cannot batch this network's "
                    "backward pass (%s).",
                    error,
                )
        rows = []
        for seed in seeds:
            parts = torch.autograd.grad(flat, parameters, seed, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)


def _check_symmetric(matrix: Tensor, dtype: torch.dtype) -> None:
    """Refuse what is no second derivative: autograd's formulas for some fused kernels are wrong."""
    difference, largest = (matrix - matrix.mT).abs().max(), matrix.abs().max()
    if bool(difference > torch.finfo(dtype).eps ** 0.5 * largest):
        raise ValueError(
            f"The Hessian that autograd gives is not symmetric, by {difference:g} of {largest:g}: some operation of "
            "this network has a wrong second derivative in PyTorch (torch.nn.utils.parametrizations.weight_norm is "
            'known for it). Use curvature="ggn".'
        )


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Choose kernels whose backward pass has a backward pass."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class InFloat64(TorchFunctionMode):
    """Turns every float32 tensor, and every request for one, into float64.

    The parameters and buffers of the network are to be float64 themselves; this takes care of the batch, of plain
    tensors that a module holds or makes, and of casts. One tensor has one double for as long as the mode lasts, so
    that what is written in place, or through a view, is read again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._doubles: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the tensors, so that no id is used again

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # shape, device and the like
            return func(*args, **(kwargs or {}))
        if func is Tensor.float:
            func = Tensor.double
        return self._widened(func(*self._widened(args), **self._widened(kwargs or {})))

    def _widened(self, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return self._double_of(thing) if thing.dtype == torch.float32 else thing
        if thing is torch.float32:
            return torch.float64
        if type(thing) in (list, tuple):
            return type(thing)(self._widened(part) for part in thing)
        if type(thing) is dict:
            return {key: self._widened(part) for key, part in thing.items()}
        return thing

    def _double_of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._doubles:
            self._doubles[id(tensor)] = tensor, tensor.to(torch.float64)
        return self._doubles[id(tensor)][1]
