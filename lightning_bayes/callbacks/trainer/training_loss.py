"""The mean training loss of a Trainer that is fitting, as a function of the weights."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import IterableDataset

from lightning_bayes.callbacks.trainer.module_reader import ModuleReader, NetworkOption, original_network
from lightning_bayes.callbacks.trainer.training_set import data_loader, examples_of, step_batch_size
from lightning_bayes.capture.loss import Reduction
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.loss_curvature.mean_loss import BatchLoss, MeanLoss, normalises_by_batch, norms_as_in


@dataclass(frozen=True)
class TrainingLoss:
    """How the loss of a Trainer is read.

    Attributes:
        trainer: Read only.
        module: Copied.
        likelihood: See `ModuleReader`.
        network: See `ModuleReader`.
        batch_size: Examples at a time; None for those of a training_step.
        max_examples: Examples to take: the nearest number of whole batches below, one batch at least; or all there
            are, without an incomplete batch where training drops it or batch norm depends on it.
    """

    trainer: Trainer
    module: LightningModule
    likelihood: Likelihood | None
    network: NetworkOption
    batch_size: int | None
    max_examples: int

    def reader(self) -> ModuleReader:
        """A new copy of the module at its present weights."""
        reader = ModuleReader(self.trainer, self.module, self.likelihood, self.network)
        norms_as_in(reader.original, reader.network)
        return reader

    def num_training_examples(self) -> int:
        """Those that training draws from.

        Raises:
            ValueError: If they cannot be told from the Trainer's loader.
        """
        return examples_of(self.trainer, None, None).num_examples

    def batches(self) -> tuple[list[Any], list[int]]:
        """Batches as training makes them, the same at each call, and the number of examples in each.

        Raises:
            ValueError: If they cannot be told from the Trainer's loader.
        """
        loader: Any = data_loader(self.trainer)
        size = self.batch_size or loader.batch_size  # None for a batch sampler of the user's own
        at_most = self.max_examples
        network = original_network(self.module, self.network)
        # A training_step may rely on the size of its batches, and batch norm has other statistics in a small one.
        if loader.drop_last or normalises_by_batch(network):
            at_most = min(at_most, self.num_training_examples())
        whole = at_most if size is None else max(1, at_most // size) * size
        if isinstance(loader.dataset, IterableDataset):  # which cannot be drawn from: its first batches
            every = examples_of(self.trainer, size, None)
            number = min(every.num_examples, whole)
            sizes = [min(size, number - start) for start in range(0, number, size)]
            return list(itertools.islice(every.read(), len(sizes))), sizes
        ours: Any = examples_of(self.trainer, size, whole, mixed=True).read()
        return list(ours), [len(indices) for indices in ours.batch_sampler]

    def function(
        self,
        reader: ModuleReader,
        parameters: Collection[str],
        batches: list[Any],
        sizes: list[int],
        reduction: Reduction,
    ) -> MeanLoss:
        """The mean over batches of the loss that an optimizer step goes down, in parameters of the reader's copy.

        A loss that is a mean over its examples is weighted by their number: n_b/N. A sum over the B examples of a
        training_step weighs B/N in batches of whichever size, which is what one step sees on average.

        Args:
            reader: From `reader`.
            parameters: Names of the parameters that are moved.
            batches: From `batches`.
            sizes: From `batches`.
            reduction: Of the loss.
        """
        total = sum(sizes)
        step = min(step_batch_size(self.trainer) or sizes[0], self.num_training_examples())
        weights = [(step if reduction == "sum" else size) / total for size in sizes]
        losses = [
            BatchLoss(partial(reader.loss, batch, index), partial(reader.read, batch, index), weight)
            for index, (batch, weight) in enumerate(zip(batches, weights, strict=True))
        ]
        return MeanLoss(reader.network, parameters, losses)
