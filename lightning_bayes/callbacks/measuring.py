"""What all callbacks that measure have in common: they never end a fit that would have run without them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

from lightning_bayes.capture.loss import WAY_OUT

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
    """Of these, the names that are logged as NaN though no monitor reads them: curves show the gap."""
    LESS_MEMORY: ClassVar[str] = ""
    """What to change where memory does not suffice."""

    HELD: ClassVar[str] = ""
    """The attribute that holds what was measured."""

    log_key_prefix: str

    def __init__(self, on_error: OnError) -> None:
        super().__init__()
        if on_error not in get_args(OnError):
            raise ValueError(f'Expected argument `on_error` to be "warn" or "raise", got {on_error!r}.')
        self.on_error = on_error
        self._off = False

    @property
    def is_off(self) -> bool:
        """Whether trouble has ended the measuring, not the fit."""
        return self._off

    @property
    def way_out(self) -> str:
        """What to do where training_step cannot be read or run on a copy; a sentence."""
        return f"Leave {type(self).__name__} out of this run."

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin each fit anew."""
        if stage == "fit":
            self._off = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse arguments that name what is not there, and a second callback under the same keys."""
        self._check_names(pl_module)
        self._check_alone(trainer)
        launcher = getattr(trainer.strategy, "launcher", None)
        # By name: that of `pytorch_lightning` is another class. It is what "ddp_spawn", "ddp_fork" and notebooks use.
        if self.HELD and any(base.__name__ == "_MultiProcessingLauncher" for base in type(launcher).__mro__):
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
            for name in (*self.ALWAYS_LOGGED, *self._monitored(trainer)):
                self._log(pl_module, name, math.nan)

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
        others = [c for c in trainer.callbacks if isinstance(c, type(self)) and c is not self]  # type: ignore[attr-defined]
        if any(other.log_key_prefix == self.log_key_prefix for other in others):
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

    def _log(self, pl_module: LightningModule, name: str, value: float) -> None:
        # Every process has the same value. `sync_dist` keeps Lightning from warning that they might not.
        key = f"{self.log_key_prefix}{name}"
        pl_module.log(key, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

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
        self._off = True
        name = type(self).__name__
        if self.on_error == "raise":
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
        text = str(error).strip().replace(WAY_OUT, self.way_out)
        ours = _raised_here(error)
        if ours and isinstance(error, ValueError):
            return text
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            words in text.lower() for words in OUT_OF_MEMORY
        ):
            way_out = self.LESS_MEMORY or self.way_out
            return f"Memory does not suffice ({type(error).__name__}: {text[:200]}). {way_out}"
        whose = "Code of lightning-bayes itself" if ours else "The module's code, run on a copy in eval mode,"
        way_out = f"Leave {type(self).__name__} out of this run, and report it." if ours else self.way_out
        return f"{whose} raised {type(error).__name__}: {text}. {way_out}"


def _raised_here(error: Exception) -> bool:
    """Whether an error was raised by this package's own lines rather than by code that it ran."""
    frames = list(_frames(error))
    return bool(frames) and frames[-1].startswith(PACKAGE)


def _frames(error: Exception) -> Iterator[str]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename
        trace = trace.tb_next
