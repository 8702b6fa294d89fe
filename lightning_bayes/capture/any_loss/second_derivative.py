"""The first two derivatives of a loss in the tensors that it is computed from, example by example."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.capture.autograd_graph import check_differentiable, gradient_to_differentiate
from lightning_bayes.capture.example_layout import Layout, example_weights

ROUNDING = 1e3
"""Allowed difference in units of the type's rounding, relative to the sum of what is compared."""
COLUMNS_AT_ONCE = 64


class Derivatives:
    """The gradient of a loss in some tensors of its graph, and products with its Hessian in them.

    Args:
        loss: A scalar with its graph.
        tensors: In that graph, none of them behind another.

    Raises:
        ValueError: If the gradient has no derivative.
    """

    def __init__(self, loss: Tensor, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.graded = gradient_to_differentiate(loss, self.tensors)
        check_differentiable(self.graded)
        self.gradient = [part.detach() for part in self.graded]

    def products(self, seeds: Sequence[Tensor]) -> list[Tensor]:
        """H times one vector, of which each tensor has a part [*shape], or times k vectors, [k, *shape] each."""
        if seeds[0].dim() == self.tensors[0].dim():
            return self._back(self.graded, seeds)
        try:
            return self._back(self.graded, seeds, is_grads_batched=True)
        except RuntimeError:  # an operation that vmap does not know
            columns = [self._back(self.graded, [seed[k] for seed in seeds]) for k in range(len(seeds[0]))]
            return [torch.stack(parts) for parts in zip(*columns, strict=True)]

    def is_zero(self) -> bool:
        """Whether the gradient is constant: the loss is affine in the tensors."""
        return not any(bool(part.any()) for part in self.products(self.random()))

    def is_quadratic(self) -> bool:
        """Whether the Hessian is constant."""
        images = self._back(self.graded, self.random(), create_graph=True)
        graded = [image for image in images if image.requires_grad]
        thirds = self._back(graded, [torch.ones_like(image) for image in graded]) if graded else []
        return not any(bool(part.any()) for part in thirds)

    def random(self) -> list[Tensor]:
        """One vector whose entries are between 1 and 2, or minus that; the same each time."""
        generator = torch.Generator().manual_seed(0)
        vectors = []
        for tensor in self.tensors:
            signed = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
            vectors.append((2 * signed + signed.sign()).to(tensor))
        return vectors

    def _back(
        self,
        functions: Sequence[Tensor],
        seeds: Sequence[Tensor],
        create_graph: bool = False,
        is_grads_batched: bool = False,
    ) -> list[Tensor]:
        parts = torch.autograd.grad(
            functions,
            self.tensors,
            seeds,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=is_grads_batched,
        )
        like = seeds if is_grads_batched else self.tensors
        return [
            torch.zeros_like(zero) if part is None else part for part, zero in zip(parts, like, strict=True)
        ]


@dataclass(frozen=True)
class Outputs:
    """Tensors of a batch as one row of outputs for each example.

    Attributes:
        tensors: With their graphs.
        layouts: Where the examples stand in each.
        num_examples: N.
    """

    tensors: Sequence[Tensor]
    layouts: Sequence[Layout]
    num_examples: int

    def rows(self, parts: Sequence[Tensor]) -> Tensor:
        """[N, K] from parts of the tensors' shapes."""
        flat = [
            layout.apart(part, self.num_examples).reshape(self.num_examples, -1)
            for part, layout in zip(parts, self.layouts, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def places(self) -> list[Tensor]:
        """Of each tensor the flat indices of its entries in the order of `rows`, [N, k]."""
        places = []
        for tensor, layout in zip(self.tensors, self.layouts, strict=True):
            indices = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
            places.append(layout.apart(indices, self.num_examples).reshape(self.num_examples, -1))
        return places

    def parts(self, rows: Tensor) -> list[Tensor]:
        """Parts of the tensors' shapes from [N, K], or [k, *shape] from [k, N, K]."""
        parts, start = [], 0
        for tensor, places in zip(self.tensors, self.places(), strict=True):
            columns = rows[..., start : start + places.shape[1]]
            part = rows.new_empty(*rows.shape[:-2], tensor.numel())
            part[..., places.flatten()] = columns.flatten(-2)
            parts.append(part.reshape(*rows.shape[:-2], *tensor.shape).to(tensor.dtype))
            start += places.shape[1]
        return parts

    def is_sum_over_examples(self, derivatives: Derivatives) -> bool:
        """Whether weights wₙ pass through the Hessian, H(w∘r) = w∘(Hr): no gradient knows another's outputs."""
        weights = example_weights(self.num_examples, self.tensors[0]).unsqueeze(1)
        seed = self.rows(derivatives.random())
        plain, weighted = (
            self.rows(derivatives.products(self.parts(each))) for each in (seed, weights * seed)
        )
        eps = max(torch.finfo(tensor.dtype).eps for tensor in self.tensors)
        difference = (weighted - weights * plain).abs().sum()
        return bool(difference <= ROUNDING * eps * weighted.abs().sum())

    def hessian(self, derivatives: Derivatives) -> Tensor:
        """Of each example, [N, K, K], where the loss is a sum over examples."""
        size = sum(places.shape[1] for places in self.places())
        columns = []
        like = self.rows(derivatives.gradient)
        for start in range(0, size, COLUMNS_AT_ONCE):
            number = min(COLUMNS_AT_ONCE, size - start)
            seeds = like.new_zeros(number, self.num_examples, size)
            seeds[range(number), :, range(start, start + number)] = 1.0
            images = derivatives.products(self.parts(seeds))
            columns += [self.rows([image[k] for image in images]) for k in range(number)]
        return torch.stack(columns, dim=1)
