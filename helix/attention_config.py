"""The settings of attention."""

from __future__ import annotations

from dataclasses import dataclass

from attention.backends import BACKENDS
from attention.exchange import EXCHANGES

from .checks import check_at_least, check_choice


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """How attention is computed.

    Attributes:
        backend: the partial attention; auto is triton on GPUs and reference on CPUs.
        exchange: how the KVP group exchanges partials; auto is fused where it shares GPU memory, else collective. With
            kvp 1 there is nothing to exchange.
        share_qkv_rows: steps of at least so many rows share the QKV projection over the KVP group; 0 is never.
        expand_rows: steps with at least so many rows of one sequence make keys and values of latents, and widen those
            of 8 bits, before they attend; 0 is never.
        workspace_tokens: how many tokens' keys and values are made at a time; null is 16384, or as many as take 32 MiB
            where those are more.
        split_query_rows: with latents, steps of at most so many rows make each query on one rank of the KVP group, by
            heads, and gather them; 0 is never, null is as long as that is cheaper than to make all of them on each.
    """

    backend: str = "auto"
    exchange: str = "auto"
    share_qkv_rows: int = 512
    expand_rows: int = 256
    workspace_tokens: int | None = None
    split_query_rows: int | None = None

    def __post_init__(self) -> None:
        check_choice("attention.backend", self.backend, BACKENDS)
        check_choice("attention.exchange", self.exchange, EXCHANGES)
        check_at_least("attention.share_qkv_rows", self.share_qkv_rows, 0)
        check_at_least("attention.expand_rows", self.expand_rows, 0)
        if self.workspace_tokens is not None:
            check_at_least("attention.workspace_tokens", self.workspace_tokens, 1)
        if self.split_query_rows is not None:
            check_at_least("attention.split_query_rows", self.split_query_rows, 0)
