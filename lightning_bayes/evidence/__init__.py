"""The Laplace log-evidence of a network on its training data, without a Trainer."""
