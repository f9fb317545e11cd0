"""Kinds of layers: how much of the tokens before it a layer keeps.

    kind     keeps                            heads are split over       memory                        ranks exchange
    full     K and V, or a latent, of all     TPA, the tokens over KVP   the pages of the placement    partial results
    window   K and V of the last ``window``   all N ranks                a second pool, alike on all   nothing
    state    a state of a fixed size          all N ranks                a second pool, alike on all   nothing

Windows and states are bounded: a rank that has all of what a layer keeps, for its share of the heads, has little, and
needs nobody else. So their heads are split as plain tensor parallelism does it, whatever kvp is, and KV heads are
duplicated beyond their number. Output projection and all-reduce are the same for all kinds.
"""

from dataclasses import dataclass

FULL, WINDOW, STATE = "full", "window", "state"


@dataclass(frozen=True)
class Kind:
    """The kind of a layer.

    name: FULL, WINDOW or STATE. window: tokens that a row of a window layer sees, its own included; 0 elsewhere.
    """

    name: str = FULL
    window: int = 0

    def __post_init__(self) -> None:
        if self.name not in (FULL, WINDOW, STATE):
            raise ValueError(f"kind of layer = {self.name!r}, must be one of {FULL}, {WINDOW}, {STATE}")
        if not isinstance(self.window, int) or (self.window < 1) == (self.name == WINDOW) or self.window < 0:
            raise ValueError(
                f"window = {self.window!r} of a {self.name} layer; a window has at least 1 token, others 0"
            )

    @property
    def is_bounded(self) -> bool:
        """Whether what the layer keeps does not grow with the context."""
        return self.name != FULL


FULL_KIND = Kind()
