"""What state layers keep of a sequence: a matrix a head, and the inputs of a few tokens (arXiv 2412.06464).

It does not grow with the context. Heads are split over all ranks, so every rank keeps its own heads of every running
sequence, in the slot of its batch slot; a sequence that begins at position 0 finds whatever is there overwritten.

Nothing is ever undone. A matrix holds the tokens before ``position``; inputs of tokens from there on stand in a ring,
each at its position modulo the ring's length, and are worked in when a later step has shown that they stay. So a draft
that is rejected was never in the matrix, and what comes at its position overwrites its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from parallel.layout import Range

from ..models.kinds import STATE
from ..models.spec import ModelSpec
from .cuts import CUTS, Cuts
from .heads import StateHeads, ring_of
from .records import StateRecords


@dataclass(frozen=True)
class LayerStates:
    """What one layer keeps of all sequences.

    Attributes:
        matrix: [slots, V, D, W] float32, of the tokens before ``position``.
        position: [slots, V] int32, the first token that is not in the matrix; alike for all heads between steps.
        inputs: [slots, ring, input_size], of the token at position p at p % ring.
    """

    heads: StateHeads
    matrix: torch.Tensor
    position: torch.Tensor
    inputs: torch.Tensor


class StateCache:
    """What the state layers of a rank keep: room for ``num_slots`` sequences, and one slot more for rows of nobody.

    Args:
        heads: this rank's.
        num_layers: state layers.
        num_slots: sequences.
        max_run: rows of a run that may be undone, the first excepted: with drafts 1 + their number.

    Attributes:
        layers: of each state layer, in their order.
        tensors: of all layers, each [layers, slots, ...].
        num_bytes: of all of them.
        records: room for what a transfer brings of sequences; None without transfers.
        kept: what checkpoints keep, as ``tensors`` but [checkpoints, layers, ...]; None where there are none.
    """

    records: StateRecords | None = None
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self, heads: StateHeads, *, num_layers: int, num_slots: int, max_run: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        slots, num_value = num_slots + 1, heads.num_value
        ring = ring_of(heads.taps, max_run)
        self.heads, self.max_run = heads, max_run
        matrices = torch.zeros(
            (num_layers, slots, num_value, heads.key_dim, heads.value_dim), dtype=torch.float32, device=device
        )
        inputs = torch.zeros((num_layers, slots, ring, heads.input_size), dtype=dtype, device=device)
        positions = torch.zeros((num_layers, slots, num_value), dtype=torch.int32, device=device)
        self.layers = [LayerStates(heads, *layer) for layer in zip(matrices, positions, inputs, strict=True)]
        self.tensors = (matrices, positions, inputs)
        self.num_bytes = sum(each.nbytes for each in self.tensors)

    @property
    def slot_bytes(self) -> int:
        """What is kept of one sequence, in bytes."""
        return sum(each[:, 0].nbytes for each in self.tensors)

    @property
    def matrix_bytes(self) -> int:
        """The matrices of one sequence, in bytes."""
        return sum(layer.matrix[0].nbytes for layer in self.layers)

    def cuts_of(self, sent: Mapping[str, torch.Tensor]) -> Cuts:
        """Return a step's cuts, of the arrays of ``arrays_of_cuts`` on the device."""
        first, rows, slots = (sent[name] for name in CUTS)
        return Cuts(first, rows, slots, self.kept)

    def pretend(self, position: int) -> None:
        """Let every sequence have seen ``position`` random tokens, for benchmarks."""
        for layer in self.layers:
            layer.matrix.normal_(0.0, 0.1)
            layer.inputs.normal_()
            layer.position.fill_(position)

    @classmethod
    def for_model(
        cls, spec: ModelSpec, value_heads: Range, *, num_slots: int, max_run: int, dtype: torch.dtype,
        device: torch.device, transfers: bool = False,
    ) -> StateCache | None:  # fmt: skip
        """Return the cache of a rank that has these value heads; None where the model has no state layers.

        ``transfers``: with records.
        """
        if spec.states is None:
            return None
        heads, num_layers = StateHeads.of(spec.states, value_heads), len(spec.layers_of(STATE))
        cache = cls(heads, num_layers=num_layers, num_slots=num_slots, max_run=max_run, dtype=dtype, device=device)
        cache.records = StateRecords(heads, cache.tensors) if transfers else None
        return cache
