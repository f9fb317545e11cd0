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
from ..models.spec import Experts
from ..models.weights import EXPERT_ROLES
from .footprint import Footprint, LayerKind
from .hardware import Hardware

ELEMENT = 2  # bytes of an activation
ONE_SHOT_BYTES = 128 << 10  # from here on an all-reduce takes two flights
SHARE_ROWS = 512  # attention.share_qkv_rows
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
                layer["elements"] += self._element_bytes(rows) / hw.read_bytes_per_us
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
        sent = rows * foot.num_heads * foot.spec.value_dim * ELEMENT * (kvp - 1) / kvp
        if world <= hw.domain or hw.domain % kvp == 0:  # the group's ranks are neighbours
            latency = hw.exchange_us + hw.exchange_peer_us * (kvp - 2)
            terms["exchange"] = latency + sent / hw.link_bytes_per_us
        else:
            terms["exchange"] = hw.network_us + hw.merge_us + sent / hw.network_bytes_per_us
        return terms

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
        if size < ONE_SHOT_BYTES:
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
        num_bytes = flops = 0.0
        for role, matrix in kind.matrices.items():
            if role in EXPERT_ROLES:
                continue
            mine = rows / foot.layout.kvp if shared and role == "qkv" else rows
            used = foot.out_share if role == "v_up" else 1.0  # the others are for values of chunks
            num_bytes += used * matrix.num_bytes
            flops += used * 2 * mine * matrix.elements
        if rows <= STREAMED_ROWS:
            terms["weights"] += num_bytes / hw.read_bytes_per_us
            terms["products"] += flops / hw.matmul_rate("bf16")  # narrower weights are widened
        else:
            self._add_larger(terms, "weights", num_bytes, "products", flops / rate)
        if kind.has_experts and foot.spec.experts is not None:
            experts = foot.spec.experts
            held = sum(kind.matrices[role].num_bytes for role in EXPERT_ROLES)
            elements = sum(kind.matrices[role].elements for role in EXPERT_ROLES)
            used = experts_in_use(experts, foot.layout.ep, rows)
            flops = 2 * elements * rows * experts.num_chosen / experts.num_experts
            self._add_larger(terms, "weights", held * used, "products", flops / rate)

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
        us = flops / hw.attention_flops_per_us
        self._add_larger(terms, "cache", read_tokens * foot.token_bytes, "attention", us)

    def add_window(self, terms: Terms, *, rows_times_tokens: float, read_tokens: float) -> None:
        """Attention of one layer with a window: the larger of reading what is seen and multiplying, on one rank."""
        foot, hw = self.footprint, self.hardware
        flops = 4 * foot.num_window_heads * foot.spec.head_dim * rows_times_tokens
        num_bytes = read_tokens * foot.storage.token_bytes(foot.spec, foot.num_window_kv_heads)
        self._add_larger(terms, "cache", num_bytes, "attention", flops / hw.attention_flops_per_us)

    def _add_larger(self, terms: Terms, read: str, num_bytes: float, multiply: str, multiply_us: float) -> None:
        read_us = num_bytes / self.hardware.read_bytes_per_us
        terms[read if read_us >= multiply_us else multiply] += max(read_us, multiply_us)

    def _element_bytes(self, rows: int) -> float:
        """What norms, residuals, rotation and gates read and write, in bytes."""
        spec, part = self.footprint.spec, self.footprint.part
        units = part.ffn[1] - part.ffn[0]
        if spec.experts is not None:
            units = spec.experts.num_chosen * (part.expert_ffn[1] - part.expert_ffn[0]) // self.footprint.layout.ep
        return rows * ELEMENT * (8 * spec.hidden_size + 3 * units + 4 * self.footprint.num_heads * spec.value_dim)


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


def _add(terms: Terms, more: Terms, times: int) -> None:
    for name, value in more.items():
        terms[name] += times * value
