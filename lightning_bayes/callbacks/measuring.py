"""What all callbacks that measure have in common: they never end a fit that would have run without them."""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from traceback import walk_tb
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

from lightning_bayes.callbacks.trainer.checks import with_way_out
from lightning_bayes.callbacks.trainer.module_reader import is_named
from lightning_bayes.capture.loss import WAY_OUT
from lightning_bayes.functional._validation import string

OnError = Literal["warn", "raise"]
PACKAGE = str(Path(__file__).parents[1])
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

_Measuring = TypeVar("_Measuring", bound="MeasuringCallback")
_Arguments = ParamSpec("_Arguments")


def guarded(
    hook: Callable[Concatenate[_Measuring, Trainer, _Arguments], None],
) -> Callable[Concatenate[_Measuring, Trainer, _Arguments], None]:
    """Make a hook that turns the callback off for the rest of the fit where it would have raised.

    A callback that is off does nothing in its guarded hooks.
    """

    @wraps(hook)
    def run(self: _Measuring, trainer: Trainer, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        if self.is_off:
            return
        try:
            hook(self, trainer, *args, **kwargs)
        except Exception as error:  # law: whatever it is, the run matters more
            self._turn_off(trainer, error)

    return run  # type: ignore[return-value] # `trainer` may be given by its name as well


class MeasuringCallback(Callback):
    """A callback that reads training and changes nothing.

    What a Trainer, module, loss or dataset does not allow is one warning, which begins with the callback's name and
    ends with a way out; from then on NaN is logged under the keys that monitors read, and training goes on. Wrong
    arguments raise all the same: at construction, or at the start of fit where they name something that is not there.

    Args:
        on_error: "warn"; or "raise" for an error in place of the warning.
        log_key_prefix: put before every key.
    """

    LOGGED: ClassVar[tuple[str, ...]] = ()
    """How the names of the callback's keys begin, without the prefix."""
    ALWAYS_LOGGED: ClassVar[tuple[str, ...]] = ()
    """Names among these that are logged as NaN though no monitor reads them, so that curves show the gap."""
    HELD: ClassVar[str] = ""
    """The attribute that holds what was measured."""

    def __init__(self, on_error: OnError, log_key_prefix: str = "bayes/") -> None:
        super().__init__()
        if on_error not in get_args(OnError):
            raise ValueError(f'Expected argument `on_error` to be "warn" or "raise", got {on_error!r}.')
        self.on_error = on_error
        self.log_key_prefix = string("log_key_prefix", log_key_prefix)
        self.is_off = False
        """Whether trouble has ended the measuring, not the fit."""
        self._last_logged_step = -1

    @property
    def less_memory(self) -> str:
        """What to change where memory does not suffice; a sentence, empty where nothing helps."""
        return ""

    @property
    def way_out(self) -> str:
        """What to do where training_step cannot be read or run on a copy; a sentence."""
        return f"Leave {type(self).__name__} out of this run."

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin each fit anew."""
        if stage == "fit":
            self.is_off, self._last_logged_step = False, -1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse arguments that name what is not there, and a second callback under the same keys."""
        self._check_names(pl_module)
        self._check_alone(trainer)
        launcher = getattr(trainer.strategy, "launcher", None)
        # It is what "ddp_spawn", "ddp_fork" and notebooks use.
        if self.HELD and is_named(launcher, "_MultiProcessingLauncher"):
            rank_zero_info(
                f"{type(self).__name__}: this strategy trains in processes that end with fit, and `{self.HELD}` with "
                "them. What was logged comes back in `trainer.callback_metrics`; the rest is in the log and in "
                'checkpoints. strategy="ddp" keeps it.'
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log; NaN where the callback is off."""
        if not self._together(trainer, not self.is_off) and not self.is_off:
            self._turn_off(trainer, None)
        self._end_epoch(trainer, pl_module)
        if self.is_off:
            self._log_epoch(trainer, pl_module, dict.fromkeys(self.ALWAYS_LOGGED, math.nan))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds; one that cannot be read is a warning, and nothing is taken over."""
        try:
            self._restore(state_dict)
        except Exception as error:
            if self.on_error == "raise":
                raise
            rank_zero_warn(
                f"{type(self).__name__}: what the checkpoint holds of it cannot be read ({type(error).__name__}: "
                f"{error}), so it begins anew. Training resumes as it would without it; resume with the version of "
                "lightning-bayes that wrote the checkpoint to keep its record."
            )

    def _check_names(self, pl_module: LightningModule) -> None:
        """Raise a ValueError for an argument that names something that the module does not have."""

    def _check_alone(self, trainer: Trainer) -> None:
        """Raise a ValueError where another callback of this kind logs under the same keys."""
        kind = type(self).__name__
        alike = [c for c in trainer.callbacks if isinstance(c, type(self))]  # type: ignore[attr-defined]
        if any(c is not self and c.log_key_prefix == self.log_key_prefix for c in alike):
            raise ValueError(
                f"Expected argument `log_key_prefix` to differ between the {kind} callbacks of a Trainer, got "
                f"{self.log_key_prefix!r} twice: several {kind} under one key would be logged as their mean. Remove "
                f"one, or give it another, such as log_key_prefix={self.log_key_prefix + '2/'!r}."
            )

    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log at the end of an epoch; guarded."""

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, perhaps in an earlier version."""

    def _prepare(self, trainer: Trainer, what: Callable[[], None]) -> None:
        """Do what can fail before the first step, on all processes or on none."""
        if self.is_off:
            return
        failure: Exception | None = None
        try:
            what()
        except Exception as error:
            failure = error
        if not self._together(trainer, failure is None):
            self._turn_off(trainer, failure)

    def _log_epoch(self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        """Log the values of an epoch, and NaN under the keys that somebody monitors and that have none."""
        missing = dict.fromkeys(self._monitored(trainer), math.nan)
        log_epoch(pl_module, self.log_key_prefix, missing | dict(values))

    def _log_step(self, trainer: Trainer, values: Callable[[], Mapping[str, float]]) -> None:
        """Log the values of the optimizer step that is about to be made, if it is the turn of one.

        `self.log` would repeat a stale value on the steps between.

        Args:
            trainer: its loggers and `callback_metrics` get the values.
            values: called if they are due.
        """
        step = trainer.global_step
        # Lightning sets this attribute without declaring it.
        every = int(getattr(trainer, "log_every_n_steps", 0))
        # A closure-based optimizer comes here several times in one step.
        if every < 1 or (step + 1) % every != 0 or step == self._last_logged_step:
            return
        self._last_logged_step = step
        logged = {f"{self.log_key_prefix}{name}": value for name, value in values().items()}
        device = trainer.strategy.root_device
        # Apple's devices have no float64; Lightning keeps float32 elsewhere too.
        trainer.callback_metrics.update(
            {key: torch.tensor(value, dtype=torch.float32, device=device) for key, value in logged.items()}
        )
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)

    def _monitored(self, trainer: Trainer) -> list[str]:
        """Names of this callback's keys that callbacks and schedulers of the Trainer read."""
        readers: list[Any] = [*trainer.callbacks, *trainer.lr_scheduler_configs]  # type: ignore[attr-defined]
        return list(dict.fromkeys(name for reader in readers if (name := self._name_of(reader)) is not None))

    def _name_of(self, reader: Any) -> str | None:
        monitor = getattr(reader, "monitor", None)
        if not isinstance(monitor, str) or not monitor.startswith(self.log_key_prefix):
            return None
        name = monitor[len(self.log_key_prefix) :]
        ours = any(name == key or name.startswith((f"{key}/", f"{key}-")) for key in self.LOGGED)
        return name if ours else None

    def _together(self, trainer: Trainer, fine: bool) -> bool:
        """Whether all processes are fine: those that are must not wait for one that has given up."""
        return fine if trainer.world_size < 2 else bool(trainer.strategy.reduce_boolean_decision(fine))

    def _turn_off(self, trainer: Trainer, error: Exception | None) -> None:
        """Warn once and measure no more in this fit; or raise, if that is wanted."""
        self.is_off = True
        name = type(self).__name__
        if self.on_error == "raise":
            if isinstance(error, ValueError) and WAY_OUT in str(error):
                raise ValueError(with_way_out(error, self.way_out)) from error
            raise error or RuntimeError(f"{name} failed in another process, which says why.")
        reason = (
            "Another process could not go on: its own warning says why, and names a way out."
            if error is None
            else self.explain(error)
        )
        warning = f"{name}: nothing is measured, and training goes on. {self._consequence(trainer)}{reason}"
        if error is None or rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            rank_zero_warn(warning)
        else:
            warnings.warn(warning, stacklevel=2)

    def _consequence(self, trainer: Trainer) -> str:
        """What becomes of those who read our keys."""
        if not self.LOGGED:
            return ""
        stopping = [
            reader.monitor
            for reader in trainer.callbacks  # type: ignore[attr-defined]
            if self._name_of(reader) is not None and getattr(reader, "check_finite", False)
        ]
        keys = ", ".join(self.log_key_prefix + name for name in self.ALWAYS_LOGGED[:1])
        nan = f"NaN is logged under {keys} and its other keys. " if keys else ""
        if not stopping:
            return nan
        return nan + (
            f"EarlyStopping monitors {' and '.join(stopping)} and stops at NaN: give it check_finite=False. "
        )

    def explain(self, error: Exception) -> str:
        """What went wrong and, last, a way out; of the package's own errors that is their text."""
        text = with_way_out(error, self.way_out)
        files = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
        # Whether it was raised by this package's own lines rather than by code that they ran.
        ours = bool(files) and files[-1].startswith(PACKAGE)
        if ours and isinstance(error, ValueError):
            return text
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            words in text.lower() for words in OUT_OF_MEMORY
        ):
            way_out = self.less_memory or self.way_out
            return f"Memory does not suffice ({type(error).__name__}: {text[:200]}). {way_out}"
        whose = "Code of lightning-bayes itself" if ours else "The module's code, run on a copy in eval mode,"
        way_out = f"Leave {type(self).__name__} out of this run, and report it." if ours else self.way_out
        return f"{whose} raised {type(error).__name__}: {text}. {way_out}"


def log_epoch(pl_module: LightningModule, prefix: str, values: Mapping[str, float]) -> None:
    """Log values at the end of an epoch, each under its name behind the prefix."""
    for name, value in values.items():
        # Every process has the same value. `sync_dist` keeps Lightning from warning that they might not.
        pl_module.log(f"{prefix}{name}", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
