"""Rows by torch.func leave Python's and torch's own settings as they were."""

import warnings

import pytest
import torch
from torch import nn

from lightning_bayes.evidence.laplace import laplace_evidence


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Envelope(nn.Module):
    """Its backward pass is one that vmap does in a loop, on which torch remarks."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head((x * self.scale).cummax(1)[0][:, -1])


def warn():
    warnings.warn("the user's own", UserWarning, stacklevel=1)


@pytest.mark.parametrize("make", [Encoder, LSTM, Envelope])
def test_a_warning_given_once_is_not_given_again(make, recwarn):
    """`warnings.catch_warnings` would make Python forget which have been given already."""
    warnings.simplefilter("default")
    model, data = make(), (torch.randn(6, 3, 4), torch.arange(6) % 3)
    warn()
    for _ in range(3):
        laplace_evidence(model, data)
        warn()
    assert [str(warning.message) for warning in recwarn] == ["the user's own"]


def test_onednn_is_as_it_was_after():
    model, data = LSTM(), (torch.randn(6, 3, 4), torch.arange(6) % 3)
    for enabled in (True, False):
        torch.backends.mkldnn.enabled, before = enabled, torch.backends.mkldnn.enabled
        try:
            laplace_evidence(model, data)
            assert torch.backends.mkldnn.enabled is enabled
        finally:
            torch.backends.mkldnn.enabled = before
