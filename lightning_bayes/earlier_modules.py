"""Modules by the names that they had in earlier versions: a pickle or a checkpoint's hyper-parameters hold these."""

import sys

from lightning_bayes import errors, likelihoods
from lightning_bayes.evidence import curve
from lightning_bayes.functional import configuration
from lightning_bayes.likelihoods import base, bernoulli, categorical, gaussian
from lightning_bayes.loss_curvature import eigenvalue, stability_reading

EARLIER_NAMES = {
    "curvature.errors": errors,
    "curvature.likelihoods": likelihoods,
    "curvature.likelihoods.base": base,
    "curvature.likelihoods.bernoulli": bernoulli,
    "curvature.likelihoods.categorical": categorical,
    "curvature.likelihoods.gaussian": gaussian,
    "curve": curve,
    "eigenvalue": eigenvalue,
    "functional.adam_scaling": configuration,
    "stability": stability_reading,
}

for name, module in EARLIER_NAMES.items():
    sys.modules.setdefault(f"lightning_bayes.{name}", module)
