"""How close a run is to the edge of stability, at the end of each training epoch."""

import math
import time
from dataclasses import asdict
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bayes.callbacks.epoch_readings import EpochReadings
from lightning_bayes.callbacks.measuring import OnError, guarded
from lightning_bayes.callbacks.trainer.module_reader import NetworkOption, original_network
from lightning_bayes.callbacks.trainer.optimizers import names_of_groups, sgd_steps, why_not_sgd
from lightning_bayes.callbacks.trainer.training_loss import TrainingLoss
from lightning_bayes.callbacks.trainer.training_set import examples_of
from lightning_bayes.capture.loss import Reduction
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.functional._validation import count
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.loss_curvature.stability_reading import (
    SGDStep,
    StabilityReading,
    measure_stability,
    rehearse,
    require_curvature,
)

KEYS = ("largest_eigenvalue", "stability", "largest_stable_learning_rate", "sharpness")


class Stability(EpochReadings[StabilityReading]):
    """Logs how close SGD is to the edge of stability, and where a larger learning rate would put it.

    largest_eigenvalue = h
    stability = ε (h + λ) / (2 (1 + m))
    largest_stable_learning_rate = 2 (1 + m) / (h + λ)

    h is the largest eigenvalue of the Hessian of the mean training loss (of whatever training_step returns, which is
    what the optimizer steps on), λ the weight decay, ε the learning rate at the last optimizer step, m its
    momentum. With dampening τ the bound on ε(h + λ) is 2(1 + m)/(1 − τ), with Nesterov's momentum
    2(1 + m)/(1 + 2m). Parameter groups that differ are taken together exactly, see `StabilityReading`. Above
    stability 1 steps along the sharpest direction of the quadratic model grow. Networks in full-batch training often
    hover there (Cohen et al., ICLR 2021, arXiv:2103.00065).

    Adam and its kin step in another geometry: for them and other optimizers h alone is logged, and a line says so.
    Gradient clipping is not counted. The keys, with the prefix, are there for `ModelCheckpoint` and
    `EarlyStopping`, as those of `LaplaceEvidence`.

    The training_step runs on a copy, on a fixed random part of the training set, with its own random state:
    training is not disturbed. Dropout is off; batch norm normalises by the batch, as in training.

    Args:
        every_n_epochs: Epochs between evaluations. One takes about ten products with the Hessian, each about as long
            as three gradients of `max_examples` examples.
        max_examples: On which the loss is the mean, in whole batches, one at least. The largest eigenvalue on a
            subset is on average above that of the whole.
        curvature: "hessian", of any loss; or "ggn", the Gauss-Newton matrix, of losses that `LaplaceEvidence` reads.
        sharpness: Whether to measure Keskar's sharpness too (arXiv:1609.04836, metric 2.1), in percent: the rise of
            the loss in the box abs(yᵢ) ≤ ε (abs(xᵢ) + 1), ε = 1e-3, in all parameters, by 10 iterations of L-BFGS-B
            from the corner of the box that the gradient or the eigenvector points to; a lower bound.
        network: For a training_step that cannot be run on a copy: the name of the submodule that maps `batch[0]` to
            outputs, or a function (module, batch) -> (outputs, targets). The loss is then the mean-reduced one of
            `likelihood`.
        likelihood: "auto", or beside `network` "classification", "binary", "regression" or a `Likelihood`.
        batch_size: Examples at a time; None for those of a training_step. Another number changes what batch norm
            normalises by.
        log_key_prefix: Goes before each key.
        on_error: "warn" for one warning, NaN under the keys and a fit that goes on, where this Trainer, module, loss
            or dataset does not allow the measurement; "raise" for an error.

    Attributes:
        history: List of (epoch, StabilityReading); it survives a checkpoint.

    Raises:
        ValueError: At construction for wrong arguments; at the start of fit for one that names something that is not
            there, and for a second Stability under the same keys.

    Example::

        trainer = Trainer(callbacks=[Stability(every_n_epochs=5)])
    """

    LOGGED = KEYS
    ALWAYS_LOGGED = KEYS[:1]
    READING, NOUN = StabilityReading, "reading"

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        max_examples: int = 1024,
        curvature: str = "hessian",
        sharpness: bool = False,
        network: NetworkOption = None,
        likelihood: str | Likelihood = "auto",
        batch_size: int | None = None,
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
        require_curvature(curvature)
        self.max_examples = count("max_examples", max_examples)
        if likelihood != "auto" and network is None:
            raise ValueError(
                "Expected argument `likelihood` to be 'auto' without `network`, got "
                f"{likelihood!r}: the curvature is that of the loss that training_step returns."
            )
        if not isinstance(sharpness, bool):
            raise ValueError(f"Expected argument `sharpness` to be a boolean, but got {sharpness!r}.")
        self.curvature = curvature
        self.sharpness = sharpness
        self._is_sgd = False
        self._steps: list[SGDStep] | None = None
        self._reduction: Reduction = "mean"
        self._epoch_started = math.nan

    reading = EpochReadings.latest
    """The latest, None before the first."""

    @cached_property  # Lightning asks at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(curvature=self.curvature, log_key_prefix=self.log_key_prefix)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps, self._reduction, self._is_sgd = None, "mean", False
        super().on_train_start(trainer, pl_module)

    @override
    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._check(trainer, pl_module)
        self._num_examples = examples_of(trainer, None, None).num_examples
        names_of_groups(trainer, original_network(pl_module, self.network))
        reason = why_not_sgd(trainer)
        self._is_sgd = reason is None
        if reason is not None:
            rank_zero_info(f"Stability: {reason}. The largest eigenvalue alone is logged.")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_started = time.monotonic()

    @override
    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # At the end of an epoch Lightning has already moved its schedulers on to the next.
        if self._is_sgd:
            self._steps = sgd_steps(trainer)

    @override
    @guarded
    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs != 0:
            return
        trained = (time.monotonic() - self._epoch_started) * self.every_n_epochs
        reading = trainer.strategy.broadcast(self._take(trainer, lambda: self._reading(trainer, pl_module)))
        if reading is not None:
            if not self.history and reading.seconds > trained:
                rank_zero_info(
                    f"Stability: the first reading took {reading.seconds:.3g} s, training from one to the next about "
                    f"{trained:.3g} s. A larger every_n_epochs= or a smaller max_examples= make it cheaper."
                )
            self.history.append((trainer.current_epoch, reading))
        wanted = [KEYS[0], *(KEYS[1:3] if self._is_sgd else ()), *(KEYS[3:] if self.sharpness else ())]
        values = {} if reading is None else asdict(reading) | {"stability": reading.stability_ratio}
        self._log_epoch(trainer, pl_module, {name: values.get(name, math.nan) for name in wanted})

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the run ended beyond the edge, or the last eigenvalue is not to be believed."""
        last = self.reading
        if last is None:
            return
        if last.stability_ratio is not None and last.stability_ratio >= 1.0:
            rank_zero_info(
                f"Stability: training ended at {last.stability_ratio:.3g} times the edge of stability; SGD is stable "
                f"there up to a learning rate of {last.largest_stable_learning_rate:.4g}."
            )
        if not last.converged:
            rank_zero_info(
                f"Stability: the largest eigenvalue did not converge in {last.num_products} products; it is at least "
                f"{last.largest_eigenvalue:.4g}, and one lies within {last.largest_eigenvalue_error:.2g} of that."
            )

    @property
    @override
    def less_memory(self) -> str:
        fewer = min(self.max_examples, self._num_examples) // 8
        steps = [f"max_examples={fewer}"] if fewer else []
        steps += [] if self.batch_size == 1 else ["batch_size=1"]
        return (
            f"Give Stability({', '.join(steps)}): fewer at a time."
            if steps
            else "Leave Stability out of this run."
        )

    @override
    def _check_names(self, pl_module: LightningModule) -> None:
        original_network(pl_module, self.network)

    def _reading(self, trainer: Trainer, pl_module: LightningModule) -> StabilityReading:
        loss = self._loss(trainer, pl_module)
        groups = names_of_groups(trainer, loss.reader.original)
        function = loss.function(groups, self._reduction)
        steps = None
        if self._is_sgd:
            present = self._steps or sgd_steps(trainer)  # no step yet: what the next would be
            steps = {name: present[index] for name, index in groups.items()}
        return measure_stability(
            function, steps, sum(loss.sizes), curvature=self.curvature, sharpness=self.sharpness
        )

    @override
    def _rehearse(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        loss = self._loss(trainer, pl_module)
        function = loss.function(names_of_groups(trainer, loss.reader.original), "mean", num_batches=1)
        loss.reader.check_computed_by_copy(function.first())
        try:
            self._reduction = function.first_captured().reduction
        except EvidenceUnavailableError:  # of these weights, not of the loss
            pass
        except ValueError:
            if self.curvature == "ggn":
                raise
            rank_zero_info(
                "Stability: the loss of training_step is none that is known to be a mean or a sum. It is taken as it "
                "is returned, and as a mean over the examples of a batch."
            )
        matrix = "Hessian" if self.curvature == "hessian" else "Gauss-Newton matrix"
        rank_zero_info(
            f"Stability: {matrix} of the loss in {len(function.flat()):,} parameters, on {sum(loss.sizes):,} of "
            f"{loss.num_training_examples:,} examples, {loss.sizes[0]:,} at a time."
        )
        try:
            rehearse(function, self.curvature)
        except EvidenceUnavailableError as error:
            rank_zero_warn(f"Stability: the first batch has no reading. {error}")

    def _loss(self, trainer: Trainer, pl_module: LightningModule) -> TrainingLoss:
        return TrainingLoss(
            trainer, pl_module, self.likelihood, self.network, self.batch_size, self.max_examples
        )
