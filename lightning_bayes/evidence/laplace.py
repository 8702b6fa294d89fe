"""The Laplace log-evidence of any module on any training set, without a Trainer."""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.capture.examples import Examples
from lightning_bayes.capture.inputs_and_targets import examples_of_data, forward_of_pair, require_device
from lightning_bayes.capture.isolation import isolated
from lightning_bayes.capture.repeated_forwards import RepeatedForwards
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.options import Method, sampling_if_many_columns
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.evidence.totals import Totals, read_all
from lightning_bayes.functional._validation import check_options, module
from lightning_bayes.likelihoods import Likelihood, resolve_likelihood
from lightning_bayes.priors.prior import (
    PriorPrecision,
    prior_from,
    require_prior_precision,
    trainable_names,
)
from lightning_bayes.priors.subset import Subset, last_layer, matching

_Result = TypeVar("_Result")


def laplace_evidence(
    model: nn.Module,
    data: "DataLoader[Any] | tuple[Tensor, Tensor]",
    *,
    likelihood: str | Likelihood = "classification",
    structure: str = "auto",
    subset_of_weights: Subset = "all",
    curvature: str = "ggn",
    prior_precision: PriorPrecision = 1.0,
    backend: str = "auto",
    batch_size: int | None = None,
    max_examples: int | None = None,
    tolerance: float | None = None,
    num_samples: int | None = None,
    num_blocks: int | None = None,
    num_probes: int | None = None,
    max_stderr: float | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Evidence:
    """Laplace log-evidence of a network at its present weights, from its training data alone.

    ln P(y|x; M) ≈ ln P(y|ω, x) − ½ Σ λ ω² − ½ ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²), G the generalized Gauss-Newton
    matrix of the summed negative log-likelihood (Smith & Le, ICLR 2018, arXiv:1710.06451, eq. 9).

    Args:
        model: Maps a batch of inputs to logits or means, [N, C] or [N]. It is copied and left as it was:
            mode, gradients, hooks, buffers, random state.
        data: The training set: a DataLoader of (inputs, targets), read unshuffled and whole, or the two
            tensors.
        likelihood: "classification" (C logits), "binary" (one logit per output), "regression" (means),
            "gaussian_nll" (means, then variances), or a `Likelihood` with its own parameters, such as
            `Gaussian(sigma=0.1)` or `Categorical(label_smoothing=0.1, ignore_index=0)`. Sequences are logits
            [N, C, T] or [N, T, C] with targets [N, T].
        structure: "full" (exact, or a bracket of width `tolerance`), "lanczos" (an unbiased estimate of the exact
            value with its standard error, for any size), "blocks" (a bracket in time linear in N and
            bounded memory, wider the larger N), "kron", "kron_joint" (weight and bias of a layer in one
            block), "kron_expand" (positions of convolutions and sequences apart), "diag"; "auto" takes the first of
            "full", "lanczos" and "kron" that stays within the memory and time of `Budget`: 2 GB and a minute.
        subset_of_weights: "all"; "last_layer", the layer that is called last on the way to the outputs; or a
            list of parameter-name patterns (`["head.*"]`). The other parameters are conditioned on.
        curvature: "ggn"; "hessian", the true Hessian, dense, for small models, an error where the cost has no
            minimum; "hessian_positive", the paper's convention: the sum over the eigenvalues λᵢ ≥ λ alone,
            a heuristic that leaves directions of negative curvature out.
        prior_precision: λ of the Gaussian prior: one number; a mapping from parameter-name patterns
            (`"*.bias"`) to numbers, 0 for parameters to hold fixed, or "optimize"; "optimize" for the one λ
            that maximises the log-evidence at these weights; "optimize_per_layer", one for each module that
            holds parameters; "optimize_per_parameter", one for each parameter tensor.
        backend: "auto" takes the derivatives of each layer where they are known and torch.func for the rest;
            "backpack" refuses the rest; "autograd" takes torch.func for everything.
        batch_size: Examples at a time; None for the loader's own (at least 32), or 256 for tensors.
        max_examples: A random subset of this size, the same at every call; N is then its size.
        tolerance: Width in nats of the bracket [lower, upper] that is accepted; None for the exact value.
        num_samples: Columns of the loss Hessian's root to sample, for "kron" and "diag" of many classes;
            None for all, or 64 where structure="auto" meets more than 512 outputs per example and all their columns
            are beyond its budget.
        num_blocks: Batches whose rows "blocks" reads, eight or more, drawn at random, the same at every call; None
            for all. The log-likelihood stays that of all examples (one gradient pass); `lower`, and with it the
            value, is then an unbiased estimate of a lower bound with a standard error, `upper` a certified bound.
        num_probes: Random vectors of "lanczos", the same at every call; None for 8. The standard error falls with
            their square root, the time rises with them.
        max_stderr: Standard error of the log-evidence in nats until which "lanczos" adds vectors; None for
            `num_probes` of them. What it will cost is logged; beyond 1,024 vectors a warning says so instead.
        device: Where to compute; None for the model's own device.
        progress: Whether to show a progress bar.

    Returns:
        An `Evidence`; every value in nats, summed over the examples.

    Raises:
        ValueError: If an argument, the data or the network cannot be used; the message names the remedy.
        EvidenceUnavailableError: (a ValueError) If weights or outputs are not finite, or the true Hessian has
            no minimum there.

    Example:
        >>> evidence = laplace_evidence(model, (x, y), prior_precision=1.0)  # doctest: +SKIP
        >>> print(evidence)  # doctest: +SKIP
    """
    computation = Computation(
        likelihood=likelihood,
        structure=structure,
        subset_of_weights=subset_of_weights,
        curvature=curvature,
        prior_precision=prior_precision,
        backend=backend,
        batch_size=batch_size,
        max_examples=max_examples,
        tolerance=tolerance,
        num_samples=num_samples,
        num_blocks=num_blocks,
        num_probes=num_probes,
        max_stderr=max_stderr,
        device=device,
        progress=progress,
    )
    return computation.run(model, data, evidence_of)


@dataclass(frozen=True)
class Computation(Method):
    """Arguments of `laplace_evidence`, checked; `run` reads the data once and concludes from the totals."""

    likelihood: str | Likelihood = "classification"
    prior_precision: PriorPrecision = 1.0
    batch_size: int | None = None
    max_examples: int | None = None
    device: torch.device | str | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.batch_size, self.max_examples)
        require_prior_precision(self.prior_precision)
        resolve_likelihood(self.likelihood)
        require_device(self.device)

    def run(self, model: nn.Module, data: object, conclude: Callable[[Totals], _Result]) -> _Result:
        """Read the data once and return what `conclude` makes of the totals."""
        module("model", model)
        likelihood, device = resolve_likelihood(self.likelihood), require_device(self.device)
        if self.subset_of_weights != "last_layer":  # a wrong prior is found before the data are read
            prior_from(model, self.prior_precision, subset=self._named_subset(model))
        with isolated(data):
            examples = examples_of_data(data, self.batch_size, self.max_examples)
            network = throw_away_copy(model)
            if device is not None:
                network.to(device)
            where = next(network.parameters()).device
            if where.type == "meta":
                raise ValueError(
                    "The model's parameters are on the device 'meta', which has shapes and no numbers. Load its "
                    "weights first, for example by model.to_empty(device='cpu') and model.load_state_dict(...)."
                )
            batches = iter(_tracked(examples, self.progress))
            first = next(batches, None)
            method, subset = self._settled(network, first, where, examples)
            prior = prior_from(network, self.prior_precision, subset=subset)
            whole = batches if first is None else itertools.chain([first], batches)
            forwards = RepeatedForwards(
                (forward_of_pair(network, batch, where) for batch in whole),
                lambda: (forward_of_pair(network, batch, where) for batch in examples.read()),
            )
            announce = logging.getLogger("lightning_bayes").info
            for note in (*examples.notes, likelihood.note):
                if note is not None:
                    announce(f"{note}.")
            sizes = examples.num_examples, examples.num_batches
            with _reported(self.progress) as report:
                totals = read_all(network, forwards, likelihood, prior, method, *sizes, announce, report)
                return conclude(totals)

    def _named_subset(self, network: nn.Module) -> list[str] | None:
        if isinstance(self.subset_of_weights, str):
            return None
        return matching(trainable_names(network), self.subset_of_weights)

    def _settled(
        self, network: nn.Module, first: Any, device: torch.device, examples: Examples
    ) -> tuple[Method, list[str] | None]:
        """What only outputs can tell: how many there are, and which layer comes last."""
        subset = self._named_subset(network)
        if first is None or (
            self.structure not in ("auto", "lanczos") and self.subset_of_weights != "last_layer"
        ):
            return self, subset
        few = forward_of_pair(network, _first_examples(first), device)
        if self.subset_of_weights == "last_layer":
            subset = last_layer(network, lambda: few()[0])
        with torch.no_grad():
            outputs = few()[0]
        method: Method = self
        if isinstance(outputs, Tensor):
            number, batches = examples.num_examples, examples.num_batches
            size = sum(p.numel() for p in network.parameters() if p.requires_grad)
            method, changed = sampling_if_many_columns(self, outputs, number, size, -(-number // batches))
            if changed is not None:
                warnings.warn(changed, stacklevel=4)
        return method, subset


def _first_examples(batch: Any) -> Any:
    """A batch of two; a batch that is not a pair of tensors stays what it is, for `forward_of_pair` to refuse."""
    if not isinstance(batch, tuple | list):
        return batch
    few = [part[:2] if isinstance(part, Tensor) else part for part in batch]
    return few if isinstance(batch, list) else tuple(few)


def _tracked(examples: Examples, progress: bool) -> Iterable[Any]:
    if not progress:
        return examples.read()
    from rich.progress import track  # noqa: PLC0415 - only for the progress bar

    return track(examples.read(), description="evidence", total=examples.num_batches)


@contextmanager
def _reported(progress: bool) -> Iterator[Callable[[str], object]]:
    """What takes a few words on what is being done, and shows them from the first on."""
    if not progress:
        yield lambda text: None
        return
    from rich.status import Status  # noqa: PLC0415 - only for the progress bar

    status = Status("evidence")

    def report(text: str) -> None:
        status.update(f"evidence: {text}")
        status.start()

    try:
        yield report
    finally:
        status.stop()
