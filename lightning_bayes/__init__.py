"""Bayesian evidence, SGD noise scale and scaling advice for PyTorch Lightning."""

__version__ = "0.1.0"
