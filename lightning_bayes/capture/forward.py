"""The network on one batch: what it returns, and whether the batch's examples influence each other's outputs.

Derivatives do not show what is mixed under `no_grad`, behind `detach`, by sorting or by the place in the batch: all
outputs are held against those of the same examples in other groups.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_bayes.capture.module_calls import recorded_calls, tensors_of
from lightning_bayes.errors import check_finite
from lightning_bayes.likelihoods import Likelihood

Forward = Callable[[], tuple[Tensor, Tensor]]
"""Runs the network on one batch and returns its outputs, with their graph, and the targets."""
PLAIN = (bool, int, float, complex, str, bytes, type(None))
ROUNDING = 3e3
"""Difference, in units of the type's rounding, that the size of a batch may make by the kernels that it chooses."""
PERTURBATION = 8.0
"""Relative change of each weight, in units of rounding, that shows how far the network amplifies rounding."""
AMPLIFIED = 100.0
"""Differences up to this many times the effect of `PERTURBATION` pass for rounding."""


@dataclass(frozen=True)
class BatchForward:
    """The call of a network on one batch, whole or some of its examples.

    Attributes:
        run: Runs the network on a batch that it may work on in place, and returns its outputs, with their graph,
            and the targets.
        batch: The batch, left as it is.
    """

    run: Callable[[Any], tuple[Tensor, Tensor]]
    batch: Any

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets of all examples."""
        return self.run(apply_to_collection(self.batch, Tensor, Tensor.clone))

    def of(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets of some examples by themselves."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor[examples.to(tensor.device)] if tensor.dim() else tensor.clone()

        return self.run(apply_to_collection(self.batch, Tensor, chosen))

    def num_examples(self) -> int | None:
        """N; None where the batch cannot be taken apart: a graph, tensors that do not agree, objects."""
        if not _is_plain(self.batch):
            return None
        sizes = {len(tensor) for tensor in tensors_of(self.batch) if tensor.dim()}
        return sizes.pop() if len(sizes) == 1 else None


def forward_of(
    forward: Callable[[], tuple[Tensor, Tensor]], likelihood: Likelihood
) -> tuple[Tensor, Tensor, Tensor]:
    """Prepared outputs, with their graph, targets, and the summed unit loss of one batch.

    Raises:
        EvidenceUnavailableError: If outputs or targets are not finite.
        ValueError: If they do not fit the likelihood, or carry no graph.
    """
    outputs, targets = forward()
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"The network returned {type(outputs).__name__}; the evidence needs one tensor of logits or "
            "means, [N, C] or [N]. Wrap it in a module that returns that tensor."
        )
    check_finite(outputs, "the network's outputs")
    if isinstance(targets, Tensor) and targets.is_floating_point():  # else they have been prepared
        check_finite(targets, "the targets")
    outputs, targets = likelihood.prepare(outputs, targets)
    unit_loss = likelihood.unit_loss(outputs, targets)
    if not unit_loss.requires_grad:
        raise ValueError(
            "The network's outputs carry no graph back to its parameters: they were detached or computed "
            "under no_grad."
        )
    return outputs, targets, unit_loss


def check_apart(
    forward: object,
    outputs: Tensor,
    likelihood: Likelihood,
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
) -> bool:
    """Refuse a batch whose examples influence each other's outputs, at the cost of one forward pass.

    Args:
        forward: Of the batch; only a `BatchForward` can be regrouped.
        outputs: Of the whole batch, as `likelihood.prepare` returns them.
        likelihood: Of the targets given the outputs.
        network: The network.
        parameters: Those that carry a prior.

    Returns:
        Whether it is known that they do not. A batch of one example, one that cannot be taken apart, and a network
        that draws random numbers do not tell.

    Raises:
        ValueError: If they do, and a parameter stands before or in what mixes them.
    """
    size = len(outputs)
    if not isinstance(forward, BatchForward) or size < 2 or forward.num_examples() != size:
        return False
    halves = _halves(size, outputs.device)
    # Torch's streams stay as they are: what the rows are read from has drawn, or will draw, from them.
    devices = [outputs.device] if outputs.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            again = [_prepared(forward.of(half), likelihood) for half in halves]
        except Exception as error:
            # Somebody's module need not take batches of another size: anything may come, and nothing is told.
            logging.getLogger("lightning_bayes").info(
                "Whether examples of a batch influence each other's outputs is not tried: the network does not take "
                "some of them by themselves (%s: %s).",
                type(error).__name__,
                error,
            )
            return False
        outputs = outputs.detach()
        _refuse_pairs(again, outputs)
        if any(part.shape != outputs[half].shape for part, half in zip(again, halves, strict=True)):
            return False
        difference = max(_largest(part - outputs[half]) for part, half in zip(again, halves, strict=True))
        scale = _largest(outputs)
        allowed = ROUNDING * torch.finfo(outputs.dtype).eps * scale
        if difference <= allowed:
            return True
        once_more = _largest(_prepared(forward(), likelihood) - outputs)
        drawn = once_more > allowed  # random numbers, or a state
        if drawn or difference <= AMPLIFIED * _sensitivity(forward, outputs, likelihood, network):
            return False
        _refuse(_before_the_mixing(forward, halves, network, parameters), difference, scale)
    return False


def _refuse_pairs(parts: Sequence[Tensor], outputs: Tensor) -> None:
    """Raise where an example has as many outputs as its batch has examples, or a multiple: a loss over pairs."""
    width = outputs.shape[-1] if outputs.dim() > 1 else 0
    if width and all(
        part.dim() > 1 and part.shape[-1] != width and part.shape[-1] * len(outputs) == width * len(part)
        for part in parts
    ):
        raise ValueError(
            f"The loss compares the examples of a batch with each other: each has {width} outputs in a batch of "
            f"{len(outputs)}, and fewer in a smaller one, as in contrastive learning. There is no likelihood that "
            "factorises over examples, and so no evidence. Leave LaplaceEvidence out of this run."
        )


def _refuse(before: list[str], difference: float, scale: float) -> None:
    """Raise where parameters stand before the mixing, and say so where none does."""
    if before:
        raise ValueError(
            f"The rows of {before} cannot be formed: the network mixes the examples of a batch (batch norm without "
            "running statistics, a mean or an order over the batch, also under no_grad): the outputs of an example "
            f"change by up to {difference:.3g} of {scale:.3g} with the others in its batch. The evidence needs the "
            "likelihood to factorise over examples. Hold the parameters before the mixing fixed "
            "(requires_grad=False), or use group or layer norm, or batch norm with running statistics."
        )
    warnings.warn(
        "The network mixes the examples of a batch before the parameters that carry a prior: the evidence is that of "
        "the features as these batches make them, and changes with batch_size=.",
        stacklevel=3,
    )


def _halves(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two groups drawn at random, in the order of the batch, which may be sorted."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    first, second = order[: size // 2].sort()[0], order[size // 2 :].sort()[0]
    return first.to(device), second.to(device)


def _prepared(pair: tuple[Tensor, Tensor], likelihood: Likelihood) -> Tensor:
    return likelihood.prepare(*pair)[0].detach()


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _sensitivity(forward: BatchForward, outputs: Tensor, likelihood: Likelihood, network: nn.Module) -> float:
    """How much the outputs change where each weight changes by a few units of rounding: what amplifies rounding."""
    weights = [weight for weight in network.parameters() if weight.is_floating_point()]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(
                    1.0 + PERTURBATION * torch.finfo(weight.dtype).eps * torch.randn_like(weight).sign()
                )
        return _largest(_prepared(forward(), likelihood) - outputs)
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def _before_the_mixing(
    forward: BatchForward,
    halves: Sequence[Tensor],
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
) -> list[str]:
    """Parameters that some call uses whose arguments do not depend on the grouping, or whose calls are not seen."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    holders = {
        module: held
        for module in network.modules()
        if (held := [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names])
    }
    recorded = []
    runs: list[Forward] = [forward, *(partial(forward.of, half) for half in halves)]
    for run in runs:
        with recorded_calls(holders) as calls:
            run()
        recorded.append(calls)
    whole, *parts = recorded
    seen: dict[nn.Module, bool] = {}  # whether all its calls have arguments that depend on the grouping
    aligned = all(len(calls) == len(whole) for calls in parts)
    for index, call in enumerate(whole if aligned else ()):
        given = tensors_of(call.arguments)
        mixed = any(
            _depends(tensor, tensors_of(calls[index].arguments)[place], half)
            for calls, half in zip(parts, halves, strict=True)
            for place, tensor in enumerate(given)
        )
        seen[call.module] = seen.get(call.module, True) and mixed
    before = (name for module, held in holders.items() if not seen.get(module, False) for name in held)
    return list(dict.fromkeys(before))


def _depends(whole: Tensor, part: Tensor, half: Tensor) -> bool:
    """Whether the entries of some examples are others in the whole batch than in a part of it."""
    if whole.dim() == 0 or len(part) != len(half) or not whole.is_floating_point():
        return False
    expected = whole[half]
    if expected.shape != part.shape:
        return False
    allowed = ROUNDING * torch.finfo(whole.dtype).eps * _largest(whole)
    return _largest(expected - part) > allowed


def _is_plain(tree: Any) -> bool:
    """Whether a batch is made of dense tensors and plain things in tuples, lists and dicts alone."""
    if isinstance(tree, Tensor):
        return tree.layout is torch.strided and not tree.is_nested
    if isinstance(tree, PackedSequence):
        return False
    if type(tree) is dict:
        return all(map(_is_plain, tree.values()))
    if type(tree) in (tuple, list) or (isinstance(tree, tuple) and hasattr(tree, "_fields")):
        return all(map(_is_plain, tree))
    return isinstance(tree, PLAIN)
