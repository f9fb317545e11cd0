"""How a rank's parts are made of what was settled before: groups, exchange, model, runner, and the pages it runs on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from attention.exchange import Exchange, Heads, make_exchange
from attention.pages import PageLayout
from parallel.all_reduce_norm import AllReduceNorm
from parallel.grid import HelixGrid
from parallel.launch import agree, minimum
from parallel.placement import BlockCyclic
from parallel.sharded_argmax import ShardedArgmax
from parallel.symmetric import Faults, shares_memory

from .cache.pages import PagedCache, free_bytes, page_layout
from .graphs import buckets_up_to
from .models.decoder import Decoder
from .models.eagle import EagleDecoder
from .models.kinds import FULL
from .models.loading import fill
from .models.next_decoder import NextDecoder
from .models.query_share import QueryGather, make_query_gather
from .models.weights import part_of
from .prepare import Prepared
from .rehearsal import compile_steps, warm_up
from .runner import Runner
from .sampler import Sampler
from .speculative.speculator import Speculator
from .stages import begin
from .states.cache import StateCache
from .states.checkpoints import CheckpointPlan
from .windows import window_pages

_log = logging.getLogger(__name__)


class Builder:
    """Makes the parts of one rank. Collective over the world: every rank makes it and calls it alike.

    Args:
        prepared: what was settled.

    Attributes:
        grid: this rank's groups.
        placement: which rank owns which block.
        faults: where kernels note what they waited for in vain; None without a GPU.
        checkpoints: room for states that later prompts go on from.
        num_pages: pages of the cache on each rank, once ``runner`` has returned.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._config, self._spec, self._drafting = prepared.config, prepared.spec, prepared.drafting
        self._device, self._most_drafts = prepared.launch.device, prepared.config.speculative.most_drafts
        self.placement = BlockCyclic(self._config.cache.block_size, prepared.layout.kvp)
        self.grid = self.make_grid()
        self.faults = Faults(self._device) if self._device.type == "cuda" else None
        self.checkpoints = CheckpointPlan.of(self._config.cache, prepared.footprint, 1 + self._most_drafts)
        self.num_pages = 0

    # --- what a rank without others makes in another way --------------------------------------------------------------

    def make_grid(self) -> HelixGrid:
        """Make this rank's groups."""
        return HelixGrid.create(self._prepared.layout)

    def make_exchange(self, heads: Heads) -> Exchange:
        """Make what turns partials of all heads into own heads' outputs."""
        return make_exchange(
            self._config.attention.exchange,
            group=self.grid.kvp_group,
            heads=heads,
            faults=self.faults,
            timeout_s=self._config.runtime.timeout_s,
            pdl=self._prepared.pdl,
        )

    def make_query_gather(self, *, near: bool) -> QueryGather | None:
        """Make what gathers queries whose projections the KVP ranks share; ``near`` where they share memory."""
        return make_query_gather(
            self._config.attention.split_query_rows,
            self._spec,
            self.grid,
            dtype=self._prepared.dtype,
            device=self._device,
            near=near,
            faults=self.faults,
            timeout_s=self._config.runtime.timeout_s,
            pdl=self._prepared.pdl,
        )

    # --- model, runner, drafter ---------------------------------------------------------------------------------------

    def decoder(self) -> Decoder:
        """Make this rank's model with its weights, and the drafter's; collectives are fused where GPUs share memory."""
        decoder = self._empty_decoder()
        agree(lambda: fill(decoder, self._prepared.checkpoint))
        self._drafting.load_weights(
            decoder,
            self._prepared.attention,
            in_8_bits=self._prepared.in_8_bits,
            faults=self.faults,
            pdl=self._prepared.pdl,
        )
        return decoder

    def exchange(self, decoder: Decoder) -> Exchange:
        """Make the exchange of the layers that are sharded along the sequence."""
        num_layers = len(self._spec.layers_of(FULL))
        return self.make_exchange(
            Heads(decoder.num_heads, self._spec.value_dim, self._prepared.dtype, self._device, num_layers=num_layers)
        )

    def runner(self, decoder: Decoder, exchange: Exchange) -> Runner:
        """Make the runner and the pages it runs on: as many as asked for, or as fit on every rank.

        Raises:
            ValueError: where not one page fits.
        """
        scheduler = self._config.scheduler
        runner = Runner(
            decoder,
            exchange,
            self._paged_cache(decoder, 1),
            self.placement,
            max_batch=scheduler.max_batch,
            max_len=self._spec.max_position,
            share_qkv_rows=self._config.attention.share_qkv_rows,
            expand_rows=self._config.attention.expand_rows,
            faults=self.faults,
            sampler=Sampler(decoder, max_batch=scheduler.max_batch, eos_token_ids=self._prepared.eos_token_ids),
            max_draft_len=self._most_drafts,
        )
        num_choices = scheduler.max_batch * (1 + self._most_drafts)
        if self._device.type == "cuda":
            begin("compiling kernels")
        compile_steps(runner, scheduler.prefill_chunk + num_choices)
        if self._device.type == "cuda":  # also where pages are given: the first prompt finds libraries loaded
            begin("measuring the memory of a step")
            warm_up(runner, scheduler.prefill_chunk + num_choices, num_choices)
        self.num_pages = self._config.cache.num_pages or self._fitting_pages()
        runner.cache = agree(lambda: self._paged_cache(decoder, self.num_pages))
        return runner

    def speculator(self, runner: Runner) -> Speculator | None:
        """Make the drafter, capture the graphs of decode steps, and run the sampler's kernels once."""
        config, sampler = self._config, runner.sampler
        speculator = self._drafting.make_speculator(self.num_pages * self._prepared.layout.kvp, runner)
        if self.faults is not None and config.runtime.graphs:
            begin("capturing graphs")
            buckets = buckets_up_to(config.scheduler.max_batch)
            runner.capture(speculator.schedule.reachable(buckets) if speculator is not None else ())
        if self.faults is not None and sampler is not None:
            sampler.warm_up()
        return speculator

    # --- their pieces -------------------------------------------------------------------------------------------------

    def _empty_decoder(self) -> Decoder:
        prepared, attention = self._prepared, self._config.attention
        near = minimum(int(shares_memory(self.grid.world_group, self._device))) == 1
        part = part_of(self._spec, prepared.layout, prepared.launch.rank)
        workspace = None
        if attention.expand_rows:
            tokens = prepared.footprint.workspace_tokens(attention.workspace_tokens)
            workspace = tokens, self._page_layout(part.kv_heads[1] - part.kv_heads[0])
        make: Callable[..., Decoder] = NextDecoder if self._spec.predicts_next else Decoder
        if self._drafting.head is not None:
            make = partial(EagleDecoder, head=self._drafting.head)
        return make(
            self._spec,
            self.grid,
            dtype=prepared.dtype,
            device=self._device,
            attention=prepared.attention,
            reduce_norm=AllReduceNorm(
                self.grid.world_group,
                hidden_size=self._spec.hidden_size,
                dtype=prepared.dtype,
                device=self._device,
                fused=near,
                faults=self.faults,
                timeout_s=self._config.runtime.timeout_s,
                pdl=prepared.pdl,
            ),
            argmax=ShardedArgmax(
                self.grid.world_group,
                vocab=part.vocab,
                vocab_size=self._spec.vocab_size,
                device=self._device,
                fused=near,
                faults=self.faults,
                timeout_s=self._config.runtime.timeout_s,
            ),
            query_gather=self.make_query_gather(near=near),
            workspace=workspace,
            states=StateCache.for_model(
                self._spec,
                part.value_heads,
                num_slots=self._config.scheduler.max_batch,
                max_run=1 + self._most_drafts,
                dtype=prepared.dtype,
                device=self._device,
                transfers=self._config.transfer.enabled,
            ),
            windows=window_pages(
                self._config,
                self._spec,
                part,
                dtype=prepared.dtype,
                device=self._device,
                in_8_bits=prepared.in_8_bits,
            ),
            pdl=prepared.pdl,
        )

    def _page_layout(self, num_kv_heads: int) -> PageLayout:
        block_size, prepared = self._config.cache.block_size, self._prepared
        return page_layout(self._spec, num_kv_heads, block_size, prepared.dtype, in_8_bits=prepared.in_8_bits)

    def _paged_cache(self, decoder: Decoder, num_pages: int) -> PagedCache:
        layout = self._page_layout(decoder.num_kv_heads)
        return PagedCache(layout, num_layers=self._spec.num_cached_layers, num_pages=num_pages, device=self._device)

    def _fitting_pages(self) -> int:
        """Return how many pages fit beside what is there, on every rank, and no more than the most that can be used."""
        launch, footprint = self._prepared.launch, self._prepared.footprint
        cache, scheduler = self._config.cache, self._config.scheduler
        free = free_bytes(self._device, cache.memory_fraction, launch.local_world_size)
        # a draft model's cache holds as many tokens
        beside = self._prepared.layout.kvp * self._drafting.page_bytes + self.checkpoints.page_bytes
        fitting = minimum(footprint.num_pages(free, page_bytes_beside=beside))
        num_pages = min(fitting, scheduler.max_batch * footprint.pages_of(self._spec.max_position))
        if num_pages < 1:
            raise ValueError(
                f"cache.memory_fraction = {cache.memory_fraction} leaves no memory for one page of "
                f"{footprint.page_bytes + beside} bytes on some rank; raise it or spread the model over more ranks"
            )
        tokens = footprint.max_tokens(num_pages)
        _log.info("cache.num_pages: %d a rank, %d tokens in all", num_pages, tokens)
        return num_pages
