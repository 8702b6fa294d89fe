"""Reads a LightningModule's outputs, targets and likelihood without touching it or its Trainer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeGuard

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.capture.autograd_graph import graph_nodes
from lightning_bayes.capture.loss import WAY_OUT, CapturedLoss, HowRead, capture_loss, loss_of
from lightning_bayes.capture.pytorch_losses import RowsOfExamples
from lightning_bayes.errors import ReadOtherwiseError
from lightning_bayes.likelihoods import Likelihood

NetworkOption = str | Callable[[LightningModule, Any], tuple[Tensor, Tensor]] | None


class ModuleReader:
    """A copy of a LightningModule whose training_step can be run and read.

    A training_step may work on its batch in place: it is run on a clone, and the batch stays as it is.

    Args:
        trainer: Read only.
        module: Copied; the copy is `network`, or its submodule where `network` names one.
        likelihood: None to read it from the loss.
        network: None to run training_step, the name of a submodule to call on `batch[0]` with targets
            `batch[1]`, or a function (module, batch) -> (outputs, targets).
        how: What an earlier reader of the same module has settled of its loss.

    Attributes:
        network: The copy.
        original: What it is a copy of.

    Raises:
        ValueError: If the module cannot be copied.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        likelihood: Likelihood | None = None,
        network: NetworkOption = None,
        how: HowRead | None = None,
    ) -> None:
        self.how = HowRead() if how is None else how
        self._trainer, self._hooks, self._device = trainer, module, module.device
        self._likelihood, self._option = likelihood, network
        self._kind: tuple[type[Likelihood], tuple[bool, bool]] | None = None
        self._rows = RowsOfExamples()
        self._takes_index: bool | None = None
        self.original = original_network(module, network)
        attributes = (value for part in self.original.modules() for value in vars(part).values())
        # Datasets and loaders that a module keeps would be copied with it, each time.
        data = (value for value in attributes if isinstance(value, Dataset | DataLoader))
        self.network: nn.Module = throw_away_copy(self.original, shared=(trainer, *data))
        if is_lightning_module(self.network):
            for part in filter(is_lightning_module, self.network.modules()):
                vars(part).update(dict.fromkeys(("log", "log_dict", "print"), _nothing))
            if self.network._compiler_ctx is not None:  # its methods are the original's, compiled
                to_uncompiled(self.network)
            self.network.trainer = _ReadOnlyTrainer(trainer)  # type: ignore[assignment]
            self._hooks = self.network

    def read(self, batch: Any, batch_idx: int, *, transferred: bool = False) -> CapturedLoss:
        """Run one batch as Lightning would and return outputs, targets and what they mean.

        Args:
            batch: As the loader made it.
            batch_idx: Handed on to training_step.
            transferred: Whether the batch has been through the hooks of transfer already.

        Raises:
            ValueError: If the training_step cannot be read; the message names the way out.
        """
        again = partial(self._part, batch, transferred)
        with self._default_dtype():
            captured = self._read(self._prepared(batch, transferred), batch_idx, again)
        kind, told = type(captured.likelihood), (self.how.is_by_graph, self.how.as_expansion)
        first, was_told = self._kind = self._kind or (kind, told)
        if kind is not first:
            raise (ValueError if told == was_told else ReadOtherwiseError)(
                f"The likelihood of this batch's loss is {kind.__name__}, that of others is "
                f"{first.__name__}: the evidence needs one likelihood for all examples. {WAY_OUT}"
            )
        return captured

    def outputs_and_targets(self, batch_idx: int, batch: Any) -> tuple[Tensor, Tensor]:
        """What `read` returns of a batch from the loader, without its loss."""
        captured = self.read(batch, batch_idx)
        return captured.outputs, captured.targets

    def loss(self, batch: Any, batch_idx: int, *, transferred: bool = False) -> Tensor:
        """Run one batch as Lightning would and return the loss that training steps on, whatever it is made of.

        Where `network` is given, it is PyTorch's mean-reduced loss of the likelihood.

        Args:
            batch: As for `read`.
            batch_idx: As for `read`.
            transferred: As for `read`.

        Raises:
            ValueError: If training_step returns no scalar loss.
        """
        if self._option is not None:
            captured = self.read(batch, batch_idx, transferred=transferred)
            return captured.scale * captured.unit_loss
        batch = self._prepared(batch, transferred)
        with self._default_dtype(), torch.enable_grad():
            return loss_of(self._training_step(batch, batch_idx)()).reshape(())

    def check_computed_by_copy(self, outputs: Tensor) -> None:
        """Raise unless the outputs were computed by the copy's parameters, and by no others.

        A closure, a lambda or a wrapper that the module holds goes on calling the original after a deep copy.
        """
        leaves = {id(node.variable) for node in graph_nodes([outputs]) if hasattr(node, "variable")}
        used = [name for name, parameter in self.original.named_parameters() if id(parameter) in leaves]
        if used:
            raise ValueError(
                f"The copy of {type(self.original).__name__} that the evidence is computed on still runs the "
                f"original's parameters {used[:4]}: a function stored in the module (a lambda, a closure, a "
                "wrapped forward or training_step) holds on to it. Make that function a method. A function "
                "network= must use the module that it is given."
            )
        if leaves.isdisjoint(map(id, self.network.parameters())):
            raise ValueError(
                f"The outputs carry no graph back to a parameter of {type(self.original).__name__}: they were "
                f"detached, computed under no_grad, or by another module. {WAY_OUT}"
            )

    def _read(self, batch: Any, batch_idx: int, again: Callable[[int | None], Any]) -> CapturedLoss:
        """Read a batch that is prepared; `again` prepares it anew, or its first so many examples."""
        if self._option is None:
            step = self._training_step(batch, batch_idx)
            number = num_examples_of(batch)

            def repeated(few: int | None) -> Callable[[], object]:
                return self._training_step(again(few), batch_idx)

            return capture_loss(step, self._likelihood, self._rows.grouping, self.how, number, repeated)
        if self._likelihood is None:
            raise ValueError("Argument `network` needs an explicit `likelihood`.")
        outputs, targets = self._call_network(batch)
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"`network` returned {type(outputs).__name__}; the evidence needs one tensor of logits or means, "
                "[N, C] or [N]. Give a function that takes it out: network=lambda module, batch: (outputs, targets)."
            )
        outputs, targets = self._likelihood.prepare(outputs, targets)
        unit_loss = self._likelihood.unit_loss(outputs, targets)
        return CapturedLoss(outputs, targets, self._likelihood, unit_loss, "mean", float("nan"))

    def _training_step(self, batch: Any, batch_idx: int) -> Callable[[], object]:
        """The call of training_step, with the arguments that it takes."""
        step = self._hooks.training_step
        if self._takes_index is None:
            if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
                raise ValueError(f"training_step(dataloader_iter) takes its own batches. {WAY_OUT}")
            self._takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        return partial(step, batch, batch_idx) if self._takes_index else partial(step, batch)

    def _call_network(self, batch: Any) -> tuple[Tensor, Tensor]:
        if callable(self._option):
            pair = self._option(self._hooks, batch)
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Tensor):
                raise ValueError(
                    "Expected argument `network` to be a function that returns a pair of tensors (outputs, targets), "
                    f"got {type(pair).__name__} from it."
                )
            return pair[0], pair[1]
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"network={self._option!r} is called on batch[0] with targets batch[1], but the batch is "
                f"{type(batch).__name__}. Give a function: network=lambda module, batch: (outputs, targets)."
            )
        return self.network(batch[0]), batch[1]

    def _prepared(self, batch: Any, transferred: bool) -> Any:
        """A clone on the module's device, through the hooks of transfer of whoever overrides them.

        It has the precision that the plugin trains in, or float32 where that is a half one.
        """
        batch = apply_to_collection(batch, Tensor, Tensor.clone)
        if not transferred:
            datamodule = getattr(self._trainer, "datamodule", None)
            for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
                overridden = datamodule is not None and is_overridden(name, datamodule, _base(datamodule))
                hook = getattr(datamodule if overridden else self._hooks, name)
                batch = hook(batch, self._device, 0) if name == "transfer_batch_to_device" else hook(batch, 0)
        batch = self._trainer.precision_plugin.convert_input(batch)
        first = next(self.network.parameters(), None)
        if first is None or not first.is_floating_point():
            return batch

        def widen(tensor: Tensor) -> Tensor:
            return tensor.to(first.dtype) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

        return apply_to_collection(batch, Tensor, widen)

    def _part(self, batch: Any, transferred: bool, few: int | None) -> Any:
        """A batch prepared once more, of which a training_step may have worked in place; or its first examples."""
        if few is not None:
            batch = apply_to_collection(
                batch, Tensor, lambda tensor: tensor[:few] if tensor.dim() else tensor
            )
        return self._prepared(batch, transferred)

    def _default_dtype(self) -> AbstractContextManager[None]:
        """What a training_step that makes tensors of its own relies on with precision="64-true"."""
        plugin = self._trainer.precision_plugin
        return plugin.forward_context() if isinstance(plugin, DoublePrecision) else nullcontext()


