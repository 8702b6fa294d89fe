"""The Laplace log-evidence at the end of each training epoch."""

import math
import time
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_bayes.callbacks.epoch_readings import EpochReadings
from lightning_bayes.callbacks.evidence.evaluation import Evaluation, Rehearsed
from lightning_bayes.callbacks.measuring import OnError, guarded
from lightning_bayes.callbacks.trainer.checks import check_named_parts
from lightning_bayes.callbacks.trainer.module_reader import NetworkOption, original_network
from lightning_bayes.callbacks.trainer.optimizers import prior_of
from lightning_bayes.callbacks.trainer.training_set import examples_of
from lightning_bayes.evidence.options import Method
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.functional._validation import positive
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.priors.prior import PriorPrecision, require_prior_precision
from lightning_bayes.priors.subset import Subset

UNAVAILABLE = (
    "log_evidence",
    "log_likelihood",
    "weight_penalty",
    "log_occam_factor",
    "effective_parameters",
    "newton_decrement",
)
"""Keys that are logged as NaN when an epoch has no evidence, so that curves show the gap."""

KEYS = (
    *UNAVAILABLE,
    "log_evidence_ratio",
    "log_evidence_best_prior",
    "log_evidence_stderr",
    "lower",
    "lower_stderr",
    "upper",
    "noise_variance",
    "prior_optimized",
    "prior_precision",
)
"""All keys."""

WORTH_SAYING = 1.0
"""Seconds that an evaluation must be expected to take to be announced."""


