"""What computes partial attention: the oracle in plain PyTorch, or kernels."""

from __future__ import annotations

import logging

import torch

from .partial import PartialAttention
from .reference import ReferenceAttention

BACKENDS = ("auto", "reference", "triton")
_log = logging.getLogger(__name__)


def select_backend(name: str, device: torch.device, *, pdl: bool = False) -> PartialAttention:
    """Return the back end of that name; ``auto`` is triton on CUDA and reference elsewhere, and is logged.

    ``pdl`` lets kernels launch programmatically dependent, where the back end has kernels.

    Raises:
        ValueError: when the name is none of BACKENDS, or triton is asked for where it cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention.backend = {name!r} must be one of {', '.join(BACKENDS)}")
    if name == "auto":
        name = "triton" if device.type == "cuda" else "reference"
        _log.info("attention.backend=auto: %s, for device %s", name, device.type)
    if name == "reference":
        return ReferenceAttention()
    from .kernels import TritonAttention, can_run  # not above: the oracle needs no Triton

    if not can_run(device):
        raise ValueError(
            f"attention.backend = triton needs a CUDA device (or TRITON_INTERPRET=1), not {device.type}; "
            "use attention.backend=reference"
        )
    return TritonAttention(device, pdl=pdl)
