"""The current CUDA stream of a device."""

from __future__ import annotations

import torch


def stream_of(device: torch.device) -> int:
    """The handle of the current stream; 0 for CPU tensors, on which kernels are interpreted or emulated."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks the current device
        return torch.cuda.is_current_stream_capturing()
