"""The command of this example: see cli.py."""

from examples.smith_le_2018.cli import main

if __name__ == "__main__":
    main()
