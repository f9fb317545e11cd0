"""A model and a layer that predicts one token further: its own (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import torch

from attention.exchange import Exchange
from attention.pages import Pages
from attention.rows import Rows
from parallel.norm import rms_norm

from .decoder import Decoder
from .embed import embed
from .latent import append_latents
from .linear import linear, split_linear
from .rope import RopeSpec


class NextDecoder(Decoder):
    """A decoder whose spec ``looks_further``, by the model's layer or by a head (``EagleDecoder``); see ``Decoder``."""

    def state_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what that layer is told of a step's rows, whose final hidden states are given: [R, h]."""
        return hidden

    @torch.inference_mode()
    def predict_next(
        self,
        token_ids: torch.Tensor,
        before: torch.Tensor,
        rows: Rows,
        pages: Pages,
        exchange: Exchange,
        *,
        chosen: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer that predicts one token further.

        Returns its states [R, h], for the rows behind, and the most likely tokens after ``token_ids``, [R] int64.

        Args:
            token_ids: [R] int64, equal on all ranks; at position 0 its embedding and hidden state count as zero.
            before: [R, h], the state of the position before each row, see ``state_of``, or this layer's.
            rows: as in ``forward``; a row stands at its token's position.
            pages: the layer's own.
            exchange: as in ``forward``.
            chosen: see ``embed``.
        """
        assert self.next is not None
        layer, weights = self.spec.num_layers, self.next
        stream, normed, cos, sin = self._next_input(token_ids, before, rows, chosen)
        exchange.begin_step()
        queries = self.query_shares.of(None, cos, sin, layer=0)
        q = self._project_qkv(weights, normed, cos, sin, rows.slot, pages, None, queries, plain=False, chunk=False)
        merged = exchange(self._attend(q, pages, rows, (), weights), layer=0)
        last = self._finish(layer, weights, merged, stream, weights["next_norm"], plain=False, chunk=False, index=0)
        assert isinstance(last, torch.Tensor)
        return self._drafted(last, stream)

    @torch.inference_mode()
    def append_next(
        self,
        token_ids: torch.Tensor,
        before: torch.Tensor,
        rows: Rows,
        pages: Pages,
        *,
        chosen: tuple[torch.Tensor, torch.Tensor] | None = None,
        chunk: bool = False,
    ) -> None:
        """Append what that layer's later rows read of rows, and compute nothing else of them; see ``predict_next``."""
        assert self.next is not None
        _, normed, cos, sin = self._next_input(token_ids, before, rows, chosen)
        if self.spec.latent is None:
            self._project_qkv(self.next, normed, cos, sin, rows.slot, pages, None, None, plain=False, chunk=chunk)
            return
        flat = split_linear(normed, self.next["qkv"], pdl=self._pdl, chunk=chunk)
        append_latents(
            flat, cos, sin, pages, rows.slot, self.next, self.spec.latent,
            interleaved=self.spec.rope.interleaved, pdl=self._pdl,
        )  # fmt: skip

    def _next_input(
        self,
        token_ids: torch.Tensor,
        before: torch.Tensor,
        rows: Rows,
        chosen: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the stream that enters that layer, its norm, and cos and sin of the rows' angles."""
        assert self.next is not None
        both, cos, sin = self._embedded_beside(
            before, token_ids, rows, chosen, self.next["embedding_norm"], self.spec.rope, self._inv_freq
        )
        stream = linear(both, self.next["input"], pdl=self._pdl)
        return stream, rms_norm(stream, self.next["input_norm"], self.spec.rms_eps), cos, sin

    def _embedded_beside(
        self,
        before: torch.Tensor,
        token_ids: torch.Tensor,
        rows: Rows,
        chosen: tuple[torch.Tensor, torch.Tensor] | None,
        norm: torch.Tensor,
        rope: RopeSpec,
        inv_freq: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the rows' embeddings and the states before them, each normalised, [R, 2 h]; and cos and sin.

        At position 0 they are zero: no state is before it.
        """
        assert self.next is not None
        _, normed, cos, sin = embed(
            token_ids, rows.positions, embedding=self.top["embedding"], weight=norm, eps=self.spec.rms_eps, rope=rope,
            inv_freq=inv_freq, chosen=chosen,
        )  # fmt: skip
        both = torch.cat((normed, rms_norm(before, self.next["hidden_norm"], self.spec.rms_eps)), -1)
        return both.masked_fill_((rows.positions == 0).unsqueeze(1), 0), cos, sin

    def _drafted(self, normed: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states and tokens of what the layer leaves: its stream [R, h], and the norm of that."""
        return normed, self.greedy(self.local_logits(normed))
