"""Training data as pairs of tensors: what holds them, where they go, and the network's call on one batch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bayes.capture.examples import Examples, examples_from_loader, examples_from_tensors
from lightning_bayes.capture.forward import BatchForward, Forward
from lightning_bayes.errors import EvidenceUnavailableError


def examples_of_data(data: object, batch_size: int | None, max_examples: int | None) -> Examples:
    """Examples of a DataLoader or of a pair of tensors.

    Raises:
        ValueError: If it is neither, or cannot be read.
    """
    if isinstance(data, DataLoader):
        return examples_from_loader(data, batch_size, max_examples)
    if isinstance(data, tuple | list):
        return examples_from_tensors(data, batch_size, max_examples)
    raise ValueError(
        "Expected argument `data` to be a DataLoader or a tuple of tensors (inputs, targets), got "
        f"{type(data).__name__}."
    )


def require_device(device: object) -> torch.device | None:
    """A device by its name, None for the model's own.

    Raises:
        ValueError: If there is none of that name, or it holds no numbers.
    """
    if device is None:
        return None
    try:
        chosen: torch.device = torch.device(device)  # type: ignore[call-overload]
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"Expected argument `device` to be a torch.device, its name or None, got {device!r}."
        ) from error
    if chosen.type == "meta":
        raise ValueError(
            "Expected argument `device` to be a device that computes, got 'meta', which has shapes and no numbers. "
            "Use 'cpu', 'cuda' or None for the model's own."
        )
    return chosen


def forward_of_pair(network: nn.Module, batch: Any, device: torch.device) -> Forward:
    """The call of a network on one batch of (inputs, targets), not made yet.

    Raises:
        ValueError: If the batch is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise ValueError(
            f"Expected the DataLoader to yield (inputs, targets), got {type(batch).__name__}. For other "
            "batches use the LaplaceEvidence callback, which lets training_step take them apart."
        )
    inputs, targets = batch
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"Expected the DataLoader's inputs to be one tensor, got {type(inputs).__name__}. For other inputs "
            "use the LaplaceEvidence callback, which lets training_step take them apart."
        )
    if inputs.dtype in (torch.float16, torch.bfloat16):  # the copy of a half-precision model is float32
        inputs = inputs.to(next(network.parameters()).dtype)

    def run(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _outputs(network, pair[0].to(device)), pair[1].to(device)

    return BatchForward(run, (inputs, targets))


def _outputs(network: nn.Module, inputs: Tensor) -> Any:
    """The network's outputs, or an error that says what it was given."""
    try:
        return network(inputs)
    except (EvidenceUnavailableError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        taken = next(network.parameters())
        raise ValueError(
            f"{type(network).__name__}, with parameters of {taken.dtype}, failed on inputs of argument `data`, "
            f"{tuple(inputs.shape)} of {inputs.dtype}: {error}. Give the inputs that it was trained on, the "
            "examples in the first dimension; for batches of another kind use the LaplaceEvidence callback."
        ) from error
