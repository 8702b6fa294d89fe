"""Gradient noise from the gradients that training makes anyhow: micro-batches against their accumulation.

A hook on a parameter sees the gradient of one backward pass in one process: before it is added to `.grad`, and
before data parallelism averages it. It returns nothing, so that the gradient stays as it is. `.grad` after the
last backward pass of a step holds the mean over processes of the sum over micro-batches, of a loss that
Lightning has divided by their nominal number.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_bayes.callbacks.gradient_noise.two_batch_sizes import TwoBatchSizes, reduced
from lightning_bayes.callbacks.trainer.module_reader import num_examples_of
from lightning_bayes.numerics.devices import accumulation_dtype


class TrainingGradients:
    """Collects the squared norms of one optimizer step at a time.

    Args:
        trainer: Read only.
        module: Its gradients are read only.
        names: Of the parameters that are measured.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, names: Sequence[str]) -> None:
        self._trainer = trainer
        named = dict(module.named_parameters())
        self._parameters = [named[name] for name in names]
        self._handles: list[RemovableHandle] = []
        self._start(module.device)

    def begin(self, batch: Any, loader_batch_size: int | None, first: bool) -> None:
        """Before the training_step of a micro-batch: note its size, and watch its backward pass."""
        if first:
            self.stop()  # what was seen of a step that was not made
            self._start(self._parameters[0].device)
            self._handles = [
                parameter.register_hook(partial(self._see, index))
                for index, parameter in enumerate(self._parameters)
            ]
        size = num_examples_of(batch) or loader_batch_size
        if size is None:
            self.stop()
            raise ValueError(
                "The number of examples in a batch cannot be told: its tensors do not share a first dimension, and "
                'the loader has no batch_size. Use method="per_example", or give the loader a batch_size.'
            )
        self._size = size

    def after_backward(self, last: bool) -> None:
        """After a backward pass: count it, and at the last one before the step read `.grad`."""
        if not self._handles:
            return
        self._number += 1
        self._inverse_sizes += 1.0 / self._size
        if last:
            for index, parameter in enumerate(self._parameters):
                grad = parameter.grad
                self._large[index] = 0.0 if grad is None else _squared_norm(grad, self._large.dtype)

    def finish(self) -> TwoBatchSizes | None:
        """At the optimizer step: the norms of its gradients; None where there were fewer than two."""
        self.stop()
        replicas = self._trainer.world_size
        sums = torch.tensor(
            [self._number, self._inverse_sizes], dtype=self._small.dtype, device=self._small.device
        )
        small = torch.cat([self._small, sums])
        if replicas > 1:
            small = reduced(self._trainer, small)
        *squares, number, inverse_sizes = small.tolist()
        if number < 2:
            return None
        # Undo what the loss was multiplied by: 1/k under accumulation, and the scale of half precision.
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        loss_scale = 1.0 if scaler is None else float(scaler.get_scale())
        factor = self._trainer.accumulate_grad_batches / loss_scale
        size = number / inverse_sizes
        mean = factor * replicas / number  # `.grad` is the sum over micro-batches, and the mean over replicas
        return TwoBatchSizes(
            [factor**2 * square / number for square in squares],
            size,
            [mean**2 * square for square in self._large.tolist()],
            size * number,
        )

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _start(self, device: torch.device) -> None:
        zeros = torch.zeros(len(self._parameters), dtype=accumulation_dtype(device), device=device)
        # A step whose last micro-batch has no loss leaves NaN, and is not averaged in.
        self._small, self._large = zeros, torch.full_like(zeros, torch.nan)
        self._number, self._inverse_sizes, self._size = 0, 0.0, 1

    def _see(self, index: int, gradient: Tensor) -> None:
        self._small[index] += _squared_norm(gradient, self._small.dtype)


def _squared_norm(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        flat = gradient.detach()
        flat = flat.coalesce().values().flatten() if flat.is_sparse else flat.reshape(-1)
        # Half precision overflows at a squared norm of 65504.
        flat = flat if flat.itemsize >= 4 else flat.float()
        return flat.dot(flat).to(dtype)
