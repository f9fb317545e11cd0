"""What a transfer brings of a prompt's states: a record of each sequence, cut by value heads as the ranks are.

When all of a prompt is in the matrices, what later rows need is these and the inputs of the last ``taps`` - 1 tokens. A
record holds, for each value head of the rank, those of all state layers one after the other: the matrix, then of each
token the inputs of the head's value, and of its key head's query and key. So a head's share is one piece of memory,
which is the same on every rank of every layout that has the head. As many as batch slots.
"""

from __future__ import annotations

import torch

from .heads import StateHeads


class StateRecords:
    """Room for a record of every sequence whose states a rank keeps.

    Args:
        heads: this rank's.
        tensors: matrices, positions and inputs of all its state layers, as ``StateCache.tensors``.

    Attributes:
        memory: [1, sequences, bytes], where peers write and read.
        head_bytes: of a value head's share of a record.
    """

    def __init__(self, heads: StateHeads, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self._heads, self._tensors = heads, tensors
        matrices, _, inputs = tensors
        self._tokens = heads.taps - 1
        self._columns = _columns_of(heads).to(inputs.device)
        layers, slots = matrices.shape[0], matrices.shape[1] - 1
        self._matrix_bytes = layers * heads.matrices_bytes // heads.num_value
        inputs_bytes = layers * self._tokens * self._columns.shape[1] * inputs.element_size()
        self.head_bytes = self._matrix_bytes + -(-inputs_bytes // 16) * 16
        self._inputs_bytes = inputs_bytes
        size = heads.num_value * self.head_bytes
        self.memory = torch.zeros((1, slots, size), dtype=torch.uint8, device=inputs.device)

    def _parts(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a record's matrices [V, layers, D, W] and inputs [V, layers, tokens, columns of a head]."""
        matrices, _, inputs = self._tensors
        heads, layers = self._heads, matrices.shape[0]
        record = self.memory[0, number].view(heads.num_value, self.head_bytes)
        stop = self._matrix_bytes + self._inputs_bytes
        kept = record[:, : self._matrix_bytes].view(torch.float32)
        given = record[:, self._matrix_bytes : stop].view(inputs.dtype)
        return kept.unflatten(1, (layers, heads.key_dim, heads.value_dim)), given.unflatten(
            1, (layers, self._tokens, self._columns.shape[1])
        )

    def write(self, slot: int, length: int) -> None:
        """Write the record of a batch slot: of its sequence, of which ``length`` tokens are in the matrices."""
        matrices, _, inputs = self._tensors
        kept, given = self._parts(slot)
        kept.copy_(matrices[:, slot].transpose(0, 1))
        its = inputs[:, slot][:, self._places(length)][:, :, self._columns]  # [layers, tokens, V, columns]
        given.copy_(its.permute(2, 0, 1, 3))

    def read(self, record: int, slot: int, length: int) -> None:
        """Let the sequence in a batch slot go on behind ``length`` tokens, of which a record has arrived."""
        matrices, positions, inputs = self._tensors
        kept, given = self._parts(record)
        matrices[:, slot] = kept.transpose(0, 1)
        positions[:, slot] = length
        places = self._places(length).view(1, -1, 1, 1)
        layers = torch.arange(matrices.shape[0], device=inputs.device).view(-1, 1, 1, 1)
        inputs[layers, slot, places, self._columns] = given.permute(1, 2, 0, 3)

    def _places(self, length: int) -> torch.Tensor:
        """Return where the last tokens before a position are in the ring; before the first they may be anything."""
        inputs = self._tensors[2]
        return torch.arange(length - self._tokens, length, device=inputs.device) % inputs.shape[2]


def _columns_of(heads: StateHeads) -> torch.Tensor:
    """Return the columns of kept inputs that each value head reads: [V, W + 2 D]."""
    head = torch.arange(heads.num_value).unsqueeze(1)
    key = (head + heads.offset) // heads.group * heads.key_dim + torch.arange(heads.key_dim)
    value = head * heads.value_dim + torch.arange(heads.value_dim)
    keys = heads.num_key * heads.key_dim
    return torch.cat((2 * keys + value, key, keys + key), 1)
