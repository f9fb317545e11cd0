"""A rank's weights on its device: room for each, in the dtype that it is computed with."""

from __future__ import annotations

from typing import Any

import torch

from .parts import Weight
from .quantized import Matrix, Quantized
from .spec import ModelSpec

Parameters = dict[str, Any]  # by role: tensors, and matrices that may be quantised


def allocate(weights: dict[str, Weight], spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Return room for weights, which may hold anything; ``dtype`` is that of what is neither quantised nor exact."""
    how = spec.quantization
    powers_of_two = how is not None and how.powers_of_two

    def room(weight: Weight) -> Matrix:
        if weight.quantized:
            return Quantized.empty(weight.shape[0], weight.columns, device, powers_of_two=powers_of_two)
        return torch.empty(weight.shape, dtype=torch.float32 if weight.exact else dtype, device=device)

    return {role: room(weight) for role, weight in weights.items()}


def num_bytes(parameters: Parameters) -> int:
    """Return what weights take."""
    return sum(int(weight.nbytes) for weight in parameters.values())
