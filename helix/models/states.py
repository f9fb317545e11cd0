"""State layers as a config describes them, and which slices of their tensors a rank keeps.

A state layer (gated delta rule, arXiv 2412.06464) has value heads, of which neighbours read one key head. The value
heads are split over all ranks, evenly or not, wherever the sequence is; ranks that share a key head have copies of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.layout import Range


@dataclass(frozen=True)
class States:
    """The state layers of a model.

    num_key_heads, num_value_heads: of all ranks. key_dim, value_dim: elements of a head's query and key, and value.
    taps: tokens that the short convolution sees, the row's own included. eps: of the norm of a head's output.
    by_key_head: the checkpoint's input projections are two, whose rows stand key head by key head (Qwen3-Next); else
        four, of queries, keys and values, of the output's gate, and of the two scores (Qwen3.5).
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    eps: float
    by_key_head: bool

    def __post_init__(self) -> None:
        for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"states.{name} = {value!r}, must be an integer of at least 1")
        if not isinstance(self.taps, int) or self.taps < 2:
            raise ValueError(f"states.taps = {self.taps!r}, must be an integer of at least 2")
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"states.num_value_heads = {self.num_value_heads} is not a multiple of states.num_key_heads = "
                f"{self.num_key_heads}"
            )

    @property
    def group(self) -> int:
        """Value heads of a key head."""
        return self.num_value_heads // self.num_key_heads

    def key_heads(self, value_heads: Range) -> Range:
        """Return the key heads that some value heads read."""
        return value_heads[0] // self.group, -(-value_heads[1] // self.group)
