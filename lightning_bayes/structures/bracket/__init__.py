"""Certified bounds from the rows that matter most."""
