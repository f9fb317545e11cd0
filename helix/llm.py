"""The Python API: one object a rank, used the same way on every rank.

    llm = LLM(HelixConfig(model=ModelConfig(path=...), parallel=ParallelConfig(kvp=2, tpa=2)))
    outputs = llm.generate(["a prompt", [1, 2, 3], Request(messages=[...])], SamplingParams(max_tokens=64))

Start it under torchrun, or plainly for a world of one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from attention.exchange import Exchange, Heads, make_exchange
from attention.pages import PageLayout
from attention.partial import PartialAttention
from parallel.all_reduce_norm import AllReduceNorm
from parallel.grid import HelixGrid
from parallel.launch import Launch, agree, minimum, start, stop
from parallel.placement import BlockCyclic
from parallel.sharded_argmax import ShardedArgmax
from parallel.symmetric import Faults, shares_memory

from .cache.control import CacheControl
from .cache.events import Listener
from .cache.mover import PageMover
from .cache.pages import PagedCache, free_bytes, page_layout
from .callbacks import Callback
from .commands import Add
from .config import HelixConfig
from .door import Door, Source
from .engine import Engine
from .feed import PromptFeed
from .front import Front
from .grammar.compiling import GrammarCompiler
from .grammar.masks import Masks
from .grammar.matching import Matchers
from .graphs import buckets_up_to
from .inbox import Inbox
from .loop import StepLoop
from .metrics import RunMetrics
from .models.decoder import Decoder
from .models.eagle import EagleDecoder
from .models.generation_config import with_models_sampling
from .models.kinds import FULL
from .models.loading import fill
from .models.next_decoder import NextDecoder
from .models.query_share import QueryGather, make_query_gather
from .models.tokenizer import end_of_turn_ids
from .models.weights import part_of
from .prepare import Prepared
from .prompts import Limits, Preparer, Prompt, as_prompts
from .request import RequestOutput, StreamEvent
from .request import Sequence as RunningSequence
from .runner import Runner
from .sampler import Sampler
from .sampling import SamplingParams
from .scheduler import Scheduler
from .states.cache import StateCache
from .states.checkpoints import CheckpointPlan, StateCheckpoints
from .text import TextReader
from .windows import window_checkpoints, window_control, window_pages

if TYPE_CHECKING:
    from .transfer.receiver import Receiver
    from .transfer.sender import Sender

_log = logging.getLogger(__name__)


def enter(config: HelixConfig) -> Launch:
    """Join this rank's world: the launched one, or its part of it where ``transfer.prefill_ranks`` splits it.

    Collective over the launched world; calling it again changes nothing.
    """
    runtime = config.runtime
    return start(runtime.device, timeout_s=runtime.timeout_s, split=config.transfer.prefill_ranks)


@contextmanager
def _steps() -> Iterator[None]:
    """Take care that no ValueError comes out of a step: settings and prompts were checked before, so it is a defect."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"a step failed: {error}") from error


