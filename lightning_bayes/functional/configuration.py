"""What the noise of an optimizer is a function of, and what is to change about it: checked values, no rules."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

from lightning_bayes.functional._validation import (
    batch_within_dataset,
    check_reduction,
    count,
    fraction,
    non_negative,
    positive,
)
from lightning_bayes.functional.noise_scale import momentum_factor, steady_state_noise_scale

Unknown = Literal["learning_rate", "batch_size"]
Reduction = Literal["mean", "sum"]


class NoSolutionError(ValueError):
    """No configuration keeps the noise scale by this rule, though every argument is in its domain."""


@dataclass(frozen=True)
class Configuration:
    """What the noise scale of SGD depends on, checked at construction.

    Attributes:
        learning_rate: ε on the loss as training_step returns it; at least 0 (schedules pass through 0, where g is 0).
        batch_size: B, examples per optimizer step, in (0, N]; a solved batch size is not rounded.
        dataset_size: N, training examples.
        momentum: m, in [0, 1).
        dampening: τ, in [0, 1).
        nesterov: whether the momentum is Nesterov's. g is the same; the largest stable learning rate is not.
        reduction: of the loss that the learning rate is for, over the examples of one training_step: "mean" or "sum".
        averaged_batches: training_steps whose losses an optimizer step averages, accumulated batches x replicas;
            whole. A sum is over B / averaged_batches examples; for a mean it does not matter.

    Raises:
        ValueError: naming the argument, if one is not a number, not finite or outside its domain.
    """

    optimizer: ClassVar = "sgd"
    # Properties that a file of advice holds beside the fields.
    SAVED_TOO: ClassVar = ("optimizer", "noise_scale")

    learning_rate: float
    batch_size: float
    dataset_size: int
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    reduction: Reduction = "mean"
    averaged_batches: int = 1

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        count("averaged_batches", self.averaged_batches)
        non_negative("learning_rate", self.learning_rate)
        positive("batch_size", self.batch_size)
        count("dataset_size", self.dataset_size)
        batch_within_dataset("batch_size", self.batch_size, "dataset_size", self.dataset_size)
        fraction("momentum", self.momentum)
        fraction("dampening", self.dampening)
        if not isinstance(self.nesterov, bool):
            raise ValueError(f"Expected argument `nesterov` to be a bool, but got {self.nesterov!r}.")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "Expected `nesterov` to come with momentum and without dampening, as in torch.optim.SGD, but got"
                f" momentum {self.momentum!r} and dampening {self.dampening!r}."
            )

    @property
    def noise_scale(self) -> float:
        """The SGD noise scale g = ε (N/B - 1) (1 - τ) / (1 - m), as `sgd_noise_scale` documents it; ε on the mean."""
        rate, factor = self.mean_learning_rate, momentum_factor(self.momentum, self.dampening)
        return steady_state_noise_scale(rate, self.batch_size, self.dataset_size, factor)

    @property
    def time_per_epoch(self) -> float:
        """Training time that one epoch covers, ε (N/B) (1 - τ) / (1 - m): what the linear rule keeps."""
        factor = momentum_factor(self.momentum, self.dampening)
        return self.mean_learning_rate * (self.dataset_size / self.batch_size) * factor

    @property
    def summed_examples(self) -> float:
        """b, the examples that the loss of one training_step sums: B / averaged_batches; 1 for a mean.

        An optimizer step goes down 1/(k R) of the sum over all B examples, k batches being accumulated on R
        replicas: b = B/(k R) times the mean loss.
        """
        return self.batch_size / self.averaged_batches if self.reduction == "sum" else 1.0

    @property
    def mean_learning_rate(self) -> float:
        """The learning rate on the mean loss that makes the same steps: ε b, with `summed_examples` b."""
        return self.learning_rate * self.summed_examples

    @property
    def steps_per_epoch(self) -> float:
        """N / B, not rounded."""
        return self.dataset_size / self.batch_size


@dataclass(frozen=True)
class AdamConfiguration:
    """What the noise of Adam, RMSprop and their relatives depends on, checked at construction.

    Attributes:
        learning_rate: ε, at least 0.
        batch_size: B, examples per optimizer step; a solved batch size is not rounded.
        betas: every decay rate of a running average, each in [0, 1): (β1, β2) of Adam, (alpha,) of RMSprop.
        eps: the constant beside the root mean square, at least 0.
        dataset_size: N if known. The rule does not depend on it.
        reduction: of the loss over the examples of one training_step: "mean" or "sum". The step of these optimizers
            does not depend on a factor of the loss, but eps is compared with the gradient and so does.
        averaged_batches: as in `Configuration`.

    Raises:
        ValueError: naming the argument, if one is not a number, not finite or outside its domain.
    """

    optimizer: ClassVar = "adam"
    SAVED_TOO: ClassVar = ("optimizer", "noise_scale")

    learning_rate: float
    batch_size: float
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    dataset_size: int | None = None
    reduction: Reduction = "mean"
    averaged_batches: int = 1

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        count("averaged_batches", self.averaged_batches)
        non_negative("learning_rate", self.learning_rate)
        positive("batch_size", self.batch_size)
        if not isinstance(self.betas, tuple):
            raise ValueError(f"Expected argument `betas` to be a tuple of numbers, but got {self.betas!r}.")
        for beta in self.betas:
            fraction("betas", beta)
        non_negative("eps", self.eps)
        if self.dataset_size is not None:
            count("dataset_size", self.dataset_size)
            batch_within_dataset("batch_size", self.batch_size, "dataset_size", self.dataset_size)

    @property
    def noise_scale(self) -> float:
        """The invariant ε/√B, as `adam_noise_scale` documents it."""
        return self.learning_rate / math.sqrt(self.batch_size)

    @property
    def summed_examples(self) -> float:
        """b, the examples that the loss of one training_step sums: B / averaged_batches; 1 for a mean."""
        return self.batch_size / self.averaged_batches if self.reduction == "sum" else 1.0

    @property
    def largest_batch_size(self) -> float:
        """The batch size at which the first κ(1-β) reaches 1, from which on the rule has no betas."""
        return self.batch_size / (1 - min(self.betas)) if self.betas else math.inf


AnyConfiguration = Configuration | AdamConfiguration
ConfigurationType = TypeVar("ConfigurationType", bound=AnyConfiguration)


@dataclass(frozen=True)
class Targets:
    """What is to change; None stays as it is. Error messages carry the names with `target_` before them.

    Attributes:
        batch_size: B', examples per optimizer step; whole.
        learning_rate: ε', above 0.
        momentum: m', in [0, 1).
        dataset_size: N', training examples; whole.

    Raises:
        ValueError: naming the argument that is outside its domain, or all four if none is given.
    """

    batch_size: int | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        checks = {"batch_size": count, "learning_rate": positive, "momentum": fraction, "dataset_size": count}
        for name, value in self.given().items():
            checks[name](f"target_{name}", value)
        if not self.given():
            raise ValueError(
                "Expected at least one of `target_batch_size`, `target_learning_rate`, `target_momentum` and"
                " `target_dataset_size` to be given, but got None for all four."
            )
        if self.dataset_size is not None:
            self.check_against(self.dataset_size)

    def check_for(self, present: AnyConfiguration) -> None:
        """Raises a ValueError for a target that means nothing to the optimizer."""
        if self.momentum is not None and isinstance(present, AdamConfiguration):
            raise ValueError(
                "Expected argument `target_momentum` to be None for an Adam-like optimizer, but got"
                f" {self.momentum!r}: it has running averages (betas), which Adam's rule moves with the"
                " batch size. Leave `target_momentum` out, and give a batch size or a learning rate as target."
            )

    def check_against(self, dataset_size: int) -> None:
        """Raises a ValueError if the target batch is larger than the training set it is drawn from."""
        if self.batch_size is not None:
            examples = dataset_size if self.dataset_size is None else self.dataset_size
            name = "dataset_size" if self.dataset_size is None else "target_dataset_size"
            batch_within_dataset("target_batch_size", self.batch_size, name, examples)

    def given(self) -> dict[str, float]:
        """The targets that are not None, by the names of the fields of a `Configuration`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def unknowns(self) -> tuple[Unknown, ...]:
        """What can be solved for: the partner of a given batch size or learning rate, else either of them."""
        if self.learning_rate is None and self.batch_size is not None:
            return ("learning_rate",)
        if self.batch_size is None and self.learning_rate is not None:
            return ("batch_size",)
        return ("learning_rate", "batch_size")

    def unchanged(self, present: ConfigurationType) -> ConfigurationType | None:
        """The targets put in and nothing else changed; None where the present batch would exceed the data.

        Raises:
            ValueError: as `check_for` and `check_against` do.
        """
        self.check_for(present)
        values = self.fixed(present)
        batch_size, dataset_size = values["batch_size"], values["dataset_size"]
        if dataset_size is None or batch_size <= dataset_size:
            return type(present)(**values)
        self.check_against(dataset_size)
        return None

    def fixed(self, present: AnyConfiguration) -> dict[str, Any]:
        """The values that hold after the change, what is solved for still at its old value or its own target."""
        values: dict[str, Any] = asdict(present) | self.given()
        if self.dataset_size is not None:
            values["dataset_size"] = int(self.dataset_size)
        if isinstance(present, Configuration) and self.momentum is not None:
            # Dampening acts on what enters the momentum buffer. Without momentum there is no buffer.
            values["dampening"] = present.dampening if self.momentum > 0 else 0.0
            values["nesterov"] = present.nesterov and self.momentum > 0
        return values


@dataclass(frozen=True)
class Goal(Configuration):
    """A configuration before it is solved for, not checked: its batch may exceed the data."""

    def __post_init__(self) -> None:
        """Nothing is checked yet."""
