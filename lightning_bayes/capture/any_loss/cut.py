"""Outputs of the network, as near to the parameters as they can be found, in which the loss is a sum over examples.

That it is one is proved by weights that pass through its Hessian; its second derivative, example by example, is what
the Gauss-Newton matrix is made of. Going on through maps that are affine leaves that as it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.capture.any_loss.loss_graph import Edge, PenaltyError
from lightning_bayes.capture.any_loss.recognised import recognised
from lightning_bayes.capture.any_loss.second_derivative import Derivatives, Outputs
from lightning_bayes.capture.any_loss.step_run import (
    Read,
    Route,
    StepRun,
    is_constant,
    layouts_of,
    outputs_of,
)
from lightning_bayes.capture.example_layout import Layout, follows_graph
from lightning_bayes.capture.loss_calls import Reduction, overridden
from lightning_bayes.errors import ReadOtherwiseError
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.likelihoods.expansion import (
    MOST_OUTPUTS,
    Expansion,
    IndefiniteLossError,
    LocalExpansion,
    root_of,
)

Kind = Literal["mean", "weighted mean", "sum"]
DEEPEST = 6
"""How often a cut through fewer tensors is taken apart into one through more."""
Cut = tuple[str, int, int]
"""How it was found: "inputs" of known losses; the "node" of a number from the loss; or that, taken apart so often."""
FLAT = (
    "its second derivative in the outputs is zero (it is piecewise linear, as mean absolute and quantile errors "
    "are): there is no curvature to make a Gauss-Newton matrix of. F.l1_loss is read as the Laplace density that it "
    "is the likelihood of."
)
NO_SUM = (
    "it is no sum over examples: the gradient in the outputs of one depends on the outputs of others, as in Dice, "
    "contrastive or ranking losses and roots of means. There is no likelihood that factorises over examples, and so "
    "no evidence."
)
PENALTY = (
    "a parameter reaches it by a way that no example is on, as a penalty on weights does. Regularise through the "
    "optimizer's weight_decay, which is the prior."
)


@dataclass
class HowRead:
    """How a loss is read by its graph: settled by the first batch, and kept to by the others.

    Attributes:
        is_by_graph: Whether the loss is none of PyTorch's as they are written.
        is_as_written: Whether some batch has been read as one.
        why: It is not, as a sentence.
        cut: Where the network ends.
        layouts: Of the tensors there.
        kind: How the loss is reduced.
        factor: Of the loss, where it is no likelihood's and a factor belongs to it.
        as_expansion: Whether the loss was not recognised.
        is_alike: Whether all terms of a likelihood that count do so alike, in every batch.
    """

    is_by_graph: bool = False
    is_as_written: bool = False
    why: str = ""
    cut: Cut | None = None
    layouts: dict[int, Layout] = field(default_factory=dict)
    kind: Kind | None = None
    factor: float | None = None
    as_expansion: bool = False
    is_alike: bool | None = None

    def term(self, weights: Tensor, otherwise: float, num_examples: int) -> float:
        """What a term of weight 1 counts in the loss: what all do where they are alike, however it was written.

        Args:
            weights: What each term counts in the loss.
            otherwise: What the last sum of the loss says.
            num_examples: Of the batch.

        Raises:
            ReadOtherwiseError: If they are not alike, and were so in all batches before.
        """
        counted = weights[weights != 0].abs()
        alike = len(counted) == 0 or is_constant(counted)
        if self.is_alike and not alike:
            self.is_alike = False
            raise ReadOtherwiseError(
                "The terms of the loss are weighted, which earlier batches did not tell."
            )
        if self.is_alike is None and num_examples > 1:
            self.is_alike = alike
        return counted[0].item() if alike and self.is_alike is not False and len(counted) else otherwise


class UnreadableGraphError(Exception):
    """Why the graph of a loss gives no sum over examples, as a sentence."""


@dataclass
class Curved(Route):
    """A loss that is known by its derivatives in the outputs alone."""

    run: StepRun = field(kw_only=True)
    outputs: Outputs = field(kw_only=True)
    derivatives: Derivatives = field(kw_only=True)
    how: HowRead = field(kw_only=True)

    @cached_property
    def hessian(self) -> Tensor:
        """Of each example, [N, K, K]."""
        return self.outputs.hessian(self.derivatives)

    def is_recognised(self) -> bool:
        """Whether it is the weighted sum of the terms of a likelihood."""
        value = self.run.loss.item()
        return (
            recognised(self.outputs, self.derivatives, value, "mean", lambda weights: 1.0, None) is not None
        )

    def check_convex(self) -> None:
        """Raise unless every example's Hessian can be formed, and has no negative eigenvalue."""
        size = sum(places.shape[1] for places in self.outputs.places())
        if size > MOST_OUTPUTS:
            raise UnreadableGraphError(
                f"an example has {size:,} outputs, of which up to {MOST_OUTPUTS} are read."
            )
        root_of(self.hessian, self.outputs.rows(self.derivatives.gradient))

    @override
    def read(self, reduction: Reduction, normaliser: float, factor: float, given: Likelihood | None) -> Read:
        how, outputs, value = self.how, self.outputs, self.run.loss.item()
        if not how.as_expansion:
            term = partial(how.term, otherwise=normaliser, num_examples=outputs.num_examples)
            known = recognised(outputs, self.derivatives, value, reduction, term, given)
            if known is not None:
                return known
            how.as_expansion = True
        likelihood: Likelihood = LocalExpansion()
        if given is not None:
            likelihood = overridden("a loss written out by hand", likelihood, given)
        scale = factor / normaliser
        expansion = Expansion(
            value * scale,
            outputs.rows(self.derivatives.gradient) * scale,
            self.hessian * scale,
            scale,
            float(outputs.num_examples),
        )
        expansion.root  # noqa: B018 - now, where an error says which loss it is of
        return outputs.rows(outputs.tensors), expansion, likelihood


