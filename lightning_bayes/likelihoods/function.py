"""A likelihood of the user's own, from one function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.likelihoods.base import Likelihood, check_root_fits
from lightning_bayes.likelihoods.expansion import GENERALISED, MOST_OUTPUTS, IndefiniteLossError, root_of
from lightning_bayes.numerics.devices import accumulation_dtype


class NegativeLogLikelihood(Likelihood):
    """The likelihood of one function: (outputs of one example, its target) to the negative log-likelihood in nats.

    Its Hessian in the outputs is taken by `torch.func`, example by example; it must have no negative eigenvalue, or
    `fisher_information` must be given. Leave out no constant of the density: the evidence counts them.

    Args:
        function: Of tensors without the dimension of examples: outputs [...], target [...]; returns a scalar. It is
            mapped by `torch.func.vmap`, so it must not branch on values.
        fisher_information: From outputs [...] of K numbers to their Fisher information [K, K], the expected Hessian
            over targets that the model itself would draw; None for the Hessian at the targets at hand.
        normalised: Whether exp(−function) adds up to 1 over the targets. If not, what is scored is a generalised
            evidence, to be compared for the same function alone.

    Example:
        >>> def poisson(log_rate, count):
        ...     return log_rate.exp() - count * log_rate + torch.lgamma(count + 1)
        >>> likelihood = NegativeLogLikelihood(poisson)
    """

    name = "function"

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        fisher_information: Callable[[Tensor], Tensor] | None = None,
        normalised: bool = True,
    ) -> None:
        for name, given in (("function", function), ("fisher_information", fisher_information)):
            if not callable(given) and (given is not None or name == "function"):
                raise ValueError(f"Expected argument `{name}` to be a function, got {given!r}.")
        self.function, self.fisher_information, self.normalised = function, fisher_information, normalised
        self.note = None if normalised else GENERALISED

    @override
    def prepare(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are, with as many examples."""
        if outputs.dim() == 0 or not isinstance(targets, Tensor) or targets.shape[:1] != outputs.shape[:1]:
            raise ValueError(
                "A NegativeLogLikelihood needs outputs and targets of as many examples, in the first dimension, got "
                f"outputs {list(outputs.shape)} and targets {list(getattr(targets, 'shape', ()))}."
            )
        if outputs[0].numel() > MOST_OUTPUTS:
            raise ValueError(
                f"A NegativeLogLikelihood forms the Hessian of up to {MOST_OUTPUTS} outputs an example, got "
                f"{list(outputs.shape)}."
            )
        return outputs, targets

    @override
    def unit_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ function(fₙ, yₙ)."""
        losses = self._mapped(self.function, outputs, targets)
        if losses.shape != outputs.shape[:1]:
            raise ValueError(
                "Expected argument `function` to return one number for one example, got a tensor of shape "
                f"{list(losses.shape[1:])}: add up its terms."
            )
        return losses.sum(dtype=accumulation_dtype(outputs.device))

    @override
    def sqrt_hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Columns [K, N, ...] by the eigenvectors of each example's Hessian, or Fisher information."""
        outputs, size = outputs.detach(), outputs[0].numel()
        check_root_fits(size, outputs)
        if self.fisher_information is None:
            matrices = self._mapped(torch.func.jacrev(torch.func.jacrev(self.function)), outputs, targets)
        else:
            matrices = self._mapped(self.fisher_information, outputs)
        matrices = matrices.reshape(len(outputs), size, size)
        try:
            root = root_of(matrices, matrices)
        except IndefiniteLossError as error:
            raise EvidenceUnavailableError(
                f"{error} Give NegativeLogLikelihood fisher_information=."
            ) from error
        return root.reshape(size, *outputs.shape)

    @override
    def num_terms(self, outputs: Tensor, targets: Any) -> float:
        """N."""
        return len(outputs)

    def _mapped(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        result: Tensor = torch.func.vmap(function)(*tensors)
        return result
