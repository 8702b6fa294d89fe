"""Imported once by the server that processes of a pool are forked from, so that they start with the digits."""

import torch

from examples.smith_le_2018 import cli  # noqa: F401 - for what it imports
from examples.smith_le_2018.data import load_digits

torch.set_num_threads(1)  # threads would not survive the fork
load_digits()
