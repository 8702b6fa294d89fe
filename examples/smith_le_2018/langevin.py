"""(e) Langevin noise of temperature 1 samples the posterior that Laplace approximates (Welling & Teh 2011).

Full-batch Langevin dynamics on the logistic regression of figures 1 and 2, many chains at once:

    ω ← ω - η ∇C(ω) + √(2η) ξ,    ξ ~ N(0, I)

Its stationary distribution is exp(-C)/Z as η → 0. Welling & Teh's gradients are those of batches, whose noise is
negligible against √(2η) for small η; here there is none, so that whatever differs from Laplace is Laplace's or η's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from scipy import special

from examples.smith_le_2018.claims import Claim
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.data import Digits
from examples.smith_le_2018.intervals import mean_interval, within
from examples.smith_le_2018.logistic import cost_and_derivatives, design_of, fit, two_digits
from examples.smith_le_2018.plotting import band, colours, figure, log_axis
from examples.smith_le_2018.results import Row
from examples.smith_le_2018.trials import Kind, Trials

__all__ = ["LANGEVIN", "LangevinSettings", "Sampled", "langevin", "sample"]

STEP = 0.05
"""η in units of 1/(largest curvature at the minimum). A Gaussian's variance comes out 1/(1 - ηk/2) times too large:
by 2.5 % along the stiffest direction, by less along all others."""
BURN_IN = 0.5
"""Of the sampled time, before it."""
LOOKS_PER_TIME = 20
"""Samples taken in one relaxation time of the slowest direction."""
STIFF = 10
"""Eigenvectors of largest curvature that count as determined by the data."""
ALLOWED = 0.1
"""Relative difference at which the two still count as the same."""
LAPLACE_DRAWS = 4000
NOISE_SEEDS = 4_000_000
"""Added to a seed for the noise."""


@dataclass(frozen=True)
class LangevinSettings:
    """One set of chains. `times` is in relaxation times 1/λ; `seed` draws images and noise."""

    num_examples: int
    prior_precision: float
    chains: int
    times: float
    seed: int


@dataclass(frozen=True)
class LangevinMeasured:
    """Sampled against Laplace.

    `curvatures` are eigenvalues of the Hessian of C at the minimum, the 1st, 2nd, 4th, ... largest, and
    `variance_ratios` sampled/Laplace along their eigenvectors. `stiff_variance_ratio` is the mean over the ten
    stiffest, `all_variance_ratio` over all; `stiff_shift` is the root mean square distance of the sampled mean
    from the minimum along the ten, in Laplace's standard deviations. Losses are -ln P(y | ω, x) summed over the
    training set, in nats: at the minimum, its mean over the chains, and over draws from Laplace's Gaussian.
    """

    steps: int
    stiff_variance_ratio: float
    all_variance_ratio: float
    stiff_shift: float
    loss_at_minimum: float
    sampled_loss: float
    laplace_loss: float
    curvatures: str
    variance_ratios: str


@dataclass(frozen=True)
class Sampled:
    """Moments of the chains in the eigenvectors of the Hessian, stiffest first, about the minimum.

    Attributes:
        curvatures: [p], eigenvalues k.
        means: [p].
        variances: [p].
        loss: mean of -ln P(y | ω, x), nats.
        laplace_loss: the same over draws from N(ω₀, A⁻¹).
        steps: η-steps sampled, without those before.
    """

    curvatures: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    loss: float
    laplace_loss: float
    steps: int


def sample(
    design: np.ndarray, labels: np.ndarray, minimum: np.ndarray, precision: float, settings: LangevinSettings
) -> Sampled:
    """Run the chains from the minimum.

    Args:
        design: [N, p], a last column of ones.
        labels: [N], 0 or 1.
        minimum: [p], ω₀.
        precision: λ.
        settings: chains, time and seed.

    Returns:
        Their moments after the burn-in.
    """
    _, hessian = cost_and_derivatives(minimum, design, labels, precision)
    curvatures, directions = np.linalg.eigh(hessian)
    curvatures, directions = curvatures[::-1].copy(), directions[:, ::-1].copy()
    # Isotropic noise is isotropic in any basis: the chains run in that of the eigenvectors.
    rotated, centre = design @ directions, directions.T @ minimum
    step = STEP / curvatures[0]
    look = max(1, round(1 / (precision * step * LOOKS_PER_TIME)))
    burn_in = round(BURN_IN * settings.times / (precision * step))
    steps = round(settings.times / (precision * step))
    signs = 2 * labels - 1

    def loss(weights: np.ndarray) -> float:
        return float(-special.log_expit(signs * (weights @ rotated.T)).sum(1).mean())

    generator = np.random.default_rng(NOISE_SEEDS + settings.seed)
    states = np.tile(centre, (settings.chains, 1))
    first, second, losses = np.zeros_like(centre), np.zeros_like(centre), []
    for done in range(1, burn_in + steps + 1):
        logits = states @ rotated.T
        gradient = (special.expit(logits) - labels) @ rotated + precision * states
        states += np.sqrt(2 * step) * generator.standard_normal(states.shape) - step * gradient
        if done > burn_in and done % look == 0:
            away = states - centre
            first += away.mean(0)
            second += np.square(away).mean(0)
            losses.append(loss(states))
    means = first / len(losses)
    gaussian = centre + generator.standard_normal((LAPLACE_DRAWS, len(centre))) / np.sqrt(curvatures)
    return Sampled(
        curvatures, means, second / len(losses) - means**2, float(np.mean(losses)), loss(gaussian), steps
    )


def measure(digits: Digits, settings: LangevinSettings) -> LangevinMeasured:
    """Draw the images, find the minimum, run the chains."""
    data = two_digits(digits, settings.num_examples, "true", settings.seed)
    design, labels = design_of(data.train_inputs), data.train_labels.numpy()
    precision = settings.prior_precision
    minimum = fit(data.train_inputs, data.train_labels, precision).numpy()
    found = sample(design, labels, minimum, precision, settings)
    ratios = found.variances * found.curvatures
    places = 2 ** np.arange(int(np.log2(len(ratios))) + 1) - 1
    return LangevinMeasured(
        steps=found.steps,
        stiff_variance_ratio=float(ratios[:STIFF].mean()),
        all_variance_ratio=float(ratios.mean()),
        stiff_shift=float(np.sqrt((found.means**2 * found.curvatures)[:STIFF].mean())),
        loss_at_minimum=float(-special.log_expit((2 * labels - 1) * (design @ minimum)).sum()),
        sampled_loss=found.loss,
        laplace_loss=found.laplace_loss,
        curvatures=_joined(found.curvatures[places]),
        variance_ratios=_joined(ratios[places]),
    )


def _joined(values: np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in values)


LANGEVIN = Kind("langevin", LangevinSettings, LangevinMeasured, measure)
"""Its rows are in `langevin.csv`."""


def langevin(context: Context) -> list[Claim]:
    """Sampled variances along eigenvectors, and the mean log-likelihood, against Laplace's."""
    preset = context.preset.evidence
    trials, precisions = Trials(LANGEVIN, context), preset.langevin_precisions

    def settings(precision: float, seed: int) -> LangevinSettings:
        return LangevinSettings(
            preset.logistic_examples, precision, preset.langevin_chains, preset.langevin_times, seed
        )

    def wanted(seed: int) -> list[LangevinSettings]:
        return [settings(precision, seed) for precision in precisions]

    seeds = trials.measure("langevin", wanted, preset.langevin_seeds)

    def of(column: str) -> np.ndarray:
        return trials.grid(column, settings, seeds, precisions)

    loss = of("sampled_loss") / of("laplace_loss")
    with figure(context.folder / "langevin.png", width=8.8) as (_, (left, right)):
        rows = {one: [trials.find(settings(one, seed)) for seed in seeds] for one in precisions}
        _variances(left, {one: [row for row in found if row] for one, found in rows.items()})
        _ratios(right, np.array(precisions), of("stiff_variance_ratio"), loss)
    return [
        claim for place, precision in enumerate(precisions) for claim in _claims(of, loss, place, precision)
    ]


