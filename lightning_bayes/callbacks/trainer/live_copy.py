"""A copy of a LightningModule that follows it through training without being copied again."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_bayes.callbacks.trainer.module_reader import ModuleReader
from lightning_bayes.capture.as_written import as_real

PLAIN = (bool, int, float, complex, str, type(None))
LARGEST_CONTAINER = 100
"""Items up to which a list or dictionary of plain values follows the original's."""
OWN = frozenset(vars(LightningModule())) | {"training"}
"""Attributes that belong to torch and Lightning; the copy stays in eval mode."""


class LiveCopy:
    """A `ModuleReader` whose copy takes over the weights, buffers and plain values of the module when told to.

    Weights are copied rather than shared: an embedding with `max_norm`, or a training_step that clips weights,
    writes to them. Tensors, numbers, strings, and small lists and dictionaries of the latter two are taken over
    too, such as a coefficient that a schedule moves; other lists and dictionaries, other objects, and metrics, are
    each time as they were when the module was copied, so that what a training_step appends to them is not kept.

    Args:
        trainer: Read only.
        module: Copied once.

    Raises:
        ValueError: If the module cannot be copied.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.reader = ModuleReader(trainer, module)
        self._original = module
        self._identity = _identity(module)
        self._parameters = list(zip(self.reader.network.parameters(), module.parameters(), strict=True))
        self._buffers = list(self.reader.network.buffers())
        self._modules = list(zip(self.reader.network.modules(), module.modules(), strict=True))
        self._seen = [_plain_values(theirs) for _, theirs in self._modules]
        self._containers = [(mine, _containers(mine)) for mine, _ in self._modules if _containers(mine)]
        self._metrics = [mine for mine, _ in self._modules if isinstance(mine, Metric)]

    def refresh(self) -> bool:
        """Take over the present weights, buffers and plain values.

        Returns:
            False if the module is built in another way than when it was copied (parameters unfrozen, replaced or
            added): it has to be copied again.
        """
        # A buffer that is assigned to is a new tensor each time: they are found by their place.
        buffers = list(self._original.buffers())
        same_shapes = [mine.shape for mine in self._buffers] == [buffer.shape for buffer in buffers]
        if _identity(self._original) != self._identity or not same_shapes:
            return False
        for part, containers in self._containers:
            vars(part).update({name: _structure(value) for name, value in containers.items()})
        for metric in self._metrics:
            metric.reset()
        for index, (part, original) in enumerate(self._modules):
            self._seen[index] = _carry_plain_values(part, original, self._seen[index])
        with torch.no_grad():
            for mine, its_original in zip(self._buffers, buffers, strict=True):
                mine.copy_(its_original)
            for mine, theirs in self._parameters:
                mine.copy_(as_real(theirs))
        return True


def _carry_plain_values(mine: nn.Module, theirs: nn.Module, before: dict[str, Any]) -> dict[str, Any]:
    """Set what has changed in the original, and only that: readers alter some attributes of the copy."""
    values = _plain_values(theirs)
    for name, value in values.items():
        if not isinstance(value, PLAIN):
            vars(mine)[name] = _structure(value)
        elif name not in before or before[name] != value:
            vars(mine)[name] = value
    for name in vars(theirs).keys() - OWN:  # a temperature, say, that nobody has registered as a buffer
        value = vars(theirs)[name]
        if isinstance(value, Tensor):
            vars(mine)[name] = value.detach().clone()
    return values


def _identity(module: nn.Module) -> list[tuple[int, bool]]:
    """What must stay for the copy to be one: which parameters, and which of them train."""
    return [(id(parameter), parameter.requires_grad) for parameter in module.parameters()]


def _plain_values(module: nn.Module) -> dict[str, Any]:
    values = vars(module)
    return {name: _structure(values[name]) for name in values.keys() - OWN if _is_plain(values[name])}


def _containers(module: nn.Module) -> dict[str, Any]:
    """The lists and dictionaries of a module that hold something else than plain values, or nothing yet."""
    values = {name: vars(module)[name] for name in vars(module).keys() - OWN}
    return {
        name: _structure(value)
        for name, value in values.items()
        if type(value) in (list, dict) and not (value and _is_plain(value))
    }


def _is_plain(value: object) -> bool:
    if type(value) in (list, tuple, dict):
        items = list(value.values() if isinstance(value, dict) else value)  # type: ignore[call-overload]
        return len(items) <= LARGEST_CONTAINER and all(_is_plain(item) for item in items)
    return isinstance(value, PLAIN)


def _structure(value: Any) -> Any:
    """New lists and dictionaries around the same leaves."""
    if type(value) is list:
        return [_structure(item) for item in value]
    if type(value) is dict:
        return {key: _structure(item) for key, item in value.items()}
    return value
