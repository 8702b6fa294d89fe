"""Traces of functions of a symmetric matrix that is known by its products, by stochastic Lanczos quadrature.

For a vector z of random signs, zᵀf(A)z has the mean tr f(A) (Hutchinson 1990), and k steps of Lanczos' recurrence
from z turn it into a sum over k nodes: Gauss's rule |z|² e₁ᵀf(T)e₁ (Golub & Meurant, Matrices, Moments and
Quadrature, 2010; Ubaru, Chen & Saad, SIAM J. Matrix Anal. Appl. 2017). For f = ln Gauss's rule lies above zᵀf(A)z,
and Gauss-Radau's, with one node at a lower end of the spectrum, below: their gap says when there are steps enough.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.numerics.lanczos import orthogonalised

FEWEST_STEPS = 2
CHECKS = 16
"""The rules are compared at each step first, then at one in so many of the steps so far."""
EXHAUSTED = 10.0
"""Units of rounding, relative to the largest |eigenvalue| seen, below which a vector's Krylov space is invariant."""

Function = Callable[[Tensor], Tensor]
"""From eigenvalues to values, entry by entry."""


def random_signs(numbers: Iterable[int], like: Tensor) -> Tensor:
    """Vectors of ±1 [k, n], one for each number, with the type and device of `like` [n]; the same on every device."""
    vectors = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        vectors.append(torch.randint(0, 2, (len(like),), generator=generator, dtype=torch.int8))
    return torch.stack(vectors).to(like.device).to(like.dtype).mul_(2.0).sub_(1.0)


class SampledTrace:
    """An estimate of tr A from pairs (z, Az) of vectors of random signs, taken in group by group.

    With x_j = z_j ∘ Az_j, of which entry i has the mean A_ii and the variance Σ_{l≠i} A_il², Var zᵀAz = 2 Σ_i Var x_i
    for a symmetric A, and at most that for any: the spread of the *entries* over the vectors tells the error of the
    mean far better than that of the few sums does. One vector has no spread; then A_ii counts as 0, and the error is
    an upper bound.
    """

    def __init__(self) -> None:
        self.num_vectors = 0
        self._sums: Tensor = torch.zeros(())  # Σ_j x_j and Σ_j x_j², [n]
        self._squares: Tensor = torch.zeros(())
        self._spreads: list[float] = []  # Σ_i (x_ji − x̄_i)² of each vector, about the mean of its group

    def add(self, signs: Tensor, images: Tensor) -> None:
        """Take in z and Az, both [k, n]."""
        entries = (signs * images).to(accumulation_dtype(signs.device))
        if len(entries) > 1:
            self._spreads += (entries - entries.mean(0)).square().sum(1).tolist()
        self._sums = self._sums.to(entries) + entries.sum(0)
        self._squares = self._squares.to(entries) + entries.square().sum(0)
        self.num_vectors += len(signs)

    @property
    def mean(self) -> float:
        """Of zᵀAz."""
        return self._sums.sum().item() / self.num_vectors

    @property
    def stderr(self) -> float:
        """Standard error of the mean, 0 where A is diagonal."""
        return math.sqrt(2.0 * self._variances().sum().item() / self.num_vectors)

    @property
    def degrees_of_freedom(self) -> float:
        """Of that error, by how much the vectors differ in what they add to it: their number less one at least.

        The entries of one vector move together, so that they are no independent samples of their variances.
        """
        number, fewest = len(self._spreads), max(self.num_vectors - 1.0, 1.0)
        if number and not any(self._spreads):
            return math.inf
        if number < 5:
            return fewest
        mean, variance = statistics.fmean(self._spreads), statistics.variance(self._spreads)
        # 1/variance of few is too large on average, by (k − 1)/(k − 3) where they are normal.
        without_bias = (number - 3) / (number - 1)
        return max(fewest, without_bias * 2.0 * number * mean**2 / variance) if variance > 0.0 else math.inf

    def _variances(self) -> Tensor:
        if self.num_vectors == 1:
            return self._squares
        spread = self._squares - self._sums.square() / self.num_vectors
        return spread.clamp(min=0.0) / (self.num_vectors - 1)