def _variances(axis: Axes, rows: dict[float, list[Row]]) -> None:
    """Along eigenvectors, for each λ; rows are its seeds."""
    for (precision, found), colour, marker in zip(
        rows.items(), colours(len(rows)), "osD^vP*"[: len(rows)], strict=True
    ):
        curvatures, ratios = (
            np.array([str(row[column]).split() for row in found], dtype=float)
            for column in ("curvatures", "variance_ratios")
        )
        band(axis, curvatures.mean(0), ratios, marker=marker, color=colour, label=f"λ = {precision:g}")
    axis.set(xlabel="curvature along the eigenvector", ylabel="sampled variance / Laplace's")
    _finish(axis)


def _ratios(axis: Axes, precisions: np.ndarray, variance: np.ndarray, loss: np.ndarray) -> None:
    """Of the stiff directions and of the loss, against λ."""
    band(axis, precisions, variance, color="#1f4fd8", label="variance, ten stiffest")
    band(axis, precisions, loss, color="#e07b00", marker="s", label="mean −ln P of the training set")
    axis.set(xlabel="L2: prior precision λ", ylabel="sampled / Laplace's")
    _finish(axis, list(precisions))


def _finish(axis: Axes, ticks: list[float] | None = None) -> None:
    log_axis(axis, "x", ticks)
    axis.axhline(1, color="#888888", linewidth=1)
    axis.legend(fontsize=9)


def _claims(of: Callable[[str], np.ndarray], loss: np.ndarray, place: int, precision: float) -> list[Claim]:
    shift = np.sqrt(np.square(of("stiff_shift")[:, place]).mean())
    rows = [
        (
            f"sampled variance / Laplace's, mean of the {STIFF} stiffest eigenvectors, λ = {precision:g}; the mean is"
            f" {shift:.2g} standard deviations from the minimum",
            of("stiff_variance_ratio")[:, place],
        ),
        (
            f"sampled variance / Laplace's, mean of all eigenvectors, λ = {precision:g}",
            of("all_variance_ratio")[:, place],
        ),
        (f"mean −ln P of the training set, sampled / Laplace's, λ = {precision:g}", loss[:, place]),
    ]
    claims = []
    for quantity, values in rows:
        estimate = mean_interval(values)
        claims.append(
            Claim(
                "langevin",
                "(e) Langevin noise of temperature 1 samples Laplace's posterior (Welling & Teh)",
                quantity,
                *estimate,
                f"1 ± {ALLOWED:g}",
                within(ALLOWED, *estimate[1:], centre=1.0),
            )
        )
    return claims
