"""How positions rotate queries and keys (RoPE), and the angles of a step's positions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """How positions rotate queries and keys.

    inv_freq: [rotary_dim / 2] float32 on the CPU, radians per position; pair i turns by position * inv_freq[i].
    attention_scaling: factor on both cos and sin (1.0 except for yarn).
    interleaved: pair i is elements (2i, 2i+1) if true, else (i, i + rotary_dim/2).
    rotary_dim: how many leading elements of each head are rotated; the rest pass unchanged.
    """

    inv_freq: "torch.Tensor"
    attention_scaling: float
    interleaved: bool
    rotary_dim: int

    def __post_init__(self) -> None:
        if self.inv_freq.shape != (self.rotary_dim // 2,) or self.rotary_dim % 2:
            raise ValueError(
                f"rope.rotary_dim = {self.rotary_dim} must be even and twice the number of frequencies, "
                f"which has shape {tuple(self.inv_freq.shape)}"
            )

    def turn(self, positions: "torch.Tensor", inv_freq: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return cos and sin of positions' angles, scaled: [R, rotary_dim / 2] float32.

        positions: [R] int64. inv_freq: this one's, on their device.
        """
        angle = positions.unsqueeze(1).float() * inv_freq
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
