"""The Laplace log-evidence of a network on its training data, without a Trainer."""

from lightning_bayes.evidence.result import Evidence

__all__ = ["Evidence"]  # where it was in earlier versions, whose pickles look for it here
