"""The command line: `python -m lightning_bayes advise --help`."""

import sys

from lightning_bayes.advice.cli import main

if __name__ == "__main__":
    sys.exit(main())
