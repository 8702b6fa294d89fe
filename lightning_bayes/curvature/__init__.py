"""Curvature of a network's likelihood: (network, likelihood, batches) -> log-determinant and the rest."""