class LanczosRecurrences:
    """Lanczos' recurrence from several vectors side by side, so that one product serves all of them.

    Each vector has an orthonormal basis V of its own, kept whole and used for full reorthogonalisation, and
    the tridiagonal T = VᵀAV in float64.

    Args:
        product: Vectors [k, n] -> [k, n], A times each, for a symmetric A.
        starts: z [k, n], none of them zero.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], starts: Tensor) -> None:
        self._product = product
        self._norms = torch.linalg.vector_norm(starts, dim=1)
        self._basis = [(starts / self._norms.unsqueeze(1)).unsqueeze(0)]  # [1, k, n] for each step
        self._diagonal: list[Tensor] = []  # α, [k] for each step
        self._beside: list[Tensor] = []  # β after each step, 0 where the space is exhausted
        self.starts = starts
        self.product_seconds = 0.0

    @property
    def num_steps(self) -> int:
        """Products so far."""
        return len(self._diagonal)

    @property
    def exhausted(self) -> bool:
        """Whether every vector's quadrature is exact, but for rounding."""
        return bool(self._beside) and not bool(self._beside[-1].any())

    def extend(self) -> None:
        """Take one more step, of one product for all vectors."""
        latest = self._basis[-1]
        start = time.perf_counter()
        images = self._product(latest[0])
        self.product_seconds += time.perf_counter() - start
        remainder, coefficients = orthogonalised(images, self._basis)
        self._diagonal.append(coefficients[-1].cpu().double())
        beta = torch.linalg.vector_norm(remainder, dim=1)
        scale = max(alpha.abs().max().item() for alpha in self._diagonal)
        alive = beta > EXHAUSTED * torch.finfo(beta.dtype).eps * max(scale, beta.max().item())
        if self.num_steps >= latest.shape[2]:
            alive = torch.zeros_like(alive)
        beta = torch.where(alive, beta, torch.zeros_like(beta))
        self._beside.append(beta.cpu().double())
        # An exhausted vector goes on as zero: its products are zero, and its T is cut off where it ended.
        following = torch.where(
            alive.unsqueeze(1), remainder / beta.unsqueeze(1), torch.zeros_like(remainder)
        )
        self._basis.append(following.unsqueeze(0))

    def gauss(self, function: Function, least: float | None = None) -> Tensor:
        """Gauss's rule for zᵀf(A)z: [k] in float64; below `least` nodes are rounding."""
        rules = [_rules(function, matrices, least) for _, matrices in self._tridiagonals()]
        return torch.cat(rules) * self._squares

    def radau(self, function: Function, node: float) -> Tensor:
        """Gauss-Radau's rule for zᵀf(A)z with a node at a lower end of A's spectrum: [k] in float64.

        T gets one more row, whose diagonal entry α makes the node an eigenvalue (Golub & Meurant, section 6.2).
        """
        rules = []
        for some, matrices in self._tridiagonals():
            size = matrices.shape[1]
            beta = self._beside[size - 1][some]
            if bool(beta.all()):
                unit = torch.zeros(matrices.shape[:2], dtype=matrices.dtype)
                unit[:, -1] = beta**2
                shifted = matrices - node * torch.eye(size, dtype=matrices.dtype)
                alpha = node + torch.linalg.solve(shifted, unit)[:, -1]
                larger = torch.nn.functional.pad(matrices, (0, 1, 0, 1))
                larger[:, -1, -1], larger[:, -1, -2], larger[:, -2, -1] = alpha, beta, beta
                rules.append(_rules(function, larger, node))
            else:
                rules.append(_rules(function, matrices, node))
        return torch.cat(rules) * self._squares

    def images(self, function: Function, least: float | None = None) -> Tensor:
        """Return f(A)z ≈ |z| V f(T) e₁ of each vector, [k, n]; eigenvalues below `least` are rounding."""
        total = torch.zeros_like(self.starts)
        for some, matrices in self._tridiagonals():
            values, vectors = torch.linalg.eigh(matrices)
            values = values if least is None else values.clamp(min=least)
            weights = torch.einsum("kij,kj->ki", vectors, function(values) * vectors[:, 0]).to(total)
            for step, basis in enumerate(self._basis[: matrices.shape[1]]):
                total[some] += (weights[:, step] * self._norms[some]).unsqueeze(1) * basis[0, some]
        return total

    def between(self, function: Function, node: float) -> tuple[Tensor, Tensor]:
        """Return the middle of the two rules and their distance, of an f whose even derivatives have one sign.

        Args:
            function: f, such as ln.
            node: A number that no eigenvalue of A is below.

        Returns:
            [k] each, in float64. Half the distance is the error of too few steps at most.
        """
        gauss, radau = self.gauss(function, node), self.radau(function, node)
        return 0.5 * (gauss + radau), (gauss - radau).abs()

    @property
    def _squares(self) -> Tensor:
        """|z|², [k] in float64."""
        squares: Tensor = self._norms.cpu().double().square()
        return squares

    def _tridiagonals(self) -> list[tuple[slice, Tensor]]:
        """T of the vectors, those of one size together [k, steps, steps]: cut off where a space was exhausted."""
        beside, diagonal = torch.stack(self._beside, 1), torch.stack(self._diagonal, 1)
        sizes = [_size(row) for row in beside.tolist()]
        groups, start = [], 0
        for size, own in itertools.groupby(sizes):
            some = slice(start, start + len(list(own)))
            start = some.stop
            off = beside[some, : size - 1]
            matrices = torch.diag_embed(diagonal[some, :size])
            groups.append((some, matrices + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)))
        return groups


