"""One rank's share of a model, and the slices of checkpoint tensors that its parameters are made of.

Ranges may differ in length between ranks, and may be empty.
"""

from dataclasses import dataclass, fields, replace

from parallel.layout import Range

from .kinds import WINDOW, Kind


@dataclass(frozen=True)
class Part:
    """One rank's share of a model, as half-open ranges (start, stop).

    q_heads, kv_heads: the heads whose queries, keys and values this rank computes; equal on ranks of one KVP group.
    out_heads: the query heads whose merged attention output this rank projects; these tile all heads over all ranks.
    ffn: the feed-forward units of this rank. vocab: the rows of the output head of this rank.
    experts: the experts of this rank, and expert_ffn: the units of each of them. shared_ffn: its units of shared ones.
    window_q_heads, window_kv_heads: its query and KV heads in layers with a window, whose output it projects as well;
        empty where the model has none.
    value_heads: its value heads in state layers, whose output it projects as well; empty where the model has none.
    """

    q_heads: Range
    kv_heads: Range
    out_heads: Range
    ffn: Range
    vocab: Range
    experts: Range = (0, 0)
    expert_ffn: Range = (0, 0)
    shared_ffn: Range = (0, 0)
    window_q_heads: Range = (0, 0)
    window_kv_heads: Range = (0, 0)
    value_heads: Range = (0, 0)

    def __post_init__(self) -> None:
        for each in fields(self):
            start, stop = getattr(self, each.name)
            if not 0 <= start <= stop:
                given = f"part.{each.name} = ({start}, {stop})"
                raise ValueError(f"{given}, must be a half-open range with 0 <= start <= stop")

    def for_kind(self, kind: Kind) -> "Part":
        """Return the part with the heads that the rank has in layers of a kind."""
        if kind.name != WINDOW:
            return self
        heads = self.window_q_heads
        return replace(self, q_heads=heads, kv_heads=self.window_kv_heads, out_heads=heads)


@dataclass(frozen=True)
class Piece:
    """A slice of the checkpoint tensor `name`: half-open ranges along dim 0 (rows) and dim 1 (cols), None for all.

    index: which matrix, where the tensor is a stack of them. turned: each is stored transposed; rows and cols are those
    of what it means. parity: 0 or 1 for the even or odd ones of ``rows`` alone. zeros: rows of zeros that follow.
    """

    name: str
    rows: Range | None = None
    cols: Range | None = None
    index: int | None = None
    turned: bool = False
    parity: int | None = None
    zeros: int = 0


@dataclass(frozen=True)
class Weight:
    """A parameter of one rank: its shape, and the pieces that fill it from top to bottom (along dim 0).

    exact: kept in float32, whatever the model's dtype. quantized: kept in 8 bits with the scales of its blocks.
    plus: what is added to what the files hold.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    exact: bool = False
    quantized: bool = False
    plus: float = 0.0

    @property
    def columns(self) -> Range:
        """The columns of the whole matrices that its pieces have, the same for all of them."""
        cols = self.pieces[0].cols if self.pieces else None
        return cols or (0, self.shape[-1])
