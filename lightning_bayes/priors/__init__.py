"""Gaussian priors of the parameters: their precisions, given or found."""