def _size(beside: list[float]) -> int:
    """Steps until the space was exhausted."""
    return beside.index(0.0) + 1 if 0.0 in beside else len(beside)


def _rules(function: Function, matrices: Tensor, least: float | None = None) -> Tensor:
    """e₁ᵀf(T)e₁ of each T [k, steps, steps], of eigenvalues that are `least` at least but for rounding."""
    values, vectors = torch.linalg.eigh(matrices)
    if least is not None:
        values = values.clamp(min=least)
    rules: Tensor = (vectors[:, 0].square() * function(values)).sum(1)
    return rules


def converge(
    recurrences: LanczosRecurrences,
    function: Function,
    node: float,
    share: float,
    max_steps: int,
    watch: Callable[[int, float], None] = lambda steps, gap: None,
    rounding: float = 0.0,
) -> tuple[Tensor, float]:
    """Extend recurrences from random signs until their two rules agree to a share of the standard error of tr f(A).

    Args:
        recurrences: New.
        function: f.
        node: A number that no eigenvalue of A is below.
        share: Of the standard error of the mean over these vectors.
        max_steps: After which they are left as they are.
        watch: Is told the steps so far and the mean distance of the two rules.
        rounding: Distance of the two rules that is none.

    Returns:
        The middle of the two rules of each vector [k], and the mean distance of the two.
    """
    stderr, due = math.inf, 1
    while True:
        recurrences.extend()
        steps = recurrences.num_steps
        # After one step f(A)z lies along z, and its entries say nothing of the error.
        early = steps < FEWEST_STEPS or steps % max(1, steps // CHECKS) != 0
        if early and not recurrences.exhausted and steps < max_steps:
            continue
        middle, gaps = recurrences.between(function, node)
        gap = gaps.mean().item()
        watch(steps, gap)
        if recurrences.exhausted or steps >= max_steps or not math.isfinite(gap):
            return middle, gap
        # The images cost as much as a reorthogonalisation: now and then, and where the gap seems small enough.
        if steps >= due or gap <= max(share * stderr, rounding):
            due = 2 * steps
            trial = SampledTrace()
            trial.add(recurrences.starts, recurrences.images(function, node))
            stderr = trial.stderr
            if gap <= max(share * stderr, rounding):
                return middle, gap
