"""The figures of Smith & Le (ICLR 2018) on real MNIST, with numbers: `python -m examples.smith_le_2018 --help`."""
