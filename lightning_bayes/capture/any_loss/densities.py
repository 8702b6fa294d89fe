"""Log-densities whose Fisher information is known, added up with weights that no parameter changes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.capture.any_loss.distributions import Density, density_of, density_of_call
from lightning_bayes.capture.any_loss.second_derivative import Derivatives, Outputs
from lightning_bayes.capture.any_loss.step_run import Read, Route, StepRun, outputs_of, reduced
from lightning_bayes.capture.autograd_graph import graph_nodes
from lightning_bayes.capture.example_layout import Layout
from lightning_bayes.capture.loss_calls import Reduction, overridden
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.likelihoods.expansion import MOST_OUTPUTS, Expansion, LocalExpansion


@dataclass
class KnownDensities(Route):
    """Log-densities whose Fisher information is known, added up with weights."""

    run: StepRun = field(kw_only=True)
    densities: Sequence[Density] = field(kw_only=True)
    coefficients: Sequence[Tensor] = field(kw_only=True)
    outputs: Outputs = field(kw_only=True)

    @override
    def read(self, reduction: Reduction, normaliser: float, factor: float, given: Likelihood | None) -> Read:
        outputs, derivatives = self.outputs, Derivatives(self.run.loss, self.outputs.tensors)
        rows = outputs.rows(outputs.tensors)
        information = rows.new_zeros(*rows.shape, rows.shape[1], requires_grad=False)
        constant, observed = 0.0, 0.0
        columns = self._columns()
        for density, coefficient in zip(self.densities, self.coefficients, strict=True):
            weights = weights_of_variables(density, coefficient / normaliser)
            observed += weights.double().sum().item()
            if isinstance(density.constant, Tensor):
                constant += (weights * density.constant).double().sum().item()
            self._add(information, density, weights, columns)
        likelihood, num_terms = reduced(LocalExpansion(self._note()), reduction, normaliser)
        if given is not None:
            likelihood = overridden(self.densities[0].name, likelihood, given)
        expansion = Expansion(
            self.run.loss.item() / normaliser + constant,
            outputs.rows(derivatives.gradient) / normaliser,
            outputs.hessian(derivatives) / normaliser,
            num_terms,
            observed,
            information,
        )
        expansion.root  # noqa: B018 - now, where an error says which loss it is of
        return rows, expansion, likelihood

    def _note(self) -> str | None:
        names = sorted({density.name for density in self.densities})
        is_of_l1 = "F.l1_loss" in names
        return "F.l1_loss is scored as a Laplace density of scale 1" if is_of_l1 else None

    def _columns(self) -> dict[int, Tensor]:
        """Columns of the outputs that each entry of a tensor became, in its own shape."""
        columns, start = {}, 0
        for tensor, places in zip(self.outputs.tensors, self.outputs.places(), strict=True):
            own = torch.arange(start, start + places.shape[1], device=tensor.device)
            column = places.new_empty(tensor.numel())
            column[places.flatten()] = own.expand_as(places).flatten()
            columns[id(tensor)] = column.reshape(tensor.shape)
            start += places.shape[1]
        return columns

    def _add(
        self, information: Tensor, density: Density, weights: Tensor, columns: dict[int, Tensor]
    ) -> None:
        """Add the weighted information of all variables of a density at their examples and columns."""
        entries = (density.information * weights[..., None, None]).flatten(0, -3)  # [variables, P, P]
        if density.vector:
            own = columns[id(density.parameters[0])].flatten(0, -2)  # [variables, P]
        else:
            own = torch.stack([columns[id(parameter)].flatten() for parameter in density.parameters], dim=-1)
        example = self._example(density)
        place = (example[:, None, None], own[:, :, None], own[:, None, :])
        information.index_put_(place, entries.to(information), accumulate=True)

    def _example(self, density: Density) -> Tensor:
        """The example that each variable belongs to."""
        tensor = density.parameters[0]
        index = next(i for i, other in enumerate(self.outputs.tensors) if other is tensor)
        places = self.outputs.places()[index]
        example = places.new_empty(tensor.numel())
        own = torch.arange(len(places), device=tensor.device).unsqueeze(1)
        example[places.flatten()] = own.expand_as(places).flatten()
        example = example.reshape(tensor.shape)
        return example[..., 0].flatten() if density.vector else example.flatten()


def weights_of_variables(density: Density, coefficient: Tensor) -> Tensor:
    """What each variable of a density counts, in the shape of its batch; several targets of one are added up."""
    coefficient = coefficient * density.sign
    if coefficient.numel() == 1 and math.prod(density.shape) > 1:
        return (coefficient.reshape(()) * density.share).expand(density.shape)
    return coefficient.sum_to_size(density.shape)


def known_densities(run: StepRun, layouts: Callable[[int, Tensor], Layout | None]) -> Route | None:
    """The route of a loss made of densities in the tables of `distributions`, None if it is not."""
    terms = [(partial(density_of, its, result), result) for its, result in run.log_probs]
    terms += [(partial(density_of_call, call), call.result) for call in run.calls]
    # A distribution that hands its call on returns the same tensor, later.
    unique = {run.graph.edge(result): (make, result) for make, result in reversed(terms)}
    inner = [(make, result) for make, result in unique.values() if not _is_made_of(result, terms)]
    if not inner or not run.separates([result for _, result in inner]):
        return None
    coefficients = run.coefficients([result for _, result in inner])
    if coefficients is None:
        return None
    densities = [make() for make, _ in inner]
    known = [density for density in densities if density is not None]
    signed = [each * density.sign for density, each in zip(known, coefficients, strict=False)]
    apart = all(density.has_targets_of_its_own(run.num_examples) for density in known)
    if len(known) < len(densities) or not apart or any(bool((each < 0).any()) for each in signed):
        return None
    tensors = list({id(t): t for density in known for t in density.parameters}.values())
    if not run.separates(tensors):
        return None
    outputs = outputs_of(run, tensors, layouts)
    if outputs is None or sum(places.shape[1] for places in outputs.places()) > MOST_OUTPUTS:
        return None
    all_weights = [
        weights_of_variables(density, each) for density, each in zip(known, coefficients, strict=True)
    ]
    rows = []
    for density, weights in zip(known, all_weights, strict=True):
        like = density.parameters[0]
        index = next(i for i, other in enumerate(tensors) if other is like)
        spread = weights.unsqueeze(-1).expand(like.shape) if density.vector else weights
        rows.append(outputs.layouts[index].apart(spread, outputs.num_examples).flatten(1))
    first = known[0]
    per_term = (
        signed[0].item() * first.share if signed[0].numel() == 1 and math.prod(first.shape) > 1 else None
    )
    return KnownDensities(
        torch.cat(rows, dim=1), per_term, run=run, densities=known, coefficients=coefficients, outputs=outputs
    )


def _is_made_of(result: Tensor, terms: Sequence[tuple[Any, Tensor]]) -> bool:
    others = {other.grad_fn for _, other in terms} - {result.grad_fn}
    return any(node in others for node in graph_nodes([result], ends=others))