class LaplaceEvidence(EpochReadings[Evidence]):
    """Logs how much the training data believe the model, at the end of each training epoch.

    The Laplace log-evidence of Smith & Le (ICLR 2018, arXiv:1710.06451), eqs. 9-10, and its parts, in nats
    for the whole training set, under the prefix: `log_evidence`, `log_evidence_ratio` (against guessing),
    `log_likelihood`, `weight_penalty`, `log_occam_factor`, `effective_parameters`, `newton_decrement`,
    `prior_precision` (one key per value where parameters differ), `noise_variance` for regression, the bounds
    `lower` and `upper` where they are finite, `log_evidence_stderr` and `lower_stderr` where they are not 0,
    `prior_optimized` (1 or 0) and, where it is cheap, `log_evidence_best_prior`. They are there for
    `ModelCheckpoint(monitor=...)` and `EarlyStopping(monitor=...)`; with `val_check_interval < 1` give these
    `save_on_train_epoch_end=True` and `check_on_train_epoch_end=True`.

    The training_step runs on a copy in eval mode, over the whole training set, unshuffled, with its own
    random state. Training is not disturbed: weights are bit-identical with and without the callback.

    Args:
        structure: "full" (exact), "lanczos" (with a standard error, for any size), "blocks" (a bracket), "kron",
            "kron_joint", "kron_expand", "diag"; "auto" takes the first of "full", "lanczos" and "kron" that takes no
            longer than the larger of ten seconds and an epoch of training, beside the reading of the rows, and says
            which.
        likelihood: "auto" reads it from the loss in training_step, with its class weights, label smoothing and
            ignored targets; "classification", "binary", "regression", "gaussian_nll" or a `Likelihood` such as
            `Gaussian(sigma=0.1)` must be of the loss's kind unless `network` is given, and its own parameters
            replace those of the loss (the names stand for none).
        prior_precision: "auto" takes the optimizer's weight decay, λ = N · weight_decay for a mean
            cross-entropy and accordingly for other losses, or "optimize" where all weight decay is zero. A
            number, or a mapping from parameter-name patterns to numbers or "optimize", is λ itself.
            "optimize", "optimize_per_layer", "optimize_per_parameter" and "optimize_per_group" (of the
            optimizer) take the λ that maximise the log-evidence at the weights of each epoch.
        subset_of_weights: "all", "last_layer" or a list of parameter-name patterns, see `laplace_evidence`.
        curvature: "ggn", "hessian" or "hessian_positive", see `laplace_evidence`.
        backend: "auto", "backpack" or "autograd", see `laplace_evidence`.
        network: For a training_step that cannot be read: the name of the submodule that maps `batch[0]` to
            outputs, or a function (module, batch) -> (outputs, targets). Needs an explicit `likelihood`;
            weight decay is then taken to go with the loss's mean.
        every_n_epochs: Epochs between evaluations. Give ModelCheckpoint the same `every_n_epochs`, and
            EarlyStopping `strict=False`, because the key does not exist before the first evaluation.
        max_examples: A fixed random subset of this size; N is then its size.
        batch_size: Examples at a time; None for the loader's own, at least 32.
        tolerance: Width in nats of the bracket [lower, upper] that is accepted; None for the exact value.
        num_samples: Columns of the loss Hessian's root to sample, for "kron" and "diag"; None for all, or 64
            where structure="auto" meets more than 512 outputs per example whose columns are beyond its budget.
        num_blocks: Batches whose rows "blocks" reads, eight or more, see `laplace_evidence`; None for all.
        num_probes: Random vectors of "lanczos", see `laplace_evidence`; None for 8.
        max_stderr: Standard error in nats until which "lanczos" adds vectors, see `laplace_evidence`.
        max_overhead: Largest share of the training time that the callback may take, 0.1 for a tenth: epochs
            are skipped until an evaluation as long as the last fits. The first is always made. A key of a
            skipped epoch keeps its last value for monitors. None skips none.
        log_key_prefix: Goes before each key.
        on_error: "warn" for one warning, NaN under the keys and a fit that goes on, where this Trainer, module, loss
            or dataset does not allow the measurement; "raise" for an error.

    Attributes:
        history: List of (epoch, Evidence); it survives a checkpoint.

    Raises:
        ValueError: At construction for wrong arguments; at the start of fit for one that names something that is not
            there, and for a second LaplaceEvidence under the same keys.

    Example::

        trainer = Trainer(callbacks=[LaplaceEvidence(), EarlyStopping("bayes/log_evidence", mode="max")])
    """

    LOGGED, ALWAYS_LOGGED = KEYS, UNAVAILABLE
    READING, NOUN = Evidence, "evidence"

    def __init__(
        self,
        structure: str = "auto",
        *,
        likelihood: str | Likelihood = "auto",
        prior_precision: PriorPrecision = "auto",
        subset_of_weights: Subset = "all",
        curvature: str = "ggn",
        backend: str = "auto",
        network: NetworkOption = None,
        every_n_epochs: int = 1,
        max_examples: int | None = None,
        batch_size: int | None = None,
        tolerance: float | None = None,
        num_samples: int | None = None,
        num_blocks: int | None = None,
        num_probes: int | None = None,
        max_stderr: float | None = None,
        max_overhead: float | None = None,
        log_key_prefix: str = "bayes/",
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            likelihood=likelihood,
            network=network,
            every_n_epochs=every_n_epochs,
            batch_size=batch_size,
            max_examples=max_examples,
            log_key_prefix=log_key_prefix,
            on_error=on_error,
        )
        self.method = Method(
            structure,
            curvature,
            backend,
            tolerance,
            num_samples,
            subset_of_weights,
            num_blocks,
            num_probes,
            max_stderr,
        )
        require_prior_precision(prior_precision, also=("auto", "optimize_per_group"))
        self.prior_precision = prior_precision
        self.max_examples = max_examples
        self.max_overhead = None if max_overhead is None else positive("max_overhead", max_overhead)
        self._evaluation = Evaluation(
            self.method, self.likelihood, prior_precision, network, batch_size, max_examples
        )
        self._rehearsed: Rehearsed | None = None
        self._started = math.nan  # when training began, in seconds of the monotonic clock
        self._first_epoch = 0
        self._spent = 0.0  # seconds of all evaluations of this fit
        self._last_took: float | None = None  # seconds of the last one

    @cached_property  # Lightning asks at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(structure=self.method.structure, log_key_prefix=self.log_key_prefix)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rehearsed = None
        self._started, self._spent, self._last_took = time.monotonic(), 0.0, None
        self._first_epoch = trainer.current_epoch
        super().on_train_start(trainer, pl_module)

    @override
    @guarded
    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # One rank decides by its clock and its value counts, so that all ranks log the same.
        if not trainer.strategy.broadcast(self.should_evaluate(trainer)):
            return
        start = time.monotonic()
        # A fit that is resumed at the end of an epoch has no first batch before it.
        rehearsed, before = self._rehearsed or Rehearsed(self.method), self.latest
        epochs = 1 + trainer.current_epoch - self._first_epoch
        training = (start - self._started - self._spent) / epochs
        take = partial(self._evaluation.evidence, trainer, pl_module, rehearsed, before, training)
        evidence = trainer.strategy.broadcast(self._take(trainer, take))
        expected = before.structure if before else rehearsed.chosen
        if evidence and expected not in (None, evidence.structure):
            rank_zero_info(
                f"LaplaceEvidence: structure={evidence.structure!r} from now on and not {expected!r}, at "
                f"{evidence.num_parameters:,} parameters and {training:.2g} s for an epoch of training."
            )
        self._last_took = time.monotonic() - start
        self._spent += self._last_took
        if evidence is not None:
            self.history.append((trainer.current_epoch, evidence))
            values = logged_values(evidence)
        else:
            known = () if before is None else logged_values(before)
            values = dict.fromkeys((*UNAVAILABLE, *known), math.nan)
        # A monitor of what this likelihood or structure has not (a ratio, of a regression) finds NaN there.
        self._log_epoch(trainer, pl_module, values)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the last evidence is not to be believed."""
        if self.latest is not None and not self.latest.at_minimum:
            rank_zero_info(
                f"LaplaceEvidence: the last epoch is not at a minimum (Newton decrement "
                f"{self.latest.newton_decrement:.4g} nats), so the expansion about it is in doubt."
            )

    def should_evaluate(self, trainer: Trainer) -> bool:
        """Say whether the epoch that ends now is evaluated; override for another policy.

        Called after every epoch, on every process; the first one's answer counts for all.
        """
        if (trainer.current_epoch + 1) % self.every_n_epochs != 0:
            return False
        if self.max_overhead is None or self._last_took is None:
            return True
        training = time.monotonic() - self._started - self._spent
        return self._spent + self._last_took <= self.max_overhead * training

    @property
    @override
    def less_memory(self) -> str:
        steps = [] if self.batch_size == 1 else [f"batch_size={max(1, (self.batch_size or 32) // 4)}"]
        fewer = min(100, (self.max_examples or self._num_examples) // 2)
        steps += [f"max_examples={fewer}"] if fewer else []
        steps += [] if self.method.structure == "diag" or self.method.is_hessian else ['structure="diag"']
        if not steps:
            return "Leave LaplaceEvidence out of this run."
        return (
            f"Give LaplaceEvidence({', '.join(steps)}): fewer rows at a time, fewer in all, a smaller matrix."
        )

    @override
    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._check(trainer, pl_module)
        self._num_examples = examples_of(trainer, self.batch_size, self.max_examples).num_examples
        subset = self.method.subset_of_weights
        if subset != "last_layer":  # which layer that is, the first batch tells
            prior_of(trainer, original_network(pl_module, self.network), self.prior_precision, subset, None)

    @override
    def _rehearse(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        start = time.monotonic()
        self._rehearsed = self._evaluation.rehearse(trainer, pl_module, batch, batch_idx)
        if self._rehearsed.seconds >= WORTH_SAYING:
            less = "" if self.max_overhead else ": max_overhead=0.1 keeps it to a tenth of the training"
            seconds = f"{self._rehearsed.seconds:,.{0 if self._rehearsed.seconds >= 10 else 1}f}"
            rank_zero_info(f"LaplaceEvidence: an evaluation takes about {seconds} s{less}.")
        self._spent += time.monotonic() - start

    @override
    def _check_names(self, pl_module: LightningModule) -> None:
        network = original_network(pl_module, self.network)
        check_named_parts(network, self.method.subset_of_weights, self.prior_precision)


def logged_values(evidence: Evidence) -> dict[str, float]:
    """Numbers by the end of their keys; bounds where they are finite, standard errors where they are not 0."""
    names = (*UNAVAILABLE, "log_evidence_ratio", "log_evidence_best_prior", "noise_variance")
    values = {name: getattr(evidence, name) for name in names if getattr(evidence, name) is not None}
    values |= {name: bound for name in ("lower", "upper") if math.isfinite(bound := getattr(evidence, name))}
    stderrs = ("log_evidence_stderr", "lower_stderr")
    values |= {name: stderr for name in stderrs if (stderr := getattr(evidence, name)) > 0.0}
    values["prior_optimized"] = float(evidence.prior_optimized)
    if isinstance(evidence.prior_precision, Mapping):
        distinct = dict.fromkeys(evidence.prior_precision.values())
        values |= {f"prior_precision/{i}": value for i, value in enumerate(distinct, start=1)}
    else:
        values["prior_precision"] = evidence.prior_precision
    return values
