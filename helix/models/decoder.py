"""The decoder that every family shares, sharded TPA x KVP in attention and TPF in the feed-forward.

The residual stream is replicated. A layer is: QKV of the TPA slice (the same on every KVP rank, so queries need no
gather), RoPE, append to the owner's pages, partial attention over the local shard, exchange and merge, a row-parallel
output projection over all N ranks, all-reduce; then the feed-forward, row-parallel over all N, or experts, split TPF x
EP, and all-reduce (arXiv 2507.07120, figure 2). Each all-reduce adds the residual and applies the norm that follows it.

Steps with many rows may share the QKV projection: each KVP rank projects only the rows that it owns, whose K and V
then stay where they are, and the queries are gathered. Of latents, steps with few rows share the queries' projections
by heads (``query_share``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F

from attention.exchange import Exchange
from attention.merge import merge_parts
from attention.pages import PageLayout, Pages
from attention.partial import PartialAttention, Partials, Workspace
from attention.ranges import Filling, attend_ranges
from attention.rows import Rows
from attention.widened import WidenedTokens
from attention.work import Cutting
from parallel.all_reduce_norm import AllReduceNorm
from parallel.collectives import all_gather
from parallel.eight_bits import RowsInEightBits
from parallel.grid import HelixGrid
from parallel.layout import split_evenly
from parallel.sharded_argmax import ShardedArgmax

from ..cache.pages import PagedCache
from ..states.cache import StateCache
from ..states.cuts import Cuts
from ..states.layer import advance
from .embed import embed
from .experts import ExpertBiases, mixture
from .gate import gate_heads
from .heads import append_and_query
from .kinds import STATE, WINDOW
from .latent import MadeOfLatents, project, values_of
from .linear import feed_forward, linear, split_linear
from .parameters import Parameters, allocate, num_bytes
from .parts import Weight
from .quantized import Matrix
from .query_share import QueryGather, QueryShare, QueryShares
from .row_share import RowShare
from .spec import Experts, ModelSpec
from .stream_norm import StreamNorm
from .wanted import Wanted
from .weights import EXPERT_ROLES, layer_weights, model_weights, next_weights, part_of


class Decoder:
    """One rank's share of a model.

    Every method is collective over the world: all ranks call it with the same token ids, in the same order.

    Attributes:
        num_heads, num_kv_heads: the query and KV heads of this rank's attention, before the exchange.
        top: the weights outside the layers, by role; layers: those of each layer, by role; among them
            "cache_scales" [2] float32, of keys and values in 8 bits, where the checkpoint has them;
            next: those of the layer that predicts one token further, None without one.
        made: where keys and values are made of latents, or widened from 8 bits; None without ``workspace``.
        states: what state layers keep of the sequences; None where the model has no such layer.
        window_cache: the pages of layers with a window, and windows: those of each; None where the model has none.
        query_shares: which queries this rank makes, and how it gets the rest.
        computed: the layers that ``forward`` runs: all, but where steps are run for their kernels' sake alone.
        taps: layers before which a step's residual stream is kept, for a head that drafts; none without one.
        tapped: of the last step, these streams [R, h], in the order of ``taps``; whoever reads them takes them out.
    """

    def __init__(
        self,
        spec: ModelSpec,
        grid: HelixGrid,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: PartialAttention,
        reduce_norm: AllReduceNorm | None = None,
        argmax: ShardedArgmax | None = None,
        query_gather: QueryGather | None = None,
        workspace: tuple[int, PageLayout] | None = None,
        states: StateCache | None = None,
        windows: PagedCache | None = None,
        pdl: bool = False,
    ) -> None:
        self.spec, self.grid, self.dtype, self.device = spec, grid, dtype, device
        self.part = part_of(spec, grid.layout, grid.rank)
        self.num_heads = self.part.q_heads[1] - self.part.q_heads[0]
        self.num_kv_heads = self.part.kv_heads[1] - self.part.kv_heads[0]
        self._attention, self._pdl = attention, pdl
        self.query_shares = QueryShares(query_gather, self.num_heads, grid.kvp_group)
        reduce_norm = reduce_norm or AllReduceNorm(
            grid.world_group, hidden_size=spec.hidden_size, dtype=dtype, device=device, pdl=pdl
        )
        self._sum_and_norm = StreamNorm(spec, reduce_norm)
        self._argmax = argmax or ShardedArgmax(
            grid.world_group, vocab=self.part.vocab, vocab_size=spec.vocab_size, device=device
        )
        self.states, self.window_cache = states, windows
        self.windows = None if windows is None else windows.layers
        self.computed: Collection[int] = range(spec.num_layers)
        self.taps: tuple[int, ...] = ()
        self.tapped: list[torch.Tensor] = []
        self._inv_freq = spec.rope.inv_freq.to(device=device, dtype=torch.float32)
        self._window_inv_freq = (spec.window_rope or spec.rope).inv_freq.to(device=device, dtype=torch.float32)
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype).item()
        self.top: Parameters = self._allocate(model_weights(spec, self.part))
        self.layers: list[Parameters] = [
            self._allocate(layer_weights(spec, layer, self.part)) for layer in range(spec.num_layers)
        ]
        self.next = self._allocate(next_weights(spec, self.part)) if spec.predicts_next else None

        self.made = None if workspace is None else self._make_workspace(*workspace)

    def _make_workspace(self, num_tokens: int, pages: PageLayout) -> MadeOfLatents | WidenedTokens | None:
        """Return what chunks attend to instead of the pages; None where pages serve them as they are."""
        if self.spec.latent is not None:
            return MadeOfLatents(self.spec.latent, self.num_heads, num_tokens, dtype=self.dtype, device=self.device)
        return WidenedTokens(pages, num_tokens, self.device) if pages.in_8_bits else None

    def _allocate(self, weights: dict[str, Weight]) -> Parameters:
        return allocate(weights, self.spec, dtype=self.dtype, device=self.device)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the weights that this rank's layers hold."""
        return sum(map(num_bytes, self.layers if self.next is None else [*self.layers, self.next]))

    def cutting(self, pages: Pages | Workspace, *, max_rows: int) -> Cutting | None:
        """Return how attention over pages like these wants steps cut whose longest run has so many rows."""
        latent = None if isinstance(pages, Workspace) else self.spec.latent
        value_dim = None if latent is None else latent.rank
        return self._attention.cutting(pages, self.num_heads, max_rows, value_dim=value_dim)

    def window_cutting(self, *, max_rows: int) -> Cutting | None:
        """Return how layers with a window want steps cut whose longest run has so many rows; None without any."""
        if self.windows is None:
            return None
        first, stop = self.part.window_q_heads
        return self._attention.cutting(self.windows[0], stop - first, max_rows, window=True)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        rows: Rows,
        pages: Sequence[Pages],
        exchange: Exchange,
        share: RowShare | None = None,
        *,
        fillings: Sequence[Filling] = (),
        chosen: torch.Tensor | None = None,
        chunk: bool = False,
        longest: int = 1,
        wanted: Wanted | None = None,
        cuts: Cuts | None = None,
    ) -> torch.Tensor:
        """Run all layers over one step's rows and return final hidden states, normalised: [L, h] of those wanted.

        Args:
            token_ids: [R] int64, equal on all ranks.
            rows: the step's rows.
            pages: those of each full layer; K and V of owned rows are appended to it (or latents).
            exchange: the exchange over the KVP group.
            share: how the KVP ranks share the QKV projection; None where each projects every row.
            fillings: of ``made``, where the rows attend to what is made there; on all ranks or on none.
            chosen: [N, B] int64 on CUDA; a token id of -1 means the first token there of the row's sequence, and so on.
            chunk: the rows are of prompts, and may be quantised to meet quantised weights; on all ranks or on none.
            longest: rows of the longest run; of verified ones fewer may be said, for state layers know how many these
                may be.
            wanted: the rows whose states are returned; None for all R.
            cuts: what checkpoints keep of state layers on the way; None for nothing.
        """
        # before the step's first kernel: what appends reads slots without waiting for the kernel before it
        slot = rows.slot if share is None else share.own(rows.slot)
        normed: torch.Tensor | RowsInEightBits
        stream, normed, cos, sin = embed(
            token_ids,
            rows.positions,
            embedding=self.top["embedding"],
            weight=self.layers[0]["input_norm"],
            eps=self.spec.rms_eps,
            rope=self.spec.rope,
            inv_freq=self._inv_freq,
            chosen=None if chosen is None else (chosen, rows.row_seq),
            scale=self._embedding_scale,
        )
        near = (cos, sin)  # of layers with a window
        if self.spec.window_rope is not None:
            near = self.spec.window_rope.turn(rows.positions, self._window_inv_freq)
        own = (cos, sin) if share is None else (cos[share.mine], sin[share.mine])
        next_norms = [*(weights["input_norm"] for weights in self.layers[1:]), self.top["final_norm"]]
        exchange.begin_step()
        self.tapped = []
        for layer, (weights, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            if layer in self.taps:
                self.tapped.append(stream.clone())
            if layer not in self.computed:
                continue
            place = self.spec.places[layer]
            kind = self.spec.kind_of(layer).name
            last = wanted if layer == self.spec.num_layers - 1 else None
            if kind == STATE:
                assert self.states is not None and self.spec.states is not None and isinstance(normed, torch.Tensor)
                merged = advance(
                    normed, rows, self.states, place, weights, eps=self.spec.states.eps, longest=longest,
                    pdl=self._pdl, chunk=chunk, cuts=cuts,
                )  # fmt: skip
            elif kind == WINDOW:
                merged = self._look_back(place, weights, normed, *near, rows.window, chunk=chunk)
            else:
                queries = self.query_shares.of(share, cos, sin, layer=layer)
                q = self._project_qkv(
                    weights, normed, *own, slot, pages[place], share, queries, plain=bool(fillings), chunk=chunk
                )
                seen = (rows, fillings)
                if last is not None:
                    q, seen = q[last.index], (last.rows, last.fillings)
                partials = self._attend(q, pages[place], *seen, weights)
                merged = exchange(partials, layer=place, sinks=weights.get("sinks"))
            if last is not None:
                merged, stream, chunk = last.of(merged), last.of(stream), False
            if "output_gate" in weights:
                assert isinstance(normed, torch.Tensor)
                normed = normed if last is None else last.of(normed)
                scores = split_linear(normed, weights["output_gate"], pdl=self._pdl, chunk=chunk)
                merged = gate_heads(merged, scores, pdl=self._pdl)
            following = next((n for n in range(layer + 1, len(self.layers)) if n in self.computed), len(self.layers))
            readers = self._sum_and_norm.mixing_readers(following, self.layers) if chunk and share is None else ()
            normed = self._finish(
                layer, weights, merged, stream, next_norm, plain=bool(fillings), chunk=chunk, readers=readers
            )
        assert isinstance(normed, torch.Tensor)  # nothing but products follow those of 8 bits
        return normed

    def _look_back(
        self, place: int, weights: Parameters, normed: torch.Tensor | RowsInEightBits, cos: torch.Tensor,
        sin: torch.Tensor, rows: Rows | None, *, chunk: bool,
    ) -> torch.Tensor:  # fmt: skip
        """Return what this rank's heads of a layer with a window make of what they see: [R, Q, D]."""
        assert self.windows is not None and rows is not None
        (first, stop), (first_kv, stop_kv) = self.part.window_q_heads, self.part.window_kv_heads
        flat = split_linear(normed, weights["qkv"], weights.get("qkv_bias"), pdl=self._pdl, chunk=chunk)
        q = append_and_query(
            flat, cos, sin, self.windows[place], rows.slot, weights, self.spec, num_heads=stop - first,
            num_kv_heads=stop_kv - first_kv, pdl=self._pdl,
        )  # fmt: skip
        partials = self._attention(q, self.windows[place], rows, self.spec.scale)
        return merge_parts(partials, self.dtype, sinks=weights.get("sinks"), pdl=self._pdl)[0]

    def _finish(
        self,
        layer: int,
        weights: Parameters,
        merged: torch.Tensor,
        stream: torch.Tensor,
        next_norm: torch.Tensor,
        *,
        plain: bool,
        chunk: bool,
        index: int | None = None,
        readers: Sequence[Matrix] = (),
    ) -> torch.Tensor | RowsInEightBits:
        """Return what follows a layer's attention, up to the norm behind it, see ``StreamNorm``.

        ``index`` counts the steps' layers.
        """
        index = layer if index is None else index
        if self.spec.latent is not None and not plain:
            first, stop = (head - self.part.q_heads[0] for head in self.part.out_heads)
            size = self.spec.latent.value_dim
            merged = values_of(merged, weights["v_up"][first * size : stop * size], self.spec.latent, pdl=self._pdl)
        if self.spec.narrow_values is not None:
            merged = merged[..., : self.spec.narrow_values] * self.spec.value_scale
        bias = weights.get("o_bias") if self.grid.rank == 0 else None  # once: the all-reduce adds what ranks project
        projected = split_linear(merged.flatten(1), weights["o"], bias, pdl=self._pdl, chunk=chunk)
        fed = self._sum_and_norm.feeding_readers(weights) if chunk else ()
        normed = self._sum_and_norm(projected, stream, weights["post_norm"], 2 * index, weights.get("mixed_norm"), fed)
        added = self._feed_forward(weights, normed, self.spec.experts_of(layer), chunk)
        return self._sum_and_norm(added, stream, next_norm, 2 * index + 1, weights.get("fed_norm"), readers)

    def _attend(
        self, q: torch.Tensor, pages: Pages, rows: Rows, fillings: Sequence[Filling], weights: Parameters
    ) -> Partials:
        latent, scale = self.spec.latent, self.spec.scale
        if not fillings:
            return self._attention(q, pages, rows, scale, value_dim=None if latent is None else latent.rank)
        assert self.made is not None
        made = self.made
        return attend_ranges(
            q,
            fillings,
            lambda tokens: made.make(tokens, pages, weights),
            lambda q, rows: self._attention(q, made.workspace, rows, scale),
        )

    @torch.inference_mode()
    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of the vocabulary of the logits of hidden states [L, h]: [L, V_local]."""
        return linear(hidden, self.top["lm_head"], pdl=self._pdl)

    @torch.inference_mode()
    def gather_logits(self, local: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [L, V] from every rank's slice: bit-identical on every rank.

        Without the world's other ranks (a lone one of a layout) theirs are -inf.
        """
        world, vocab = self.grid.world_size, self.spec.vocab_size
        if self.grid.world_group is None:
            start, stop = self.part.vocab
            return F.pad(local.float(), (start, vocab - stop), value=-torch.inf)
        widest = -(-vocab // world)
        gathered = all_gather(F.pad(local, (0, widest - local.shape[-1])), self.grid.world_group)
        if vocab % world == 0:
            return gathered.transpose(0, 1).flatten(1).float()
        sizes = [stop - start for start, stop in (split_evenly(vocab, world, rank) for rank in range(world))]
        return torch.cat([gathered[rank, :, :size] for rank, size in enumerate(sizes)], -1).float()

    @torch.inference_mode()
    def greedy(self, local: torch.Tensor) -> torch.Tensor:
        """Return the most likely token of each row from every rank's slice, the lowest of equals: [L] int64."""
        return self._argmax(local)

    def _feed_forward(
        self, weights: Parameters, normed: torch.Tensor | RowsInEightBits, experts: Experts | None, chunk: bool
    ) -> torch.Tensor:
        """Return this rank's summands of a layer's feed-forward: [S, R, h]."""
        if experts is None:
            gelu = self.spec.gelu
            return feed_forward(normed, weights["gate_up"], weights["down"], gelu=gelu, pdl=self._pdl, chunk=chunk)
        assert isinstance(normed, torch.Tensor)
        first, stop = self.part.experts
        gate_up, down = (weights[role].unflatten(0, (stop - first, -1)) for role in EXPERT_ROLES)
        biases = None
        if experts.clamped is not None:
            of_up, of_down = (weights[f"{role}_bias"].unflatten(0, (stop - first, -1)) for role in EXPERT_ROLES)
            biases = ExpertBiases(weights["score_bias"], of_up, of_down, share=1.0 / self.grid.layout.tpf)
        return mixture(
            normed,
            weights["router"],
            gate_up,
            down,
            experts=experts,
            first=first,
            bias=weights.get("router_bias"),
            shared=(weights["shared_gate_up"], weights["shared_down"]) if experts.shared_size else None,
            shared_router=weights.get("shared_router"),
            biases=biases,
            pdl=self._pdl,
            chunk=chunk,
        )

    def _project_qkv(
        self,
        weights: Parameters,
        normed: torch.Tensor | RowsInEightBits,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot: torch.Tensor,
        pages: Pages,
        share: RowShare | None,
        queries: QueryShare | None,
        *,
        plain: bool,
        chunk: bool,
    ) -> torch.Tensor:
        """Project, rotate, append K and V, and return Q of all rows: [R, Q, D].

        cos, sin and slot are those of the rows that this rank projects; ``plain`` as in ``latent.project``.
        """
        if share is not None:
            assert isinstance(normed, torch.Tensor)
            normed = normed[share.mine]
        flat = split_linear(normed, weights["qkv"], weights.get("qkv_bias"), pdl=self._pdl, chunk=chunk)
        if self.spec.latent is not None:
            return project(
                flat, cos, sin, pages, slot, weights, self.spec.latent, num_heads=self.num_heads,
                interleaved=self.spec.rope.interleaved, share=queries, plain=plain, pdl=self._pdl, chunk=chunk,
            )  # fmt: skip
        q = append_and_query(
            flat, cos, sin, pages, slot, weights, self.spec, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            pdl=self._pdl,
        )  # fmt: skip
        return q if share is None else share.gather(q, self.grid.kvp_group)
