"""Likelihoods of a network's output: log-likelihood, square root of its Hessian, null model."""

from collections.abc import Callable

from lightning_bayes.likelihoods.base import Likelihood
from lightning_bayes.likelihoods.bernoulli import Bernoulli
from lightning_bayes.likelihoods.categorical import Categorical
from lightning_bayes.likelihoods.function import NegativeLogLikelihood
from lightning_bayes.likelihoods.gaussian import Gaussian, HeteroscedasticGaussian

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "NegativeLogLikelihood",
    "resolve_likelihood",
]

LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    likelihood.name: likelihood for likelihood in (Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian)
}


def resolve_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Return the likelihood that a name or an object stands for.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in LIKELIHOODS:
        return LIKELIHOODS[likelihood]()
    raise ValueError(
        f"Expected argument `likelihood` to be one of {sorted(LIKELIHOODS)} or a Likelihood object such as "
        f"Gaussian(sigma=0.1), got {likelihood!r}."
    )
