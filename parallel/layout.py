"""How a world is laid out: TPA x KVP for attention and TPF x EP for the feed-forward network, and who has which heads.

Pure integers, like ``placement``: a layout of any number of ranks can be checked and planned where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[int, int]
"""A half-open range (start, stop)."""


def split_evenly(count: int, parts: int, index: int) -> Range:
    """Return the index-th of ``parts`` contiguous ranges over ``count`` items; the first ones take the remainder."""
    small, extra = divmod(count, parts)
    start = index * small + min(index, extra)
    return start, start + small + (index < extra)


def split_units(count: int, parts: int, index: int) -> Range:
    """Return the index-th of ``parts`` contiguous ranges over ``count`` units of a feed-forward, in as even numbers as
    copies of tiles allow: they begin at multiples of up to 64 units where the longest is at most a tenth above even.
    """
    size = 1 if count % (16 * parts) == 0 else 64
    while size > 1 and (count % size or -(-count // (size * parts)) * size * parts > 1.1 * count):
        size //= 2
    start, stop = split_evenly(count // size, parts, index)
    return start * size, stop * size


@dataclass(frozen=True)
class Layout:
    """How many ways each axis is split. ``tpf`` and ``ep`` of 0 mean: whatever fills the world (ep = 1).

    Raises:
        ValueError: when an axis is not positive, or TPF x EP is not TPA x KVP.
    """

    kvp: int = 1
    tpa: int = 1
    tpf: int = 0
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in ("kvp", "tpa", "ep"):
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis} = {getattr(self, axis)} must be at least 1")
        if self.tpf == 0:
            if self.world_size % self.ep:
                raise ValueError(
                    f"parallel.ep ({self.ep}) must divide "
                    f"parallel.tpa ({self.tpa}) x parallel.kvp ({self.kvp}) = {self.world_size}"
                )
            object.__setattr__(self, "tpf", self.world_size // self.ep)
        if self.tpf * self.ep != self.world_size:
            raise ValueError(
                f"parallel.tpf ({self.tpf}) x parallel.ep ({self.ep}) must equal "
                f"parallel.tpa ({self.tpa}) x parallel.kvp ({self.kvp}) = {self.world_size}"
            )

    @property
    def world_size(self) -> int:
        """The number of ranks: TPA x KVP."""
        return self.tpa * self.kvp

    def check_world(self, started: int) -> None:
        """Raise ValueError unless the launcher started as many ranks as the layout has."""
        if self.world_size != started:
            way = "lower one" if self.world_size > started else "raise one"
            raise ValueError(
                f"parallel.kvp ({self.kvp}) x parallel.tpa ({self.tpa}) = {self.world_size} ranks "
                f"but {started} started; {way} or start {self.world_size}"
            )

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Raise ValueError unless a model with these heads can be split this way."""
        if self.tpa <= num_kv_heads:
            if num_kv_heads % self.tpa:
                raise ValueError(
                    f"parallel.tpa = {self.tpa} must divide the model's {num_kv_heads} KV heads "
                    f"or be a multiple of them"
                )
        elif self.kvp > 1:
            raise ValueError(
                f"parallel.tpa = {self.tpa} exceeds the model's {num_kv_heads} KV heads while "
                f"parallel.kvp = {self.kvp} > 1; lower tpa to at most {num_kv_heads} and give the ranks to kvp"
            )
        elif self.tpa % num_kv_heads:
            raise ValueError(
                f"parallel.tpa = {self.tpa} must be a multiple of the model's {num_kv_heads} KV heads to duplicate them"
            )
        if num_heads < self.world_size:
            raise ValueError(
                f"parallel.kvp ({self.kvp}) x parallel.tpa ({self.tpa}) = {self.world_size} ranks "
                f"exceed the model's {num_heads} query heads; lower one"
            )

    def check_experts(self, num_experts: int, ffn_size: int) -> None:
        """Raise ValueError unless a model with these experts, of so many units each, can be split this way."""
        if self.ep > num_experts:
            raise ValueError(f"parallel.ep = {self.ep} exceeds the model's {num_experts} experts; lower it")
        if self.tpf > ffn_size:
            raise ValueError(f"parallel.tpf = {self.tpf} exceeds the {ffn_size} units of the model's experts; raise ep")

    def kv_heads(self, num_kv_heads: int, tpa_rank: int) -> Range:
        """Return the KV heads of a TPA rank; beyond K ranks the heads are duplicated."""
        if self.tpa <= num_kv_heads:
            return split_evenly(num_kv_heads, self.tpa, tpa_rank)
        head = tpa_rank * num_kv_heads // self.tpa
        return head, head + 1

    def query_heads(self, num_heads: int, num_kv_heads: int, tpa_rank: int) -> Range:
        """Return the query heads of a TPA rank: those that read its KV heads, or its share of them."""
        group = num_heads // num_kv_heads
        start, stop = self.kv_heads(num_kv_heads, tpa_rank)
        if self.tpa <= num_kv_heads:
            return start * group, stop * group
        copies = self.tpa // num_kv_heads
        first, last = split_evenly(group, copies, tpa_rank % copies)
        return start * group + first, start * group + last

    def merged_heads(self, num_heads: int, num_kv_heads: int, tpa_rank: int, kvp_rank: int) -> Range:
        """Return the query heads that a rank holds after the exchange: 1/KVP of its TPA slice."""
        start, stop = self.query_heads(num_heads, num_kv_heads, tpa_rank)
        first, last = split_evenly(stop - start, self.kvp, kvp_rank)
        return start + first, start + last
