"""The exchange over the KVP group: all-to-all of partials, then the merge.

Every KVP rank holds partial results of the same rows and query heads over its own shard. Rank k receives everyone's
partials for its own 1/KVP of the heads and merges them by log-sum-exp; what it holds then is the input of its slice of
the output projection. The message is rows x heads/KVP x (D + lse) per peer whatever the context length
(arXiv 2507.07120, section 2.1).

Heads that KVP does not divide are split as evenly as possible: the first ranks take one more, and messages are padded
to that size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from parallel.collectives import all_to_all
from parallel.grid import split_evenly

from .merge import lse_words, merge_packed, merge_reference

EXCHANGES = ("auto", "collective")


class Exchange(Protocol):
    """Turns local partials into this rank's merged heads."""

    def __call__(self, out_RQD: torch.Tensor, lse_RQ: torch.Tensor) -> torch.Tensor:
        """Exchange and merge one layer's partials.

        Collective over the KVP group: every rank calls it with the same R, layer by layer in the same order.

        Args:
            out_RQD: [R, Q, D] local partial results, normalised over the local shard.
            lse_RQ: [R, Q] float32, natural log; -inf where the shard holds nothing that the row sees.

        Returns:
            [R, heads of this rank, D] in out's dtype.
        """
        ...


class NoExchange:
    """The exchange of a group of one: the partial result is the result."""

    def __call__(self, out_RQD: torch.Tensor, lse_RQ: torch.Tensor) -> torch.Tensor:
        """Return ``out_RQD`` as it is."""
        return out_RQD


class CollectiveExchange:
    """One packed all-to-all (O and lse in one message) and one merge, over NCCL or gloo.

    Args:
        group: the KVP group.
        num_heads: Q, the query heads of each rank's partials; equal on all ranks of the group.
        head_dim: D, even.
        device: where the partials live.
    """

    def __init__(self, group: dist.ProcessGroup, num_heads: int, head_dim: int, device: torch.device) -> None:
        self._group = group
        self._kvp = group.size()
        self._head_dim = head_dim
        self._padded = -(-num_heads // self._kvp)
        ranges = [split_evenly(num_heads, self._kvp, rank) for rank in range(self._kvp)]
        start, stop = ranges[group.rank()]
        self._heads = stop - start
        # padding repeats a head that exists; the receiver drops it
        index = [min(first + i, num_heads - 1) for first, _ in ranges for i in range(self._padded)]
        even = self._padded * self._kvp == num_heads
        self._head_index = None if even else torch.tensor(index, device=device)

    def __call__(self, out_RQD: torch.Tensor, lse_RQ: torch.Tensor) -> torch.Tensor:
        """Exchange and merge; see ``Exchange``."""
        received = all_to_all(self._pack(out_RQD, lse_RQ), self._group)
        if received.is_cuda:
            return merge_packed(received, self._heads, self._head_dim)
        out, lse = unpack(received[:, :, : self._heads], self._head_dim)
        return merge_reference(out, lse)[0]

    def _pack(self, out_RQD: torch.Tensor, lse_RQ: torch.Tensor) -> torch.Tensor:
        if self._head_index is not None:
            out_RQD, lse_RQ = out_RQD[:, self._head_index], lse_RQ[:, self._head_index]
        rows, shape = out_RQD.shape[0], (out_RQD.shape[0], self._kvp, self._padded)
        words = lse_words(out_RQD.dtype)
        packed = out_RQD.new_empty((self._kvp, rows, self._padded, self._head_dim + words))
        packed[..., : self._head_dim] = out_RQD.view(*shape, self._head_dim).transpose(0, 1)
        packed[..., self._head_dim :] = lse_RQ.reshape(*shape, 1).view(out_RQD.dtype).transpose(0, 1)
        return packed


def unpack(packed: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a packed message [..., D + W] into its partials [..., D] and their float32 lse [...]."""
    lse = packed[..., head_dim:].contiguous().view(torch.float32).squeeze(-1)
    return packed[..., :head_dim], lse


def make_exchange(
    name: str, *, group: dist.ProcessGroup | None, num_heads: int, head_dim: int, device: torch.device
) -> Exchange:
    """Return the exchange for a KVP group; ``group`` of None is a group of one.

    Raises:
        ValueError: when ``name`` is none of EXCHANGES.
    """
    if name not in EXCHANGES:
        raise ValueError(f"attention.exchange = {name!r} must be one of {', '.join(EXCHANGES)}")
    if group is None:
        return NoExchange()
    return CollectiveExchange(group, num_heads, head_dim, device)
