"""Measures and logs the noise in the gradients while training."""

import math
from copy import deepcopy
from functools import cached_property
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_bayes.callbacks.gradient_noise.metric import GradientNoiseMetric
from lightning_bayes.callbacks.gradient_noise.step_gradients import (
    GradientMethod,
    StepGradients,
    layer_of,
    num_micro_batches,
)
from lightning_bayes.callbacks.measuring import MeasuringCallback, OnError, guarded
from lightning_bayes.callbacks.trainer.checks import check_automatic_optimization, check_not_sharded
from lightning_bayes.functional import GradientNoise
from lightning_bayes.functional._validation import count, fraction

KEYS = ("gradient_noise_trace", "gradient_squared_norm", "gradient_noise_scale")
NOT_MEASURED = "not measured yet"
RESOLVED = "resolved"


class GradientNoiseScale(MeasuringCallback):
    r"""Measures the noise in the gradients, and logs the batch size up to which it is worth averaging it away.

    B_simple = tr Σ / ‖G‖²

    with G the gradient of the training loss, and Σ the covariance of the gradient of one example. Batches much
    smaller than B_simple make almost as much progress per example as any; much larger ones waste examples.
    Both parts are unbiased, also where ‖G‖² comes out negative, and are averaged apart, exponentially and
    bias-corrected; the averages are divided once.

    Keys, with the prefix: `gradient_noise_trace` (tr Σ), `gradient_squared_norm` (‖G‖²) and
    `gradient_noise_scale` (B_simple, in examples); the value in force every `log_every_n_steps` optimizer
    steps, and at the end of each epoch, where `ModelCheckpoint` and `EarlyStopping` can monitor it. Where the
    averaged ‖G‖² is not positive, noise drowns the gradient: `gradient_noise_scale` is NaN, `status` says so,
    and so does a warning, once. A larger `ema` or a smaller `every_n_steps` resolves more.

    Gradients are those of the loss as training_step returns it, without weight decay and before clipping; for a
    loss that is the sum over a batch of B, they and their norms are B and B² times those of its mean, with the part
    in place of the batch under "split_batch"; B_simple is the same. Only parameters that an optimizer trains count.
    Examples are taken to be drawn independently: of a training set of N, ‖G‖² is that of the distribution behind
    it, smaller by about tr Σ / N than that of the set itself.

    Args:
        every_n_steps: optimizer steps between measurements. Of a small net one costs about as much as a step: at
            16 some 7 % of the training time, at 1 training takes almost twice as long.
        ema: ρ, in [0, 1): measurements are averaged over about the last 1/(1 - ρ). 0 keeps the last alone.
        log_key_prefix: put before every key.
        method: "per_example" runs training_step on a copy of the module, in eval mode and in float32 at least,
            and takes its loss apart into examples. Dropout is off and batch norm uses its running statistics: in
            training it couples the examples of a batch, which then have no gradients of their own. One
            micro-batch of a step is read, in every process. "micro_batches" compares the gradients of the
            micro-batches of an accumulation, and of data-parallel replicas, with their mean: as they come in
            training, dropout and batch norm included, and for nothing; but few micro-batches tell less than
            many examples. "split_batch" is for losses that cannot be taken apart: training_step runs on a copy
            in eval mode, on a batch cut into four. "auto" is "per_example" where the loss can be read, else
            "micro_batches" where a step has two or more, else "split_batch", and says why.
        per_layer: whether to log `gradient_noise_scale/<layer>` for each module that holds parameters.
        on_error: "warn" for one warning, NaN under the keys and a fit that goes on, where this Trainer, module, loss
            or dataset does not allow the measurement; "raise" for an error.

    Attributes:
        estimate: the averages in force, `GradientNoise | None`.
        layer_estimates: those of each layer, under `per_layer`.
        status: whether B_simple is resolved, or why it is not.

    Raises:
        ValueError: at construction for an argument outside its domain; at the start of fit for a second
            GradientNoiseScale under the same keys. Manual optimization, LBFGS, sharded weights, batches of one
            example, and a training_step that `method` cannot read are what `on_error` is about.

    Example::

        trainer = Trainer(callbacks=[GradientNoiseScale()])

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162.
    """

    LOGGED = KEYS
    ALWAYS_LOGGED = KEYS
    HELD = "estimate"

    def __init__(
        self,
        *,
        every_n_steps: int = 16,
        ema: float = 0.95,
        log_key_prefix: str = "bayes/",
        method: GradientMethod = "auto",
        per_layer: bool = False,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(on_error, log_key_prefix)
        if method not in get_args(GradientMethod):
            raise ValueError(
                f"Expected argument `method` to be one of {', '.join(map(repr, get_args(GradientMethod)))}, but got "
                f"{method!r}."
            )
        if not isinstance(per_layer, bool):
            raise ValueError(f"Expected argument `per_layer` to be True or False, but got {per_layer!r}.")
        self.every_n_steps = count("every_n_steps", every_n_steps)
        self.ema = fraction("ema", ema)
        self.method = method
        self.per_layer = per_layer
        self._metric = GradientNoiseMetric(self.ema)
        self._parts: tuple[str, ...] = ("",)
        self._step: StepGradients | None = None
        self._due = False
        self._warned: set[str] = set()

    @property
    def estimate(self) -> GradientNoise | None:
        """The averages of tr Σ and ‖G‖² and their ratio B_simple up to now; None before the first measurement."""
        return self._metric.total()

    @property
    def layer_estimates(self) -> dict[str, GradientNoise]:
        """The latest estimate of each layer; empty unless `per_layer`."""
        return dict(zip(self._parts, self._metric.parts(), strict=False)) if self.per_layer else {}

    @property
    def status(self) -> str:
        """Whether B_simple is "resolved" or "not measured yet", or why it is not resolved."""
        estimate = self.estimate
        if estimate is None:
            return NOT_MEASURED
        if estimate.resolved:
            return RESOLVED
        return (
            f"not resolved: the averaged squared norm of the gradient is {estimate.squared_norm:.3g}, not above 0,"
            f" beside a noise of {estimate.trace:.3g}"
        )

    @cached_property  # Lightning asks at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(log_key_prefix=self.log_key_prefix)

    def should_measure(self, trainer: Trainer) -> bool:
        """Whether the optimizer step that begins now is measured; override for another policy."""
        return trainer.global_step % self.every_n_steps == 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, lambda: self._begin(trainer, pl_module))

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_automatic_optimization(pl_module, "GradientNoiseScale", ".gradient_noise_scale")
        check_not_sharded(trainer, "GradientNoiseScale", "gradients", "remove the callback")
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ValueError(
                "GradientNoiseScale cannot read LBFGS, which takes several gradients for one step and has no batch "
                "size to advise on. Use another optimizer, or remove the callback."
            )
        if self._step is not None:
            self._step.stop()
        self._due = False
        layers = dict.fromkeys(layer_of(name) for name, _ in pl_module.named_parameters())
        parts = tuple(layers) if self.per_layer else ("",)
        if trainer.global_step == 0 or parts != self._parts:
            self._parts, self._metric = parts, GradientNoiseMetric(self.ema, len(parts))
        # Apple's devices have no float64.
        self._metric.to("cpu" if pl_module.device.type == "mps" else pl_module.device)
        self._step = StepGradients(self.method, parts, self._warn_once)
        if self.method == "micro_batches" and num_micro_batches(trainer) < 2:
            raise ValueError(
                'Expected method="micro_batches" to find two micro-batches or more in a step, but got'
                ' accumulate_grad_batches=1 in one process. Use method="per_example", accumulate_grad_batches=2 or'
                " more, or several devices."
            )

    @override
    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first:
            # StochasticWeightAveraging appends a pass without gradients, for the statistics of batch norm.
            idle = getattr(trainer.fit_loop, "_skip_backward", False)
            self._due = not idle and self.should_measure(trainer)
        if self._due and self._step is not None:
            noise = self._step.begin(trainer, pl_module, batch, batch_idx, first)
            if noise is not None:
                self._metric.update(noise)

    @override
    @guarded
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due and self._step is not None:
            batch_idx, k = trainer.fit_loop.batch_idx, trainer.accumulate_grad_batches
            self._step.after_backward(last=(batch_idx + 1) % k == 0 or trainer.is_last_batch)

    @override
    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        noise = self._step.finish() if self._due and self._step is not None else None
        self._due = False
        if noise is not None:
            self._metric.update(noise)
        self._log_step(trainer, self._values)

    @override
    @guarded
    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_epoch(trainer, pl_module, self._values())
        if self.status not in (RESOLVED, NOT_MEASURED):
            fewer = f"a smaller `every_n_steps` ({self.every_n_steps}), "
            often = fewer if self.every_n_steps > 1 else ""
            self._warn_once(
                "unresolved",
                f"B_simple is {self.status}. NaN is logged until it is. Average over more: a larger `ema`"
                f" ({self.ema:g}), {often}or larger batches.",
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._step is not None:
            self._step.stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"parts": self._parts, "averages": self._metric.state_dict()}

    @property
    @override
    def way_out(self) -> str:
        method = self.method if self._step is None else self._step.method
        if method == "micro_batches":
            return "Leave GradientNoiseScale out of this run."
        other = (
            ', or method="split_batch" for a loss that cannot be taken apart'
            if method == "per_example"
            else ""
        )
        return (
            'Give method="micro_batches" with accumulate_grad_batches of 2 or more, which takes the gradients of '
            f"training as they come and runs nothing on a copy{other}."
        )

    @override
    def _restore(self, state_dict: dict[str, Any]) -> None:
        parts = tuple(state_dict["parts"])
        metric = GradientNoiseMetric(self.ema, len(parts))
        # Not the checkpoint's own tensors: the averages are updated in place.
        metric.load_state_dict(deepcopy(state_dict["averages"]))
        self._parts, self._metric = parts, metric

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"GradientNoiseScale: {message}")

    def _values(self) -> dict[str, float]:
        """Names and values that are logged; NaN before the first measurement."""
        noise = self.estimate or GradientNoise(math.nan, math.nan, math.nan)
        values = dict(zip(KEYS, (noise.trace, noise.squared_norm, noise.noise_scale), strict=True))
        layers = self.layer_estimates.items()
        return values | {f"gradient_noise_scale/{name}": its.noise_scale for name, its in layers}
