"""Numerics without a network: Cholesky factors, Lanczos, second moments, estimates from samples."""
