"""The heads of state layers that a rank has, and what they keep of a sequence, as pure integers."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.layout import Range

from ..models.states import States

CHUNK = 64
"""Tokens of a prompt that its kernels work in at once."""


@dataclass(frozen=True)
class StateHeads:
    """The heads of a rank: V value heads of W elements each, which read K key heads of D elements.

    offset: of the first key head's value heads, how many belong to ranks before. group: value heads of a key head.
    taps: tokens that the convolution sees, the row's own included.
    """

    num_value: int
    num_key: int
    offset: int
    group: int
    key_dim: int
    value_dim: int
    taps: int

    @classmethod
    def of(cls, states: States, value_heads: Range) -> StateHeads:
        """Return the heads that read and write these value heads' matrices."""
        first, stop = states.key_heads(value_heads)
        group = states.group
        return cls(
            num_value=value_heads[1] - value_heads[0],
            num_key=stop - first,
            offset=value_heads[0] - first * group,
            group=group,
            key_dim=states.key_dim,
            value_dim=states.value_dim,
            taps=states.taps,
        )

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: queries, keys, values."""
        return 2 * self.num_key * self.key_dim + self.num_value * self.value_dim

    @property
    def input_size(self) -> int:
        """Elements of a token's input that are kept: the channels, then beta's and the decay's score of each head."""
        return self.conv_size + 2 * self.num_value

    @property
    def scores_at(self) -> int:
        """The column of the input projection where scores begin, behind channels and the output's gate."""
        return self.conv_size + self.num_value * self.value_dim

    @property
    def width(self) -> int:
        """Columns of the input projection: channels, the output's gate, scores."""
        return self.scores_at + 2 * self.num_value

    @property
    def matrices_bytes(self) -> int:
        """The matrices of one sequence in one layer, in bytes."""
        return 4 * self.num_value * self.key_dim * self.value_dim

    def slot_bytes(self, max_run: int, element_bytes: int) -> int:
        """Return what one layer keeps of one sequence, whose runs may be so long, in bytes."""
        inputs = ring_of(self.taps, max_run) * self.input_size * element_bytes
        return self.matrices_bytes + inputs + 4 * self.num_value


def ring_of(taps: int, max_run: int) -> int:
    """Return the length of the ring of inputs: a power of two that holds what a step reads and writes.

    It reads the ``taps`` - 1 tokens before the first that is not in the matrix, of which at most ``max_run`` - 1 are
    worked in, and writes ``max_run``.
    """
    least = taps - 1 + max_run - 1 + max_run
    return 1 << (least - 1).bit_length()
