"""The evidence of the module that a Trainer trains, on its training data: rehearsed on one batch, then evaluated."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_bayes.callbacks.evidence.progress import bar_line, shown_in_bar
from lightning_bayes.callbacks.trainer.checks import warn_of_averages
from lightning_bayes.callbacks.trainer.module_reader import ModuleReader, NetworkOption
from lightning_bayes.callbacks.trainer.optimizers import announce_prior, prior_of
from lightning_bayes.callbacks.trainer.training_set import examples_of, step_batch_size
from lightning_bayes.capture.examples import Examples
from lightning_bayes.capture.forward import BatchForward
from lightning_bayes.capture.loss import CapturedLoss, HowRead
from lightning_bayes.capture.repeated_forwards import RepeatedForwards
from lightning_bayes.errors import EvidenceUnavailableError, ReadOtherwiseError
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.options import Method, sampling_if_many_columns
from lightning_bayes.evidence.rehearsal import LEAST_SECONDS, rehearse
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.evidence.totals import LossReduction, read_all
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.priors.prior import Prior, PriorPrecision
from lightning_bayes.priors.subset import last_layer

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
MOST_READINGS = 2
"""How often a reading of all batches begins anew because one has told more of the loss."""


def anew(reading: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a reading begin anew where a batch has told more of the loss than those before it."""

    @wraps(reading)
    def repeated(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        for _ in range(MOST_READINGS):
            with suppress(ReadOtherwiseError):
                return reading(*args, **kwargs)
        return reading(*args, **kwargs)

    return repeated


@dataclass(frozen=True)
class Rehearsed:
    """What the first batch of a fit has settled.

    Attributes:
        asked: The method as asked for, with columns sampled where there are many.
        last_layer: Names of the parameters of the last layer, None where it was not asked for.
        batch_size: Of the first batch.
        chosen: The structure that is taken; None where the batch had no evidence.
        measured: Seconds that answers by some structures take, as far as they were measured.
        seconds: That an evaluation is expected to take.
        how: The loss is read, where that is by its graph; the same at every epoch.
    """

    asked: Method
    last_layer: list[str] | None = None
    batch_size: int = 1
    chosen: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    how: HowRead = field(default_factory=HowRead)


@dataclass(frozen=True)
class Evaluation:
    """How the evidence is computed, as the user wants it; see `LaplaceEvidence` for what each argument means."""

    method: Method
    likelihood: Likelihood | None
    prior_precision: PriorPrecision
    network: NetworkOption
    batch_size: int | None
    max_examples: int | None

    def rehearse(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Rehearsed:
        """Read one batch all the way, choose the structure, and say how the evidence is computed.

        Raises:
            ValueError: If the module cannot be read.
        """
        return self._rehearse(trainer, module, batch, batch_idx, HowRead())

    @anew
    def _rehearse(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, how: HowRead
    ) -> Rehearsed:
        """`rehearse`, with what is kept of the loss where it begins anew."""
        reader = ModuleReader(trainer, module, self.likelihood, self.network, how)
        read = partial(reader.read, batch, batch_idx, transferred=True)
        captured, again = read(), read()
        reader.check_computed_by_copy(captured.outputs)
        precision, subset, names = self.prior_precision, self.method.subset_of_weights, None
        if subset == "last_layer":
            names = last_layer(reader.network, lambda: read().outputs)
            rank_zero_info(f"LaplaceEvidence: the last layer is {names}; the rest is conditioned on.")
        examples = examples_of(trainer, self.batch_size, self.max_examples)
        prior = prior_of(trainer, reader.original, precision, subset, names)
        rehearsed = self._choose(reader, captured, examples, prior, names)
        # Now that it can be read: where it cannot, one warning says so, and no other.
        warn_of_averages(trainer)
        announce_prior(trainer, reader.original, precision, subset, prior)
        if captured.value != again.value and math.isfinite(captured.value):
            rank_zero_warn(
                f"LaplaceEvidence: training_step gave {captured.value:.6g} and {again.value:.6g} for one batch in "
                "eval mode: it draws random numbers (a functional dropout without training=self.training?) or "
                "keeps state. The evidence is that of one draw."
            )
        return rehearsed

    @anew
    def evidence(
        self,
        trainer: Trainer,
        module: LightningModule,
        rehearsed: Rehearsed,
        before: Evidence | None,
        epoch_seconds: float,
    ) -> Evidence:
        """Evaluate the module as it is now on all training data.

        Args:
            trainer: Of the fit.
            module: The user's.
            rehearsed: On the first batch.
            before: Of the epoch before, at whose λ a search begins.
            epoch_seconds: Of training, which "auto" goes by when it settles at the first evaluation.

        Raises:
            EvidenceUnavailableError: If these weights have no evidence.
        """
        training_batch_size = step_batch_size(trainer) or rehearsed.batch_size
        examples = examples_of(trainer, self.batch_size, self.max_examples)
        batches = enumerate(shown_in_bar(trainer, examples.read(), examples.num_batches))
        first = next(batches)
        reader = ModuleReader(trainer, module, self.likelihood, self.network, rehearsed.how)
        # The kind of the likelihood is that of the first batch; the rest must be of the same kind.
        captured = reader.read(first[1], first[0])
        subset = self.method.subset_of_weights
        prior = prior_of(trainer, reader.original, self.prior_precision, subset, rehearsed.last_layer)
        # A structure that was chosen is kept, in a fit that is resumed as well: numbers under one key are compared.
        # But parameters are unfrozen and datasets grow during a run: then the choice is made again.
        size = sum(reader.network.get_parameter(name).numel() for name in prior.strengths)
        same = before is not None and (before.num_parameters, before.num_examples) == (
            size,
            examples.num_examples,
        )
        # At the first evaluation too: the first batch could only say what an epoch might take.
        structure = before.structure if before and same and rehearsed.asked.structure == "auto" else None
        outputs = reader.outputs_and_targets
        start = prior.start_from(before.prior_precision) if before and before.prior_optimized else None
        with bar_line(trainer) as report:
            totals = read_all(
                reader.network,
                RepeatedForwards(
                    (
                        BatchForward(partial(outputs, index), batch)
                        for index, batch in chain([first], batches)
                    ),
                    lambda: (
                        BatchForward(partial(outputs, i), batch) for i, batch in enumerate(examples.read())
                    ),
                ),
                captured.likelihood,
                prior,
                rehearsed.asked,
                examples.num_examples,
                examples.num_batches,
                report=report,
                seconds=max(LEAST_SECONDS, epoch_seconds),
                structure=structure,
                measured=rehearsed.measured,
            )
            return evidence_of(totals, LossReduction(captured.reduction, training_batch_size), start)

    def _choose(
        self,
        reader: ModuleReader,
        captured: CapturedLoss,
        examples: Examples,
        prior: Prior,
        last_layer: list[str] | None,
    ) -> Rehearsed:
        """Choose the structure and say why; the one place that announces how the evidence is computed."""
        number, batches = examples.num_examples, examples.num_batches
        size = sum(reader.network.get_parameter(name).numel() for name in prior.strengths)
        asked, changed = sampling_if_many_columns(
            self.method, captured.outputs, number, size, -(-number // batches)
        )
        if changed is not None:
            rank_zero_warn(f"LaplaceEvidence: {changed}")
        # The evidence has a loader of its own: what cannot be read from that one must fail now as well.
        own = BatchForward(partial(reader.outputs_and_targets, 0), next(iter(examples.read())))
        settled = Rehearsed(asked, last_layer, len(captured.outputs), how=reader.how)
        try:
            rehearsal = rehearse(reader.network, own, captured.likelihood, prior, asked, number)
        except ReadOtherwiseError:
            raise
        except EvidenceUnavailableError as error:
            rank_zero_warn(f"LaplaceEvidence: the first batch has no evidence. {error}")
            return settled
        structure = f"structure={rehearsal.structure!r}. {rehearsal.reason}"
        for sentence in (structure, rehearsal.split, *examples.notes, captured.likelihood.note):
            if sentence is not None:
                rank_zero_info(f"LaplaceEvidence: {sentence}.")
        return replace(
            settled, chosen=rehearsal.structure, measured=rehearsal.measured, seconds=rehearsal.seconds
        )
