"""What both GPU backends ask of torch: is a GPU new enough; and make it the current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

_OLDEST_CAPABILITY = (8, 0)  # NVIDIA: bfloat16 in the matrix units, asynchronous copies


@cache
def too_old(index: int | None) -> str | None:
    """Why that NVIDIA GPU (None: the current one) can't run our kernels, if so."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST_CAPABILITY:
        return None
    return (
        "its kernels need an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; "
        f"{torch.cuda.get_device_name(index)} has {capability[0]}.{capability[1]}"
    )


def current(device: torch.device) -> AbstractContextManager[None]:
    """Launches go to the current GPU, so the tensors' has to be that. (torch restores the one of
    before without starting to use it, which the runtime's own call would.)"""
    if device.type == "cpu":
        return nullcontext()
    gpus = torch.cuda if device.type == "cuda" else torch.xpu
    return nullcontext() if device.index == gpus.current_device() else gpus.device(device)
