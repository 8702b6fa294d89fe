"""Reads batches into a curvature: rows into a structure, or Hessians into their sum."""

import time
from dataclasses import replace
from typing import Protocol

from torch import nn

from lightning_bayes.capture.forward import Forward
from lightning_bayes.evidence.duration import hessian_seconds, rows_seconds
from lightning_bayes.evidence.options import Method
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.numerics.sampling_estimates import draw_blocks
from lightning_bayes.priors.prior import Prior
from lightning_bayes.row_storage.format import kept_widths
from lightning_bayes.rows.reader import BatchRows, RowReader
from lightning_bayes.rows.rows import RowBlock
from lightning_bayes.structures.base import Curvature, Problem
from lightning_bayes.structures.hessian import HessianCurvature
from lightning_bayes.structures.hessian_reader import BatchHessian, HessianReader
from lightning_bayes.structures.registry import STRUCTURES, choose_structure


class Intake(Protocol):
    """Reads batches into a curvature."""

    parameters: dict[str, nn.Parameter]
    method: Method

    @property
    def curved(self) -> Curvature | HessianCurvature | None:
        """What was read, None before the first batch."""
        ...

    def take(self, forward: Forward) -> BatchRows | BatchHessian:
        """Read one batch."""
        ...

    def plan(self, forward: Forward) -> tuple[str, float]:
        """Settle `method` by one batch, say why it is what it is, and how many seconds all will take, about."""
        ...

    def split(self) -> str:
        """Say by which derivatives batches are read."""
        ...


def intake_of(
    network: nn.Module,
    likelihood: Likelihood,
    prior: Prior,
    method: Method,
    num_examples: int,
    num_batches: int,
) -> Intake:
    """What reads the batches of a method."""
    if method.is_hessian:
        return _HessianIntake(network, likelihood, prior, method, num_examples)
    return _RowIntake(network, likelihood, prior, method, num_examples, num_batches)


class _RowIntake:
    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        prior: Prior,
        method: Method,
        num_examples: int,
        num_batches: int,
    ) -> None:
        self._sample = None if method.num_blocks is None else draw_blocks(num_batches, method.num_blocks)
        self._taken = 0
        self._reader = RowReader(network, prior.strengths, method.num_samples, method.backend)
        self._prior = prior
        self._likelihood = likelihood
        self._num_examples = num_examples
        self.parameters = self._reader.parameters
        self.method = method
        self.curved: Curvature | None = None

    def take(self, forward: Forward) -> BatchRows:
        """Read one batch; of one that is not in the sample of blocks all but its rows, which take C passes."""
        batch = self._reader.read(forward, self._likelihood)
        self._taken += 1
        if self._sample is not None and self._sample.role(self._taken - 1) is None:
            return batch
        for block in batch.blocks:
            if self.curved is None:
                problem, _ = self._settle(block)
                self.curved = STRUCTURES[self.method.structure](problem)
            self.curved.update(block)
        return batch

    def plan(self, forward: Forward) -> tuple[str, float]:
        problem, reason = self._settle(next(self._reader.read(forward, self._likelihood).blocks))
        start = time.perf_counter()  # again: the first batch is also where the plan is made
        for block in self._reader.read(forward, self._likelihood).blocks:
            kept_widths(block)  # looks at all of it
        return reason, rows_seconds(problem, self.method.structure, time.perf_counter() - start)

    def split(self) -> str:
        return self._reader.split

    def _settle(self, block: RowBlock) -> tuple[Problem, str]:
        first = next(iter(self.parameters.values()))
        kept_width, gram_width = kept_widths(block)
        problem = Problem(
            shapes={name: parameter.shape for name, parameter in self.parameters.items()},
            num_examples=self._num_examples,
            rank=block.num_columns,
            batch_size=block.num_examples,
            kept_width=kept_width,
            gram_width=gram_width,
            dtype=first.dtype,
            device=first.device,
            tolerance=self.method.tolerance,
            sampled=self.method.num_samples is not None,
            strengths=self._prior.strengths,
            scale=float(self._num_examples) if self._prior.per_example else 1.0,
            rises_together=self._prior.rises_together,
            block_sample=self._sample,
            sought=bool(self._prior.optimized) or self._likelihood.optimizes_dispersion,
        )
        if problem.sampled and self.method.structure == "auto":
            structure, reason = "kron", f"{block.num_columns} columns are sampled"
        else:
            structure, reason = choose_structure(self.method.structure, problem)
        self.method = replace(self.method, structure=structure)
        return problem, reason


class _HessianIntake:
    def __init__(
        self, network: nn.Module, likelihood: Likelihood, prior: Prior, method: Method, num_examples: int
    ) -> None:
        self._num_examples = num_examples
        self._reader = HessianReader(network, prior.strengths)
        self._likelihood = likelihood
        self.parameters = self._reader.parameters
        self.method = replace(method, structure="full")
        self.curved: HessianCurvature | None = None

    def take(self, forward: Forward) -> BatchHessian:
        batch = self._reader.read(forward, self._likelihood)
        if self.curved is None:
            first = next(iter(self.parameters.values()))
            self.curved = HessianCurvature(
                {name: parameter.shape for name, parameter in self.parameters.items()},
                first.device,
                only_positive=self.method.curvature == "hessian_positive",
            )
        self.curved.add(batch)
        return batch

    def plan(self, forward: Forward) -> tuple[str, float]:
        num_parameters = sum(parameter.numel() for parameter in self.parameters.values())
        start = time.perf_counter()
        batch = self._reader.read(forward, self._likelihood)
        took, device = time.perf_counter() - start, batch.matrix.device
        seconds = hessian_seconds(num_parameters, self._num_examples / batch.num_examples, took, device)
        return f"The Hessian of {num_parameters:,} parameters is dense", seconds

    def split(self) -> str:
        return "The Hessian is formed by autograd, twice"
