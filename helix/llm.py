"""The Python API: one object a rank, used the same way on every rank.

    llm = LLM(HelixConfig(model=ModelConfig(path=...), parallel=ParallelConfig(kvp=2, tpa=2)))
    outputs = llm.generate(["a prompt", [1, 2, 3], Request(messages=[...])], SamplingParams(max_tokens=64))

Start it under torchrun, or plainly for a world of one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Never

from parallel.launch import Launch, agree, start, stop

from .building import Builder
from .cache.control import CacheControl
from .cache.events import Listener
from .cache.mover import PageMover
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
from .inbox import Inbox
from .interrupts import uninterrupted
from .loop import StepLoop
from .metrics import RunMetrics
from .models.generation_config import with_models_sampling
from .models.tokenizer import end_of_turn_ids
from .prepare import Prepared
from .prompts import Limits, Preparer, Prompt, as_prompts
from .request import RequestOutput, StreamEvent
from .request import Sequence as RunningSequence
from .sampling import SamplingParams
from .scheduler import Scheduler
from .states.checkpoints import StateCheckpoints
from .text import TextReader
from .windows import window_checkpoints, window_control

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

    Collective over the world: every rank makes it and calls it with equal arguments; of prompts rank 0's count. As a
    context manager it closes itself. Ctrl-C in a world of one ends a call between two steps, and the next one runs.

    Args:
        config: the settings of the run.
        prompts: what it will be asked first, where that is known: when none of them can run, that is said at once.

    Raises:
        ValueError: on every rank, in one line, before any model memory is taken, for settings that do not fit the
            world, the model or the machine, for a checkpoint that cannot be read, and when no prompt can run.
        TypeError: in one line, without a ``config`` and for any other keyword.
    """

    def __init__(
        self, config: HelixConfig | None = None, *, prompts: Prompt | Sequence[Prompt] = (), **unknown: Never
    ) -> None:
        if unknown or not isinstance(config, HelixConfig):
            given = ", ".join(f"{name}=" for name in unknown) or f"a {type(config).__name__}"
            raise TypeError(f"LLM takes a HelixConfig, which names model.path, not {given}")
        self._in_use, self._is_closed, began_s = threading.Lock(), False, time.monotonic()
        self.launch: Launch = self._enter(config)
        prepared = Prepared(with_models_sampling(config), self.launch, prompts=as_prompts(prompts))
        self.config = config = prepared.config
        self.spec, self.layout, self.footprint = prepared.spec, prepared.layout, prepared.footprint
        self.dtype, self.tokenizer = prepared.dtype, prepared.tokenizer
        builder = self._builder(prepared)
        self.grid, self.placement = builder.grid, builder.placement
        decoder = builder.decoder()
        self.exchange = builder.exchange(decoder)
        self.runner = builder.runner(decoder, self.exchange)
        self.num_pages = builder.num_pages
        speculator = builder.speculator(self.runner)
        windows = window_control(config, self.spec)
        cache = CacheControl(
            self.placement,
            self.num_pages,
            host_pages=config.cache.host_pages,
            reuse=config.cache.reuse,
            partial_reuse=config.cache.partial_reuse,
            offload_min_priority=config.cache.offload_min_priority,
            checkpoints=window_checkpoints(config, windows) or builder.checkpoints.control(self.num_pages),
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
        _log.info("started in %.1f s", time.monotonic() - began_s)
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
        with self._alone(), _steps():
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
        same or None. Text is there on rank 0 alone. One stream at a time: RuntimeError while another is open, in
        whatever thread, and after ``close``.
        """
        if self._sender is not None:
            raise RuntimeError("a prefill group takes its prompts from the decode group; call serve()")
        if not isinstance(sampling, SamplingParams | None):
            raise TypeError(f"sampling is a {type(sampling).__name__}, must be SamplingParams; a Request has its own")
        with self._alone():
            yield from self._stream(prompts, sampling, on_step)

    def _stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        sampling: SamplingParams | None,
        on_step: Callable[[RunMetrics], None] | None,
    ) -> Iterator[StreamEvent]:
        front = self._front
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
            if not self._is_closed:
                with uninterrupted():
                    front.abort_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other call in meanwhile."""
        self._check_open()
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("another stream of this LLM is open; iterate it to its end or close it first")
        try:
            yield
        finally:
            self._in_use.release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this LLM is closed; make another one")

    def turns(self, source: Source) -> Iterator[list[StreamEvent]]:
        """Run what comes out of rank 0's source, such as an ``Inbox``; yield what is new after every step.

        Collective: every rank iterates it to its end, which comes after a ``Close`` and the last request's. A world
        without work waits for the source.
        """
        door = Door(source, timeout_s=self.config.runtime.timeout_s)
        text = TextReader(self.tokenizer) if self.launch.speaks else None
        turns = StepLoop(self._front, door, text).turns()
        while True:
            self._check_open()
            with _steps(), uninterrupted():
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
        """Leave the other group, where there is one, and the world. Collective; a second call does nothing.

        A stream that is open ends with RuntimeError where it is asked for more.
        """
        if self._is_closed:
            return
        if self._in_use.locked():
            self._front.abort_all()
        self._is_closed = True
        self._grammars.close()
        self._front.close()
        self.runner.release_graphs()
        stop()

    def __enter__(self) -> LLM:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it, whatever ended the block."""
        self.close()

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

    def _builder(self, prepared: Prepared) -> Builder:
        return Builder(prepared)
