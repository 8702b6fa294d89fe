"""What the package is for, run: `python examples/quickstart.py`, `python -m examples.smith_le_2018 --help`."""
