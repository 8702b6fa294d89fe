"""What a device has: float64 to add in, and memory."""

import os

import torch


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: sums over a whole training set lose digits in float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def total_memory(device: torch.device) -> float:
    """Bytes that a device has, or the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float("inf")
