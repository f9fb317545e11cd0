"""How long a step takes: a sum of terms, each of which a micro-benchmark measures alone.

Decode reads all weights and the cache of its sequences once, and waits: for launches, for attention's own latency, for
the exchange of each layer and for its two all-reduces. Prefill multiplies. What a term hides behind another one is not
modelled, but for the larger of bytes and products of many rows in the same kernels.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import NormalDist

from ..models.kinds import FULL, STATE, WINDOW
from ..models.query_rows import rows_that_share
from ..models.spec import Experts
from ..models.weights import EXPERT_ROLES
from ..states.heads import CHUNK, StateHeads
from .footprint import Footprint, LayerKind
from .hardware import Hardware

ELEMENT = 2  # bytes of an activation
ONE_SHOT_BYTES = 128 << 10  # from here on an all-reduce takes two flights
FUSED_REDUCE_BYTES = 4 << 20  # above this it is NCCL's
FUSED_EXCHANGE_BYTES, FUSED_EXCHANGE_ROWS = 16 << 20, (256, 4096)  # of partials, up to which the exchange is one kernel
SHARE_ROWS = 512  # attention.share_qkv_rows
EXPERT_ROWS = 64  # of many rows, each expert's are multiplied by so many at once, of which the last are half padding
STATES_SHARE = 0.4  # of a streaming read, what the kernels of states reach for prompts: chunks follow one another
STREAMED_ROWS = 64  # up to here weights stream past the rows, and every expert in use is multiplied with all of them
NAMES = ("weights", "products", "cache", "attention", "launches", "exchange", "all-reduce", "elements")
ATTENTION_ROLES = ("qkv", "q_b", "k_up", "v_up", "o", "output_gate", "state_in", "state_scores")


Terms = defaultdict[str, float]


@dataclass(frozen=True)
class Time:
    """Microseconds by term."""

    terms: dict[str, float] = field(default_factory=dict)

    @property
    def us(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())

    @property
    def bound_by(self) -> str:
        """The largest term."""
        return max(NAMES, key=lambda name: self.terms.get(name, 0.0))


@dataclass(frozen=True)
class CostModel:
    """Predicts the steps of one layout on one machine.

    Attributes:
        footprint: the layout and what its fullest rank holds.
        hardware: the machine's constants.
        prefill_chunk: prompt tokens a step.
    """

    footprint: Footprint
    hardware: Hardware
    prefill_chunk: int = 2048

    def decode(self, context: float, batch: int) -> Time:
        """Return the time of a decode step (TTL) of ``batch`` sequences of ``context`` tokens each."""
        foot = self.footprint
        terms: Terms = defaultdict(float)
        for kind in foot.layers:
            layer = self._waits(kind, batch)
            self.add_products(layer, kind, batch, shared=False)
            self.add_bounded(layer, kind, context, batch)
            _add(terms, layer, kind.count)
        self.add_ends(terms, batch)
        kvp = foot.layout.kvp
        tokens = max(foot.placement.local_len(math.ceil(context), 0), batch * context / kvp)  # first owners in turn
        self.add_attention(terms, rows_times_tokens=tokens, read_tokens=tokens)
        return Time(dict(terms))

    def prefill(self, prompt: int) -> Time:
        """Return the time to the first token (TTFT) of one prompt, alone and with nothing cached."""
        foot, hw = self.footprint, self.hardware
        terms: Terms = defaultdict(float)
        chunks = Counter({self.prefill_chunk: prompt // self.prefill_chunk})
        if rest := prompt % self.prefill_chunk:
            chunks[rest] += 1
        for rows, times in chunks.items():
            for kind in foot.layers:
                layer = self._waits(kind, rows)
                self.add_products(layer, kind, rows, shared=rows >= SHARE_ROWS)
                layer["elements"] += self._element_bytes(kind, rows) / hw.read_bytes_per_us
                if kind.kind == STATE:
                    layer["elements"] += self._state_bytes(rows) / (STATES_SHARE * hw.read_bytes_per_us)
                if kind.kind == WINDOW:
                    seen = min(prompt, foot.spec.window)
                    self.add_window(layer, rows_times_tokens=rows * seen, read_tokens=rows + seen)
                _add(terms, layer, times * kind.count)
        terms["weights"] += foot.top["lm_head"].num_bytes / hw.read_bytes_per_us
        kvp = foot.layout.kvp
        pairs = prompt * (prompt + 1) / 2 / kvp
        read = sum(min(start + self.prefill_chunk, prompt) for start in range(0, prompt, self.prefill_chunk)) / kvp
        self.add_attention(terms, rows_times_tokens=pairs, read_tokens=read, chunks=True)
        return Time(dict(terms))

    # --- terms of one layer -------------------------------------------------------------------------------------------

    def _waits(self, kind: LayerKind, rows: int) -> Terms:
        """What a layer takes beyond bytes and products: launches, the exchange or a merge alone, two all-reduces."""
        foot, hw = self.footprint, self.hardware
        world, kvp = foot.layout.world_size, foot.layout.kvp
        terms: Terms = defaultdict(float)
        terms["launches"] = self.launch_us(kind, rows)
        terms["all-reduce"] = 2 * self.all_reduce_us(rows, world)
        if kind.kind == STATE:
            return terms
        if kvp == 1 or kind.kind == WINDOW:
            terms["launches"] += hw.merge_us
            return terms
        row_bytes = foot.num_heads * foot.spec.value_dim * ELEMENT
        least, most = FUSED_EXCHANGE_ROWS
        fused = rows <= max(least, min(FUSED_EXCHANGE_BYTES // row_bytes, most))
        terms["exchange"] = self._exchange_us(rows * row_bytes, fused=fused)
        if rows >= SHARE_ROWS:  # each rank projects the rows that it owns
            terms["exchange"] += self._exchange_us(rows * foot.num_heads * self._query_size * ELEMENT, fused=False)
        elif self.shares_queries(rows):
            terms["exchange"] += self._exchange_us(rows * foot.num_heads * foot.spec.head_dim * ELEMENT, fused=True)
        return terms

    def _exchange_us(self, num_bytes: float, *, fused: bool) -> float:
        """What a KVP group takes to send so many bytes of all its heads, each rank those of the others."""
        kvp, hw = self.footprint.layout.kvp, self.hardware
        sent = num_bytes * (kvp - 1) / kvp
        if not self._is_near:
            return hw.network_us + hw.merge_us + sent / hw.network_bytes_per_us
        if not fused:
            return hw.collective_us + sent / hw.collective_bytes_per_us
        return hw.exchange_us + hw.exchange_peer_us * (kvp - 2) + sent / hw.link_bytes_per_us

    @property
    def _is_near(self) -> bool:
        """Whether the ranks of a KVP group, which are neighbours, reach each other's memory."""
        layout, domain = self.footprint.layout, self.hardware.domain
        return layout.world_size <= domain or domain % layout.kvp == 0

    def shares_queries(self, rows: int) -> bool:
        """Whether the ranks of a KVP group make queries of latents by heads, and gather them, in a step of few rows."""
        foot = self.footprint
        q_b_bytes = ELEMENT if foot.storage.weights in ("fp32", "bf16") else 1
        most = rows_that_share(foot.spec, foot.layout.kvp, element_bytes=ELEMENT, q_b_bytes=q_b_bytes)
        return self._is_near and rows <= most

    def launch_us(self, kind: LayerKind, rows: int) -> float:
        """What a layer's kernels take beyond their bytes: projections, append, attention, the mixture of experts."""
        hw, latent = self.hardware, self.footprint.spec.latent
        count = 5  # qkv, append, o, gate and up, down
        if latent is not None:
            count += 4 if latent.q_rank is not None else 3  # queries into the latent space, values out of it
        us = hw.attention_us
        if kind.kind == STATE:
            us, count = hw.launch_us, 4  # the states themselves; input, output, gate and up, down
        if kind.has_experts:
            us += hw.experts_us + hw.experts_row_us * min(rows, STREAMED_ROWS)
            count += 0 if "shared_down" in kind.matrices else -2
        return us + count * hw.launch_us

    def all_reduce_us(self, rows: int, world: int) -> float:
        """One all-reduce of so many rows' hidden states, in microseconds."""
        hw, size = self.hardware, rows * self.footprint.spec.hidden_size * ELEMENT
        if world == 1:
            return hw.launch_us
        inside = min(world, hw.domain)
        us = hw.all_reduce_us + hw.all_reduce_peer_us * (inside - 2)
        if size > FUSED_REDUCE_BYTES:
            us = hw.collective_us + 2 * (inside - 1) / inside * size / hw.collective_bytes_per_us
        elif size < ONE_SHOT_BYTES:
            us += (inside - 1) * size / hw.link_bytes_per_us
        else:
            us += hw.flight_us + 2 * (inside - 1) / inside * size / hw.link_bytes_per_us
        if world > hw.domain:
            us += hw.network_us + 2 * size / hw.domain / hw.network_bytes_per_us
        return us

    def add_products(self, terms: Terms, kind: LayerKind, rows: int, *, shared: bool) -> None:
        """Projections and experts: reading the weights or multiplying, whichever takes longer; of few rows both.

        Weights that stream past few rows are multiplied behind their reads, not beside them: projections of a layer of
        Qwen3-235B take 38, 40, 43 and 50 us for 1, 16, 32 and 64 rows. What rows of experts add is ``experts_row_us``.
        """
        hw, foot = self.hardware, self.footprint
        rate = hw.matmul_rate(foot.storage.weights)
        of_own_heads = ("v_up", "q_b", "k_up") if self.shares_queries(rows) else ("v_up",)  # v_up: else for chunks
        read_us = flops = 0.0
        for role, matrix in kind.matrices.items():
            if role in EXPERT_ROLES:
                continue
            mine = rows / foot.layout.kvp if shared and role == "qkv" else rows
            used = foot.out_share if role in of_own_heads else 1.0
            read_us += used * matrix.num_bytes / hw.read_rate(is_narrow=matrix.is_narrow)
            flops += used * 2 * mine * matrix.elements
        if rows <= STREAMED_ROWS:
            terms["weights"] += read_us
            terms["products"] += flops / hw.matmul_rate("bf16")  # narrower weights are widened
        else:
            _add_larger(terms, "weights", read_us, "products", flops / rate)
        if kind.has_experts and foot.spec.experts is not None:
            experts = foot.spec.experts
            held = [kind.matrices[role] for role in EXPERT_ROLES]
            held_us = sum(each.num_bytes / hw.read_rate(is_narrow=each.is_narrow) for each in held)
            used = experts_in_use(experts, foot.layout.ep, rows)
            mine = rows * experts.num_chosen / experts.num_experts  # of an expert
            if rows > STREAMED_ROWS:
                mine += min(mine, EXPERT_ROWS / 2)
            flops = 2 * sum(each.elements for each in held) * mine
            _add_larger(terms, "weights", held_us * used, "products", flops / rate)

    def add_bounded(self, terms: Terms, kind: LayerKind, context: float, batch: int) -> None:
        """What a layer of bounded memory reads in a decode step: states, which it writes too, or a window."""
        foot = self.footprint
        if kind.kind == STATE:
            terms["cache"] += 2 * batch * foot.matrices_bytes / self.hardware.read_bytes_per_us
        elif kind.kind == WINDOW:
            seen = batch * min(context, foot.spec.window)
            self.add_window(terms, rows_times_tokens=seen, read_tokens=seen)

    def add_ends(self, terms: Terms, rows: int) -> None:
        """What a step takes beside its layers: embedding, head, choice of tokens, and the way to the next step."""
        head, hw = self.footprint.top["lm_head"], self.hardware
        terms["weights"] += head.num_bytes / hw.read_bytes_per_us
        terms["products"] += 2 * rows * head.elements / hw.matmul_rate("bf16")
        terms["launches"] += 4 * hw.launch_us + hw.step_us

    def add_attention(
        self, terms: Terms, *, rows_times_tokens: float, read_tokens: float, chunks: bool = False
    ) -> None:
        """The full layers' attention: the larger of reading the cache and multiplying, on one rank.

        Chunks make keys and values of the latents that they read, and multiply with these.
        """
        foot, spec, hw = self.footprint, self.footprint.spec, self.hardware
        products, latent, num_layers = spec.head_dim + spec.value_dim, spec.latent, len(spec.layers_of(FULL))
        if chunks and latent is not None:
            products = latent.q_dim + latent.value_dim
            made = 2 * foot.num_heads * latent.rank * (latent.plain_dim + latent.value_dim) * read_tokens
            terms["products"] += num_layers * made / hw.matmul_rate("bf16")
        flops = 2 * num_layers * foot.num_heads * products * rows_times_tokens
        read_us = read_tokens * foot.token_bytes / hw.read_rate(is_narrow=foot.storage.has_narrow_cache)
        _add_larger(terms, "cache", read_us, "attention", flops / hw.attention_flops_per_us)

    def add_window(self, terms: Terms, *, rows_times_tokens: float, read_tokens: float) -> None:
        """Attention of one layer with a window: the larger of reading what is seen and multiplying, on one rank."""
        foot, hw = self.footprint, self.hardware
        flops = 4 * foot.num_window_heads * foot.spec.head_dim * rows_times_tokens
        num_bytes = read_tokens * foot.storage.token_bytes(foot.spec, foot.num_window_kv_heads)
        read_us = num_bytes / hw.read_rate(is_narrow=foot.storage.has_narrow_cache)
        _add_larger(terms, "cache", read_us, "attention", flops / hw.attention_flops_per_us)

    def _element_bytes(self, kind: LayerKind, rows: int) -> float:
        """What norms, residuals, rotation and gates of a chunk read and write, in bytes.

        In a KVP group also own rows that are picked, queries that are put in order, and partials packed and merged.
        """
        foot, spec, part = self.footprint, self.footprint.spec, self.footprint.part
        units, kvp = part.ffn[1] - part.ffn[0], foot.layout.kvp
        hidden = 8.0 * spec.hidden_size
        if kind.has_experts and spec.experts is not None:
            share = spec.experts.num_chosen / foot.layout.ep
            units = round(share * (part.expert_ffn[1] - part.expert_ffn[0]))
            hidden += 3 * share * spec.hidden_size  # a row is copied for each of its experts; what these add is summed
        heads = 0 if kind.kind == STATE else foot.num_heads * spec.value_dim
        elements = hidden + 3 * units + 4 * heads
        if kvp > 1 and kind.kind == FULL:
            elements += 2 * spec.hidden_size / kvp
            elements += foot.num_heads * (2 * self._query_size + (3 + 1 / kvp) * spec.value_dim)
        return rows * ELEMENT * elements

    def _state_bytes(self, rows: int) -> float:
        """What a state layer's kernels read and write of a prompt's rows, in bytes; see ``states.prompt_kernels``."""
        assert self.footprint.spec.states is not None
        heads = StateHeads.of(self.footprint.spec.states, self.footprint.part.value_heads)
        within = heads.value_dim + 3 * heads.key_dim + CHUNK  # of a head: values, erased, asks, puts, scores
        return rows * ELEMENT * (3 * heads.conv_size + heads.num_value * (2 * within + 4 * heads.value_dim))

    @property
    def _query_size(self) -> int:
        """Elements of a projected query's head."""
        latent = self.footprint.spec.latent
        return self.footprint.spec.head_dim if latent is None else latent.q_dim


def experts_in_use(experts: Experts, ep: int, rows: int) -> float:
    """Return the share of its experts that rows use on the rank with the most of them, each expert equally likely.

    The mean is what independent rows leave; the most of EP ranks stands above it by what EP normal variables, whose sum
    hardly varies, are expected to.
    """
    mean = 1.0 - (1.0 - experts.num_chosen / experts.num_experts) ** rows
    if ep == 1:
        return mean
    held = experts.num_experts / ep
    deviation = math.sqrt(held * mean * (1.0 - mean) * (1.0 - 1.0 / ep))
    above = NormalDist().inv_cdf((ep - 0.375) / (ep + 0.25)) * math.sqrt(ep / (ep - 1))
    return min(1.0, mean + above * deviation / held)


def _add_larger(terms: Terms, read: str, read_us: float, multiply: str, multiply_us: float) -> None:
    terms[read if read_us >= multiply_us else multiply] += max(read_us, multiply_us)


def _add(terms: Terms, more: Terms, times: int) -> None:
    for name, value in more.items():
        terms[name] += times * value