class LLM:
    """A model spread over the world's ranks, ready to generate.

    Collective over the world: every rank makes it and calls it with equal arguments; of prompts rank 0's count.

    Args:
        config: the settings of the run.
        prompts: what it will be asked first, where that is known: when none of them can run, that is said at once.

    Raises:
        ValueError: on every rank, in one line, before any model memory is taken, for settings that do not fit the
            world, the model or the machine, for a checkpoint that cannot be read, and when no prompt can run.
    """

    def __init__(self, config: HelixConfig, *, prompts: Prompt | Sequence[Prompt] = ()) -> None:
        self.launch: Launch = self._enter(config)
        prepared = Prepared(with_models_sampling(config), self.launch, prompts=as_prompts(prompts))
        self.config = config = prepared.config
        self.spec, self.layout = prepared.spec, prepared.layout
        self.dtype, self.tokenizer = prepared.dtype, prepared.tokenizer
        self.placement = BlockCyclic(config.cache.block_size, self.layout.kvp)
        self._drafting, self._pdl, self._in_8_bits = prepared.drafting, prepared.pdl, prepared.in_8_bits
        self.footprint = prepared.footprint
        self.grid = self._make_grid()
        self.faults = Faults(self.launch.device) if self.launch.device.type == "cuda" else None
        decoder = self._make_decoder(prepared.attention)
        agree(lambda: fill(decoder, prepared.checkpoint))
        self._drafting.load_weights(
            decoder, prepared.attention, in_8_bits=self._in_8_bits, faults=self.faults, pdl=self._pdl
        )
        heads = Heads(
            decoder.num_heads,
            self.spec.value_dim,
            self.dtype,
            self.launch.device,
            num_layers=len(self.spec.layers_of(FULL)),
        )
        self.exchange = self._make_exchange(heads)
        self._checkpoints = CheckpointPlan.of(config.cache, self.footprint, 1 + self._drafting.max_draft_len)
        self.runner, self.num_pages = self._make_runner(decoder, prepared.eos_token_ids)
        speculator = self._drafting.make_speculator(self.num_pages * self.layout.kvp, self.runner)
        if self.faults is not None and config.runtime.graphs:
            buckets = buckets_up_to(config.scheduler.max_batch)
            self.runner.capture(speculator.schedule.reachable(buckets) if speculator is not None else ())
        if self.faults is not None and self.runner.sampler is not None:
            self.runner.sampler.warm_up()
        windows = window_control(config, self.spec)
        cache = CacheControl(
            self.placement,
            self.num_pages,
            host_pages=config.cache.host_pages,
            reuse=config.cache.reuse,
            partial_reuse=config.cache.partial_reuse,
            offload_min_priority=config.cache.offload_min_priority,
            checkpoints=window_checkpoints(config, windows) or self._checkpoints.control(self.num_pages),
        )
        self.vocabulary = prepared.vocabulary
        masks = Masks(Matchers(self.vocabulary) if self.launch.speaks else None, self.spec.vocab_size)
        self.engine = Engine(
            Scheduler(config.scheduler, cache, recomputed=int(self.spec.looks_further), windows=windows),
            self.runner,
            agree(
                lambda: PageMover(
                    self.runner.cache,
                    config.cache.host_pages,
                    self.grid.kvp_rank,
                    states=StateCheckpoints.of(decoder.states, cache.checkpoints),
                )
            ),
            speculator=speculator,
            masks=masks,
            eos_token_ids=prepared.eos_token_ids,
            look_ahead=config.runtime.look_ahead,
            check_ranks=config.runtime.check_ranks,
        )
        limits = Limits(self.spec.max_position, self.placement, self.num_pages, config.scheduler.max_logprobs)
        turn_ends = [each for each in end_of_turn_ids(self.tokenizer) if each not in prepared.eos_token_ids]
        self._grammars = GrammarCompiler(self.vocabulary)
        self.preparer = Preparer(
            prepared.prompts,
            limits,
            has_tokenizer=self.tokenizer is not None,
            end_of_turn_ids=turn_ends,
            grammars=self._grammars,
            admit=masks.admit,
        )
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        if config.transfer.enabled:
            self._meet()

    @property
    def prefills(self) -> bool:
        """True in a prefill group, which serves another group: call ``serve``; nothing else runs there."""
        return self.config.transfer.prefills(self.launch.part)

    @property
    def _front(self) -> Front:
        return self._receiver or self.engine

    def serve(self) -> None:
        """Compute what the decode group asks for until it is closed. Collective over a prefill group.

        Raises:
            OSError: when the decode group is gone.
        """
        if self._sender is None:
            raise RuntimeError("only a prefill group serves; see transfer.role and transfer.prefill_ranks")
        with _steps():
            self._sender.run()

    @property
    def metrics(self) -> RunMetrics:
        """The figures of the last call of ``generate`` or ``stream``."""
        return self.engine.metrics

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        sampling: SamplingParams | None = None,
        *,
        on_step: Callable[[RunMetrics], None] | None = None,
    ) -> list[RequestOutput]:
        """Run all prompts, or a single one, to their end and return their outputs, in the prompts' order.

        Collective: rank 0's prompts count, other ranks pass the same or None. All get the same outputs, but for the
        text, which is empty above rank 0. A prompt that cannot run fails alone, with finish_reason "error".
        ``on_step`` is called on this rank after every step, to show progress; what it raises is logged.
        """
        outputs = {
            event.index: event.output
            for event in self.stream(prompts, sampling, on_step=on_step)
            if event.output is not None
        }
        return [outputs[index] for index in range(len(outputs))]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        sampling: SamplingParams | None = None,
        *,
        on_step: Callable[[RunMetrics], None] | None = None,
    ) -> Iterator[StreamEvent]:
        """Yield new tokens as they are made; the last event of each prompt carries its output.

        Collective: every rank iterates it to its end or to the same event; rank 0's prompts count, other ranks pass the
        same or None. Text is there on rank 0 alone. One stream at a time: RuntimeError while another is open.
        """
        if self._sender is not None:
            raise RuntimeError("a prefill group takes its prompts from the decode group; call serve()")
        front = self._front
        if front.has_work:
            raise RuntimeError("another stream of this LLM is open; iterate it to its end or close it first")
        progress = None if on_step is None else Callback(on_step)
        metrics = front.reset_metrics()
        began = time.perf_counter()
        source: Source = Inbox()  # nobody reads another rank's
        if self.launch.speaks:
            if prompts is None:
                raise ValueError("prompts = None is for the other ranks: rank 0's prompts count")
            settings, num_waiting = sampling or self.config.sampling, self.config.scheduler.max_batch
            source = PromptFeed(as_prompts(prompts), settings, self.preparer, front, num_waiting)
        try:
            for number, events in enumerate(self.turns(source)):
                metrics.elapsed_s = time.perf_counter() - began
                if progress is not None and number:
                    progress(metrics)
                yield from events
        finally:
            front.abort_all()

    def turns(self, source: Source) -> Iterator[list[StreamEvent]]:
        """Run what comes out of rank 0's source, such as an ``Inbox``; yield what is new after every step.

        Collective: every rank iterates it to its end, which comes after a ``Close`` and the last request's. A world
        without work waits for the source.
        """
        door = Door(source, timeout_s=self.config.runtime.timeout_s)
        text = TextReader(self.tokenizer) if self.launch.speaks else None
        turns = StepLoop(self._front, door, text).turns()
        while True:
            with _steps():
                events = next(turns, None)
            if events is None:
                return
            yield events

    @property
    def trouble(self) -> str:
        """What is wrong with the other group of a transfer, and what becomes of requests; empty where nothing is."""
        return self._front.trouble

    def admit(self, add: Add) -> Add:
        """Take what rank 0 alone keeps of a request out of a command that is to enter. On rank 0, from any thread."""
        return self.preparer.admit(add)

    def find(self, index: int) -> RunningSequence | None:
        """Return the sequence of an index while it waits or runs; the same on every rank."""
        return self._front.find(index)

    def listen(self, listener: Listener) -> None:
        """Call a function on this rank with every block that is stored, removed or moved from now on.

        It first hears of the blocks that are cached already. All ranks have the same events in the same order; any
        rank may listen, alone or not. What it raises in a step is logged, and it hears no more.
        """
        self.engine.scheduler.cache.listen(listener)

    def unlisten(self, listener: Listener) -> None:
        """Stop calling a function that listens."""
        self.engine.scheduler.cache.unlisten(listener)

    def close(self) -> None:
        """Leave the other group, where there is one, and the world. Collective."""
        self._grammars.close()
        self._front.close()
        self.runner.release_graphs()
        stop()

    def _meet(self) -> None:
        """Connect to the other group of a transfer."""
        from .transfer.meeting import Group, meet_decode_group, meet_prefill_group

        group = Group(self.config, self.launch, self.layout, self.spec, self.engine)
        if self.prefills:
            self._sender = meet_decode_group(group, self.preparer.prepare)
        else:
            self._receiver = meet_prefill_group(group)

    def _enter(self, config: HelixConfig) -> Launch:
        return enter(config)

    def _make_grid(self) -> HelixGrid:
        return HelixGrid.create(self.layout)

    def _make_exchange(self, heads: Heads) -> Exchange:
        return make_exchange(
            self.config.attention.exchange,
            group=self.grid.kvp_group,
            heads=heads,
            faults=self.faults,
            timeout_s=self.config.runtime.timeout_s,
            pdl=self._pdl,
        )

    def _make_query_gather(self, *, near: bool) -> QueryGather | None:
        return make_query_gather(
            self.config.attention.split_query_rows,
            self.spec,
            self.grid,
            dtype=self.dtype,
            device=self.launch.device,
            near=near,
            faults=self.faults,
            timeout_s=self.config.runtime.timeout_s,
            pdl=self._pdl,
        )

    def _make_decoder(self, attention: PartialAttention) -> Decoder:
        """Make this rank's model; its collectives are fused where all ranks share GPU memory."""
        near = minimum(int(shares_memory(self.grid.world_group, self.launch.device))) == 1
        reduce_norm = AllReduceNorm(
            self.grid.world_group,
            hidden_size=self.spec.hidden_size,
            dtype=self.dtype,
            device=self.launch.device,
            fused=near,
            faults=self.faults,
            timeout_s=self.config.runtime.timeout_s,
            pdl=self._pdl,
        )
        part = part_of(self.spec, self.layout, self.launch.rank)
        argmax = ShardedArgmax(
            self.grid.world_group,
            vocab=part.vocab,
            vocab_size=self.spec.vocab_size,
            device=self.launch.device,
            fused=near,
            faults=self.faults,
            timeout_s=self.config.runtime.timeout_s,
        )
        attention_config = self.config.attention
        workspace = None
        if attention_config.expand_rows:
            workspace = attention_config.workspace_tokens, self._page_layout(part.kv_heads[1] - part.kv_heads[0])
        make: Callable[..., Decoder] = NextDecoder if self.spec.predicts_next else Decoder
        if self._drafting.head is not None:
            make = partial(EagleDecoder, head=self._drafting.head)
        return make(
            self.spec,
            self.grid,
            dtype=self.dtype,
            device=self.launch.device,
            attention=attention,
            reduce_norm=reduce_norm,
            argmax=argmax,
            query_gather=self._make_query_gather(near=near),
            workspace=workspace,
            states=StateCache.for_model(
                self.spec,
                part.value_heads,
                num_slots=self.config.scheduler.max_batch,
                max_run=1 + self._drafting.max_draft_len,
                dtype=self.dtype,
                device=self.launch.device,
            ),
            windows=window_pages(
                self.config, self.spec, part, dtype=self.dtype, device=self.launch.device, in_8_bits=self._in_8_bits
            ),
            pdl=self._pdl,
        )

    def _page_layout(self, num_kv_heads: int) -> PageLayout:
        block_size = self.config.cache.block_size
        return page_layout(self.spec, num_kv_heads, block_size, self.dtype, in_8_bits=self._in_8_bits)

    def _make_runner(self, decoder: Decoder, eos_token_ids: tuple[int, ...]) -> tuple[Runner, int]:
        """Make the runner and the pages it runs on: as many as asked for, or as fit on every rank."""
        cache, scheduler = self.config.cache, self.config.scheduler
        layout = self._page_layout(decoder.num_kv_heads)

        def paged_cache(num_pages: int) -> PagedCache:
            return PagedCache(
                layout, num_layers=self.spec.num_cached_layers, num_pages=num_pages, device=self.launch.device
            )

        runner = Runner(
            decoder,
            self.exchange,
            paged_cache(1),
            self.placement,
            max_batch=scheduler.max_batch,
            max_len=self.spec.max_position,
            share_qkv_rows=self.config.attention.share_qkv_rows,
            expand_rows=self.config.attention.expand_rows,
            faults=self.faults,
            sampler=Sampler(decoder, max_batch=scheduler.max_batch, eos_token_ids=eos_token_ids),
            max_draft_len=self._drafting.max_draft_len,
        )
        num_choices = scheduler.max_batch * (1 + self._drafting.max_draft_len)
        runner.compile_steps(scheduler.prefill_chunk + num_choices)
        num_pages = cache.num_pages
        if num_pages is None:
            if self.launch.device.type == "cuda":
                runner.warm_up(scheduler.prefill_chunk + num_choices, num_choices)
            free = free_bytes(self.launch.device, cache.memory_fraction, self.launch.local_world_size)
            # a draft model's cache holds as many tokens
            beside = self.layout.kvp * self._drafting.page_bytes + self._checkpoints.page_bytes
            fitting = minimum(self.footprint.num_pages(free, page_bytes_beside=beside))
            num_pages = min(fitting, scheduler.max_batch * self.footprint.pages_of(self.spec.max_position))
            if num_pages < 1:
                raise ValueError(
                    f"cache.memory_fraction = {cache.memory_fraction} leaves no memory for one page of "
                    f"{self.footprint.page_bytes + beside} bytes on some rank; raise it or spread the model over more "
                    "ranks"
                )
            tokens = self.footprint.max_tokens(num_pages)
            _log.info("cache.num_pages: %d a rank, %d tokens in all", num_pages, tokens)
        runner.cache = agree(lambda: paged_cache(num_pages))
        return runner, num_pages
