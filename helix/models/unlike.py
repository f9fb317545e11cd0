"""One layer of each sort: what all layers of a step launch, in a step of few layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from .decoder import Decoder
from .quantized import Matrix, Quantized


@contextmanager
def one_of_each_layer(decoder: Decoder) -> Iterator[None]:
    """Inside, ``forward`` runs the first layer of each sort and the last one, whose rows may be fewer, and no others.

    It launches the kernels of all; what it returns is of no use. The same on every rank.
    """
    layers = range(decoder.spec.num_layers)
    first: dict[Hashable, int] = {}
    for layer in layers:
        first.setdefault(_sort_of(decoder, layer), layer)
    decoder.computed = {*first.values(), layers[-1]}
    try:
        yield
    finally:
        decoder.computed = layers


def _sort_of(decoder: Decoder, layer: int) -> Hashable:
    """Return what layers have in common that launch the same kernels: their kind, and weights alike."""
    weights = decoder.layers[layer]
    like = tuple((role, tuple(weight.shape), _storage_of(weight)) for role, weight in weights.items())
    return decoder.spec.kind_of(layer), decoder.spec.experts_of(layer) is None, like


def _storage_of(weight: Matrix) -> Hashable:
    """Return how a matrix is stored, as far as kernels are compiled for that."""
    return (weight.shift, weight.lead) if isinstance(weight, Quantized) else weight.dtype
