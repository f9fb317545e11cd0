"""What stands between two halves of a layer: the sum over ranks joins the residual stream, which is normalised.

A chunk's rows that only products of 8 bits read are quantised where they are normalised: one pass over memory less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from parallel.all_reduce_norm import AllReduceNorm
from parallel.eight_bits import RowsInEightBits
from parallel.norm import rms_norm

from .kinds import STATE
from .linear import multiplies_in_8_bits
from .quantized import Matrix
from .spec import ModelSpec


class StreamNorm:
    """Adds to a model's residual stream and normalises it; collective over the world, as ``AllReduceNorm`` is.

    Args:
        spec: the model.
        reduce: what sums, adds and normalises.
    """

    def __init__(self, spec: ModelSpec, reduce: AllReduceNorm) -> None:
        self._spec, self._reduce = spec, reduce
        self._rounds = spec.quantization is not None and spec.quantization.powers_of_two

    def __call__(
        self,
        added: torch.Tensor,
        stream: torch.Tensor,
        weight: torch.Tensor,
        index: int,
        norm: torch.Tensor | None,
        readers: Sequence[Matrix] = (),
    ) -> torch.Tensor | RowsInEightBits:
        """Sum what all ranks add, normalised by ``norm`` where there is one, onto the stream; return that's norm.

        ``readers``: the matrices that a chunk's rows are multiplied with, where nothing else reads them; in 8 bits they
        are returned where all of these products are.
        """
        eps = self._spec.rms_eps
        if norm is not None:
            stream += self._reduce(added, torch.zeros_like(stream), norm, eps, index=index)
            return rms_norm(stream, weight, eps)
        if readers and self._reduce.can_quantize(stream) and all(multiplies_in_8_bits(w, stream) for w in readers):
            return self._reduce.in_8_bits(added, stream, weight, eps, powers_of_two=self._rounds)
        return self._reduce(added, stream, weight, eps, index=index)

    def mixing_readers(self, layer: int, layers: Sequence[dict[str, Any]]) -> tuple[Matrix, ...]:
        """Return the only matrix that reads the rows that enter a layer; none where there are others, or no layer."""
        if layer == len(layers) or self._spec.kind_of(layer).name == STATE or "output_gate" in layers[layer]:
            return ()
        return (layers[layer]["qkv"],)

    def feeding_readers(self, weights: dict[str, Any]) -> tuple[Matrix, ...]:
        """Return the matrices of a layer's feed-forward, where nothing else reads its rows; none of experts."""
        return () if "gate_up" not in weights or self._spec.gelu else (weights["gate_up"], weights["down"])
