"""What a device has to add in."""

import torch


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: sums over a whole training set lose digits in float32."""
    return torch.float32 if device.type == "mps" else torch.float64