class _ReadOnlyTrainer:
    """What a copied training_step sees as its Trainer: every attribute to read, none to set, no logger."""

    def __init__(self, trainer: Trainer) -> None:
        object.__setattr__(self, "_read_only_trainer", trainer)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that isinstance(self.trainer, Trainer) holds
        return type(self._read_only_trainer)

    @property
    def logger(self) -> DummyLogger | None:
        return None if self._read_only_trainer.logger is None else DummyLogger()

    @property
    def loggers(self) -> list[DummyLogger]:
        return [DummyLogger() for _ in self._read_only_trainer.loggers]

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_read_only_trainer"), name)

    def __setattr__(self, name: str, value: object) -> None:
        raise ValueError(
            f"training_step sets trainer.{name}; it is run on a copy, and must not. Set it in "
            f"another hook, such as on_train_batch_end. {WAY_OUT}"
        )


def is_lightning_module(module: nn.Module) -> TypeGuard[LightningModule]:
    """Whether a module is a LightningModule, of `lightning` or of the older `pytorch_lightning` package."""
    return is_named(module, "LightningModule")


def is_named(thing: object, *names: str) -> bool:
    """Whether one of an object's classes has one of these names.

    By name: the classes of `lightning` and of the older `pytorch_lightning` are not related.
    """
    return any(base.__name__ in names for base in type(thing).__mro__)


def original_network(module: LightningModule, network: NetworkOption) -> nn.Module:
    """The module whose parameters the evidence is about.

    Raises:
        ValueError: If `network` names no submodule.
    """
    if not isinstance(network, str):
        return module
    try:
        return module.get_submodule(network)
    except AttributeError as error:
        names = [name for name, _ in module.named_children()]
        raise ValueError(
            f"network={network!r} names no submodule of {type(module).__name__}; its children are {names}."
        ) from error


def _base(datamodule: object) -> type:
    """The LightningDataModule that a datamodule is one of, of either package."""
    return next(base for base in type(datamodule).__mro__ if base.__name__ == "LightningDataModule")


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def num_examples_of(batch: Any) -> int | None:
    """The examples of a batch; None where its tensors do not agree (graphs, ragged lists, class weights)."""
    sizes: set[int] = set()
    apply_to_collection(batch, Tensor, lambda tensor: sizes.add(len(tensor)) if tensor.dim() else None)
    return sizes.pop() if len(sizes) == 1 else None
