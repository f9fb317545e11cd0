"""What others do beyond plain TP: attention data-parallel over groups of ranks, the feed-forward over all of them.

Helix does not run this; it is modelled to compare with. Each group of ``tpa`` ranks keeps sequences of its own, whole,
and all of attention's weights among its ranks. Experts are spread over all ranks, which tokens reach and leave by an
all-to-all each; a dense feed-forward is split over all ranks between an all-gather and a reduce-scatter. Where a detail
could go either way, it is counted in favour of this layout: shared experts are split like a dense feed-forward and
nothing is added for it, experts are chosen evenly, and every group takes its share of any batch at once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

from parallel.layout import Layout

from .cost import ATTENTION_ROLES, ELEMENT, CostModel, Terms, Time
from .footprint import Footprint, LayerKind, Matrix
from .planner import Setup


@dataclass(frozen=True)
class DataParallel:
    """The cost of ``gpus`` ranks in groups of ``tpa``.

    Raises:
        ValueError: when a part is first used, where the sizes do not fit the model.
    """

    setup: Setup
    gpus: int
    tpa: int = 1

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.gpus // self.tpa

    @cached_property
    def attention(self) -> CostModel:
        """A group by itself."""
        return self.setup.cost_of(Layout(tpa=self.tpa))

    @cached_property
    def feed_forward(self) -> CostModel:
        """All ranks, of which only what is no attention counts."""
        has_experts = self.setup.spec.experts is not None
        return self.setup.cost_of(Layout(tpa=self.gpus, ep=self.gpus if has_experts else 1))

    def most(self, context: int) -> int:
        """Return how many sequences of a context the caches of all groups hold.

        Raises:
            ValueError: when the weights leave no memory.
        """
        own = self.attention.footprint
        kept = _HeldApart(own.spec, own.layout, own.storage, own.block_size, others=self.feed_forward.footprint)
        self.setup.num_pages(kept)
        return self.setup.max_sequences(kept, context) * self.groups

    def decode(self, context: int, batch: int) -> Time:
        """Return the time of a decode step of ``batch`` sequences of ``context`` tokens, evenly over the groups."""
        hw, own, all_ranks = self.setup.hardware, self.attention, self.feed_forward
        mine, terms = math.ceil(batch / self.groups), defaultdict[str, float](float)
        for kind, other in zip(own.footprint.layers, all_ranks.footprint.layers, strict=True):
            layer: Terms = defaultdict(float)
            own.add_products(layer, _only(kind, attention=True), mine, shared=False)
            all_ranks.add_products(layer, _only(other, attention=False), batch, shared=False)
            own.add_bounded(layer, kind, context, mine)
            layer["launches"] = all_ranks.launch_us(other, batch) + hw.merge_us
            layer["all-reduce"] = own.all_reduce_us(mine, self.tpa)
            if other.has_experts:
                layer["exchange"] = 2 * self._all_to_all_us(mine / self.tpa)
            else:
                layer["all-reduce"] += all_ranks.all_reduce_us(batch, self.gpus)
            for name, value in layer.items():
                terms[name] += kind.count * value
        all_ranks.add_ends(terms, batch)
        own.add_attention(terms, rows_times_tokens=mine * context, read_tokens=mine * context)
        return Time(dict(terms))

    def _all_to_all_us(self, rows: float) -> float:
        """Tokens of a rank to their experts, or back: as the exchange, and each row to each of its experts."""
        hw, experts = self.setup.hardware, self.setup.spec.experts
        if self.gpus == 1 or experts is None:
            return 0.0
        away = (self.gpus - 1) / self.gpus
        sent = rows * min(experts.num_chosen, self.gpus) * away * self.setup.spec.hidden_size * ELEMENT
        inside = min(self.gpus, hw.domain)
        us = hw.exchange_us + hw.exchange_peer_us * (inside - 2) + sent / hw.link_bytes_per_us
        return us if self.gpus <= hw.domain else us + hw.network_us + sent / hw.network_bytes_per_us


@dataclass(frozen=True)
class _HeldApart(Footprint):
    """What a rank keeps: attention of its group, and the rest of all ranks."""

    others: Footprint | None = None

    @cached_property
    def weights_bytes(self) -> int:
        assert self.others is not None
        layers = sum(
            kind.count * sum(matrix.num_bytes for matrix in _only(kind, attention=whose is self).matrices.values())
            for whose in (self, self.others)
            for kind in whose.layers
        )
        return layers + sum(matrix.num_bytes for matrix in self.others.top.values())


def _only(kind: LayerKind, *, attention: bool) -> LayerKind:
    """Return a layer with attention's matrices alone, or with the others."""
    kept: dict[str, Matrix] = {
        role: matrix for role, matrix in kind.matrices.items() if (role in ATTENTION_ROLES) == attention
    }
    return replace(kind, matrices=kept, has_experts=kind.has_experts and not attention)