def curved_route(run: StepRun, how: HowRead) -> Curved:
    """The route of a loss by a cut in which it is recognised, or is convex; the nearest one to the parameters.

    Raises:
        IndefiniteLossError: If it is a sum over examples in some cut, and convex in none.
        UnreadableGraphError: If it is a sum over examples in no cut.
    """
    reasons: list[str] = []
    routes: list[tuple[Cut, Curved]] = []
    indefinite: IndefiniteLossError | None = None
    for cut, edges in _cuts(run, how, reasons):
        if cut[2] and routes:
            break
        try:
            route = _at(run, how, cut, edges)
        except UnreadableGraphError as error:
            reasons.append(str(error))
            continue
        if route is not None:
            routes.append((cut, route))
            if not how.as_expansion and route.is_recognised():
                return _settled(how, cut, route)
    # A cut beyond a map that is not affine leaves the map's curvature out: what PyTorch's losses see is worth it.
    for cut, route in [*routes[:1], *(pair for pair in routes[1:] if pair[0][0] == "inputs")]:
        try:
            route.check_convex()
        except IndefiniteLossError as error:
            indefinite = indefinite or error
        else:
            return _settled(how, cut, route)
    if indefinite is not None:
        raise indefinite
    meet = "the parameters reach it by ways that meet in no tensor with a row for each example."
    raise UnreadableGraphError(reasons[0] if reasons else meet)


def _settled(how: HowRead, cut: Cut, route: Curved) -> Curved:
    if route.outputs.num_examples > 1:  # one example does not tell where it stands
        how.cut, how.layouts = cut, dict(enumerate(route.outputs.layouts))
    return route


def _at(run: StepRun, how: HowRead, cut: Cut, edges: Sequence[Edge]) -> Curved | None:
    """The route by one cut, None if its tensors are not seen or have no rows of examples.

    Raises:
        UnreadableGraphError: If the loss is no sum over examples, or has no curvature, in them.
    """
    tensors = [run.results.tensor(edge) for edge in edges]
    seen = [t for t in tensors if t is not None and t.dtype in (torch.float32, torch.float64)]
    if len(seen) < len(tensors) or not run.separates(seen):
        return None
    layouts = how.layouts if cut == how.cut else {}
    outputs = outputs_of(run, seen, lambda i, tensor: layouts.get(i) or layouts_of(run)(i, tensor))
    if outputs is None:
        return None
    pairs = list(zip(outputs.tensors, outputs.layouts, strict=True))
    if cut[0] == "inputs" and not all(follows_graph(t, outputs.num_examples, its) for t, its in pairs):
        return None
    try:
        derivatives = Derivatives(run.loss, outputs.tensors)
    except ValueError as error:
        raise UnreadableGraphError(str(error)) from error
    if derivatives.is_zero():
        raise UnreadableGraphError(FLAT)
    if outputs.num_examples > 1 and not outputs.is_sum_over_examples(derivatives):
        raise UnreadableGraphError(NO_SUM)
    rows = outputs.rows(derivatives.gradient)
    return Curved(rows, is_known=False, run=run, outputs=outputs, derivatives=derivatives, how=how)


def _cuts(run: StepRun, how: HowRead, reasons: list[str]) -> Iterator[tuple[Cut, Sequence[Edge]]]:
    """Cuts to try: nodes from the parameters on, inputs of losses that are known, and what the nodes are made of."""
    graph = run.graph
    inputs = [
        call.arguments[name] for call in run.calls for name in ("input", "var") if name in call.arguments
    ]
    graded = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.grad_fn is not None]
    nodes = list(enumerate(graph.dominators(graph.root)))
    cuts: list[tuple[Cut, Sequence[Edge]]] = [(("node", i, 0), its) for i, its in reversed(nodes)]
    if graded:
        of_inputs = dict.fromkeys((tensor.grad_fn, tensor.output_nr) for tensor in graded)
        cuts.append((("inputs", 0, 0), tuple(of_inputs)))
    for cut, its in cuts:
        if how.cut is None or cut == how.cut:
            yield cut, its
    if how.cut is None and NO_SUM in reasons:
        return  # nor is it one of what those outputs are made of

    def has_examples(edge: Edge) -> bool:
        return _has_examples(run, edge)

    with_examples = [(index, edges) for index, edges in nodes if all(map(has_examples, edges))]
    index, edges = with_examples[-1] if with_examples else nodes[0]
    try:
        for depth in range(1, DEEPEST + 1):
            nearer = graph.expanded(edges, has_examples)
            if nearer is None:
                return
            edges = nearer
            cut = ("expanded", index, depth)
            if how.cut is None or cut == how.cut:
                yield cut, edges
    except PenaltyError:
        reasons.insert(0, PENALTY)


def _has_examples(run: StepRun, edge: Edge) -> bool:
    """Whether the shape of a tensor has a dimension for the examples."""
    node, number = edge
    if (
        hasattr(node, "variable")
        and run.graph.is_leaf(node)
        and isinstance(node.variable, torch.nn.Parameter)
    ):
        return False
    tensor = run.results.tensor(edge)
    metadata = getattr(node, "_input_metadata", ())
    shape: Sequence[int] = ()
    if tensor is not None:
        shape = tensor.shape
    elif number < len(metadata):
        shape = tuple(metadata[number].shape)
    if run.num_examples is None:
        return len(shape) > 0 and shape[0] > 1
    return run.num_examples in shape or (len(shape) > 0 and shape[0] > 0 and shape[0] % run.num_examples == 0)
