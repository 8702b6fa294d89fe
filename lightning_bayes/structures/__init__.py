"""Curvature structures: views of the rows that answer for log-determinant and effective parameters."""
