"""The block-diagonal Kronecker approximation of the generalized Gauss-Newton matrix (KFLR).

Martens & Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*, ICML 2015;
Botev, Ritter & Barber, *Practical Gauss-Newton Optimisation for Deep Learning*, ICML 2017, for the exact
output factor that KFLR takes. Scales as BackPACK and laplace-torch have them.
"""

import logging
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.rows.rows import OuterRows, RowChunk, Rows
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem
from lightning_bayes.structures.column_groups import ColumnGroups
from lightning_bayes.structures.kronecker_blocks import Block, DiagonalBlock, ExactBlock, LinearBlock

UNCORRECTED = (
    "A Kronecker factor is so large that its sampling error is told to first order, and the number is not corrected "
    "for the bias of sampling: decompositions for both would take longer than the number. More num_samples= help."
)
_LOGGER = logging.getLogger("lightning_bayes")


class KroneckerCurvature(Curvature):
    """One block for each parameter tensor: weights of linear and ungrouped convolutional layers as B ⊗ A.

    A = (1/N) Σₙ Σₜ a aᵀ counts each output position, and each use, as an input of the linear map; B = Σₙ,c
    (Σₜ g)(Σₜ g)ᵀ sums them, as BackPACK does. Biases of these layers keep their exact block, and so do other
    parameters (normalisation, embeddings, recurrent and attention weights, grouped convolutions) of up to
    `Budget.kronecker_exact` entries; larger ones keep its diagonal. A model in float32 has its factors decomposed in
    float32, which costs about the sixth digit of the log-determinant, and the fourth under a prior so weak that
    eigenvalues below eps of the largest count: 5 nats of 38,000 for 100-64-10 at λ = 1e-6. A float64 model has them.

    Sampled columns are kept in groups, whose jackknife corrects the log-determinant and the effective
    parameters in `at` and gives their standard errors; `spectrum` and `log_det_and_traces` are not corrected, and
    nor is `at` where a factor has a side above `Budget.kronecker_left_out`.

    Args:
        problem: Sizes.
        joint: Whether weight and bias of a layer make one block, by a 1 after each a.
        expand: Whether each position counts as an example of its own, A = (1/NT) Σₙ Σₜ a aᵀ and B = Σₙ,c Σₜ g gᵀ:
            KFAC-expand of Eschenhagen et al., *Kronecker-Factored Approximate Curvature for Modern Neural Network
            Architectures*, NeurIPS 2023. The same where a layer has one position.
    """

    searches_by_spectrum = True

    def __init__(self, problem: Problem, joint: bool = False, expand: bool = False) -> None:
        super().__init__(problem)
        self._joint, self._expand = joint, expand
        self._groups = ColumnGroups(problem)
        self._blocks: dict[tuple[str, ...], Block] = {}

    @override
    def update(self, chunk: RowChunk) -> None:
        groups = self._groups.columns(chunk)
        for layer in chunk.layers:
            own = self._block_of(layer)
            if isinstance(own, LinearBlock) and isinstance(layer, OuterRows):
                own.add(layer, groups, first=chunk.columns.start == 0)
            elif isinstance(own, ExactBlock | DiagonalBlock) and not isinstance(layer, OuterRows):
                own.add(layer, groups)
            else:
                raise ValueError(_changing(layer))

    def _block_of(self, layer: Rows) -> Block:
        """Where the rows belong; made for the first of them."""
        if layer.names not in self._blocks:
            if any(set(layer.names) & set(names) for names in self._blocks):
                raise ValueError(_changing(layer))
            if isinstance(layer, OuterRows):
                self._blocks[layer.names] = LinearBlock(layer, self._joint, self.problem, self._expand)
            else:
                block = (
                    ExactBlock
                    if layer.shape.numel() <= self.problem.budget.kronecker_exact
                    else DiagonalBlock
                )
                self._blocks[layer.names] = block(layer.name, self.problem)
        return self._blocks[layer.names]

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        log_det = gamma = quadratic = 0.0
        for block in self._blocks.values():
            summary = block.summary(precision, gradient)
            log_det += summary.log_det
            gamma += sum(summary.effective.values())
            quadratic += summary.quadratic
        for name in gradient.keys() - {name for names in self._blocks for name in names}:
            # Not on the way to the outputs: no curvature.
            quadratic += gradient[name].square().sum().item() / precision[name]
        log_det_stderr = gamma_stderr = 0.0
        if self.problem.sampled:

            def without(group: int, scale: float) -> Iterator[Tensor]:
                for block in self._blocks.values():
                    yield block.eigenvalues(precision, group, scale)

            corrected, corrected_gamma = self._groups.jackknifed(log_det, gamma, without)
            log_det_stderr, gamma_stderr = corrected[1], corrected_gamma[1]
            if all(block.leaves_out_exactly for block in self._blocks.values()):
                log_det, gamma = corrected[0], corrected_gamma[0]
            else:
                _LOGGER.info(UNCORRECTED)
        return CurvatureSummary(
            log_det,
            (0.0, math.inf),
            gamma,
            quadratic,
            log_det_stderr=log_det_stderr,
            effective_parameters_stderr=gamma_stderr,
        )

    @override
    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        return torch.cat([block.eigenvalues(precision) for block in self._blocks.values()])

    @override
    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        log_det, traces = 0.0, dict.fromkeys(self.problem.shapes, 0.0)
        for block in self._blocks.values():
            summary = block.summary(precision, None)
            log_det += summary.log_det
            traces |= summary.effective
        return log_det, traces


def _changing(layer: Rows) -> str:
    return (
        f"The network uses {list(layer.names)} in different ways in different batches, which have no Kronecker "
        'form in common. Use structure="diag".'
    )
