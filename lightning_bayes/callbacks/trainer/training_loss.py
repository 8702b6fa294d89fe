"""The mean training loss of a Trainer that is fitting, as a function of the weights."""

import itertools
from collections.abc import Collection
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import IterableDataset

from lightning_bayes.callbacks.trainer.module_reader import ModuleReader, NetworkOption
from lightning_bayes.callbacks.trainer.training_set import data_loader, examples_of, step_batch_size
from lightning_bayes.capture.loss import Reduction
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.loss_curvature.mean_loss import BatchLoss, MeanLoss, normalises_by_batch, norms_as_in


class TrainingLoss:
    """The loss of a Trainer on batches as training makes them, the same at each reading.

    Args:
        trainer: Read only.
        module: Copied at its present weights.
        likelihood: See `ModuleReader`.
        network: See `ModuleReader`.
        batch_size: Examples at a time; None for those of a training_step.
        max_examples: Examples to take: the nearest number of whole batches below, one batch at least; or all there
            are, without an incomplete batch where training drops it or batch norm depends on it.

    Attributes:
        reader: Of the copy.
        num_training_examples: Those that training draws from.
        batches: As training makes them.
        sizes: The number of examples in each.

    Raises:
        ValueError: If the module cannot be copied, or the examples cannot be told from the Trainer's loader.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        likelihood: Likelihood | None,
        network: NetworkOption,
        batch_size: int | None,
        max_examples: int,
    ) -> None:
        self.trainer = trainer
        self.reader = ModuleReader(trainer, module, likelihood, network)
        norms_as_in(self.reader.original, self.reader.network)
        self.num_training_examples = examples_of(trainer, None, None).num_examples
        self.batches, self.sizes = self._batches(batch_size, max_examples)

    def _batches(self, batch_size: int | None, max_examples: int) -> tuple[list[Any], list[int]]:
        loader: Any = data_loader(self.trainer)
        size = batch_size or loader.batch_size  # None for a batch sampler of the user's own
        at_most = max_examples
        # A training_step may rely on the size of its batches, and batch norm has other statistics in a small one.
        if loader.drop_last or normalises_by_batch(self.reader.original):
            at_most = min(at_most, self.num_training_examples)
        whole = at_most if size is None else max(1, at_most // size) * size
        if isinstance(loader.dataset, IterableDataset):  # which cannot be drawn from: its first batches
            every = examples_of(self.trainer, size, None)
            number = min(every.num_examples, whole)
            sizes = [min(size, number - start) for start in range(0, number, size)]
            return list(itertools.islice(every.read(), len(sizes))), sizes
        ours: Any = examples_of(self.trainer, size, whole, mixed=True).read()
        return list(ours), [len(indices) for indices in ours.batch_sampler]

    def function(
        self, parameters: Collection[str], reduction: Reduction, num_batches: int | None = None
    ) -> MeanLoss:
        """The mean over batches of the loss that an optimizer step goes down, in parameters of the copy.

        A loss that is a mean over its examples is weighted by their number: n_b/N. A sum over the B examples of a
        training_step weighs B/N in batches of whichever size, which is what one step sees on average.

        Args:
            parameters: Names of the parameters that are moved.
            reduction: Of the loss.
            num_batches: Of the first so many batches; None for all.
        """
        sizes = self.sizes[:num_batches]
        step = min(step_batch_size(self.trainer) or sizes[0], self.num_training_examples)
        losses = [
            BatchLoss(
                partial(self.reader.loss, batch, index),
                partial(self.reader.read, batch, index),
                (step if reduction == "sum" else size) / sum(sizes),
            )
            for index, (batch, size) in enumerate(zip(self.batches, sizes, strict=False))
        ]
        return MeanLoss(self.reader.network, parameters, losses)
