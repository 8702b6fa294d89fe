"""Gradient noise from a copy of the module, on the live batch: example by example, or the batch cut into parts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_bayes.callbacks.gradient_noise.two_batch_sizes import TwoBatchSizes, pooled, scaled
from lightning_bayes.callbacks.trainer.checks import with_way_out
from lightning_bayes.callbacks.trainer.live_copy import LiveCopy
from lightning_bayes.callbacks.trainer.module_reader import num_examples_of
from lightning_bayes.callbacks.trainer.restore import untouched
from lightning_bayes.capture.as_written import as_real
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.rows.example_gradients import ExampleGradientReader, GradientSums

NUM_PARTS = 4
"""Into which a batch is cut; of a batch of two or three examples each is a part."""


class CopiedGradients:
    """Measures the noise of the gradients of a module's training_step without touching module or Trainer.

    Args:
        trainer: Read only.
        module: Copied at the first measurement.
        names: Of the parameters that are measured.
        by_example: Whether the loss is taken apart into its examples; else the batch is cut into parts.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, names: Sequence[str], by_example: bool
    ) -> None:
        self._trainer, self._module, self._names = trainer, module, list(names)
        self._by_example = by_example
        self._copy: LiveCopy | None = None
        self._gradients: ExampleGradientReader | None = None
        self._checked = False

    def measure(self, batch: Any, batch_idx: int) -> TwoBatchSizes | None:
        """The noise in one batch of every process; None where there are fewer than two gradients of it.

        Args:
            batch: As training_step gets it.
            batch_idx: As training_step gets it.

        Raises:
            ValueError: If the loss cannot be taken apart, or the batch not be cut.
        """
        return pooled(self._trainer, self._sums(batch, batch_idx))

    def why_not_by_example(self, batch: Any, batch_idx: int) -> str | None:
        """What keeps the loss of a batch from being taken apart into its examples; None if nothing does."""
        try:
            self._sums(batch, batch_idx)
        except EvidenceUnavailableError:  # of these weights, not of the loss
            return None
        except ValueError as error:
            return with_way_out(error, "")
        return None

    def give_up(self) -> None:
        """Send the other processes NaN in place of a measurement that failed here, so that they do not wait."""
        if self._trainer.world_size > 1:
            named, lost = dict(self._module.named_parameters()), [math.nan] * len(self._names)
            totals = [torch.full_like(as_real(named[name]), torch.nan).flatten() for name in self._names]
            totals = [total.float() if total.itemsize < 4 else total for total in totals]  # as in the copy
            pooled(self._trainer, GradientSums(1, 1.0, lost, lost, totals))

    def _sums(self, batch: Any, batch_idx: int) -> GradientSums:
        with untouched(self._trainer):
            if self._copy is None or not self._copy.refresh():
                self._copy = LiveCopy(self._trainer, self._module)
                self._gradients = None
            of = self._of_examples if self._by_example else self._of_parts
            return of(self._copy, batch, batch_idx)

    def _of_examples(self, copy: LiveCopy, batch: Any, batch_idx: int) -> GradientSums:
        if self._gradients is None:
            copy.reader.check_computed_by_copy(copy.reader.read(batch, batch_idx, transferred=True).outputs)
            self._gradients = ExampleGradientReader(copy.reader.network, self._names)
        factor = math.nan

        def forward() -> tuple[Tensor, Tensor]:
            nonlocal factor
            captured = copy.reader.read(batch, batch_idx, transferred=True)
            # The mean over the B examples of the gradients of their unit losses, so scaled, is the gradient of the
            # loss as training_step returns it, be it a mean over examples or tokens, or a sum.
            factor = len(captured.outputs) * captured.scale
            return captured.outputs, captured.unit_loss

        sums = self._gradients.sums(forward, self._trainer.world_size > 1)
        return scaled(sums, factor)

    def _of_parts(self, copy: LiveCopy, batch: Any, batch_idx: int) -> GradientSums:
        num_examples = num_examples_of(batch)
        if num_examples is None:
            raise ValueError(
                "The batch cannot be cut into parts: its tensors do not share a first dimension of examples. Train "
                'with accumulate_grad_batches of 2 or more and method="micro_batches".'
            )
        named = dict(copy.reader.network.named_parameters())
        parameters = [named[name] for name in self._names]
        size = max(1, num_examples // NUM_PARTS)
        gradients: list[tuple[Tensor, ...]] = []
        for start in range(0, num_examples - size + 1, size):
            part = apply_to_collection(batch, Tensor, lambda t, s=start: t[s : s + size] if t.dim() else t)
            loss = copy.reader.loss(part, batch_idx, transferred=True)
            if not self._checked:
                copy.reader.check_computed_by_copy(loss)
                self._checked = True
            gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
        return _sums_of_parts(gradients, size)


def _sums_of_parts(gradients: list[tuple[Tensor, ...]], size: int) -> GradientSums:
    by_parameter = list(zip(*gradients, strict=True))
    stacked = [torch.stack([g.flatten() for g in parts]) for parts in by_parameter]
    totals = [parts.sum(0) for parts in stacked]
    squares = torch.stack([parts.square().sum() for parts in stacked]).tolist()
    squared = torch.stack([total.square().sum() for total in totals]).tolist()
    return GradientSums(len(gradients), len(gradients) / size, squares, squared, totals)
