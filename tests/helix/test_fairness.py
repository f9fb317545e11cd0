"""Who waits how long: short prompts beside long ones, classes, shared prompts. No model runs; steps are the clock."""

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from math import ceil
from random import Random
from typing import Any

import pytest

from helix.cache.claim import Claim
from helix.cache.control import CacheControl
from helix.cache.keys import BlockKeys
from helix.config import SchedulerConfig
from helix.request import Chunk, RequestOutput, Sequence
from helix.sampling import SamplingParams
from helix.scheduler import AGING, Scheduler
from parallel.placement import BlockCyclic

MILLION = 1_000_000


def request(index: int, tokens: Many[int], made: int = 1, priority: int = 0) -> Sequence:
    return Sequence(
        index=index,
        token_ids=list(tokens),
        prompt_len=len(tokens),
        sampling=SamplingParams(max_tokens=made),
        seed=index,
        max_len=len(tokens) + made,
        output=RequestOutput(None),
        priority=priority,
    )


def own(index: int, prompt_len: int, made: int = 1, priority: int = 0) -> Sequence:
    """A prompt that shares no block with any other."""
    return request(index, [index, *range(prompt_len - 1)], made, priority)


@dataclass
class Run:
    """Steps of a scheduler, counted; by index when a request came and had its first token, and what was computed."""

    scheduler: Scheduler
    now: int = 0
    came: dict[int, int] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, *, kvp: int = 1, block_size: int = 16, num_pages: int = MILLION, **settings: float) -> "Run":
        cache = CacheControl(BlockCyclic(block_size, kvp), num_pages)
        return cls(Scheduler(SchedulerConfig(**settings), cache))  # type: ignore[arg-type]

    def add(self, seq: Sequence) -> None:
        self.came[seq.index] = self.now
        self.scheduler.add(seq)

    def step(self) -> list[Chunk]:
        self.now += 1
        chunks = self.scheduler.schedule().chunks
        assert chunks
        self.scheduler.commit(chunks)
        for chunk in chunks:
            seq = chunk.seq
            self.computed[seq.index] = self.computed.get(seq.index, 0) + chunk.stop - chunk.start
            if chunk.samples:
                self.first.setdefault(seq.index, self.now)
                seq.token_ids.append(len(seq.token_ids))
                if len(seq.token_ids) == seq.max_len:
                    self.scheduler.remove(seq)
                    self.ended.append(seq.index)
        return chunks

    def waited(self, index: int) -> int:
        return self.first[index] - self.came[index]


def steady(run: Run, lengths: Iterator[int]) -> None:
    """Run until the first request has its first token, with another one beside it at every moment."""
    index = 0
    while 0 not in run.first:
        if index in run.first or not index:
            index += 1
            run.add(own(index, next(lengths)))
        run.step()


# --- a short prompt beside a long one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_a_short_prompt_behind_a_million_tokens_waits_for_its_share_of_the_chunks_alone(share: float) -> None:
    run, chunk = Run.of(block_size=256, prefill_chunk=2048, short_prompt_share=share), 2048
    run.add(own(0, MILLION))
    lengths = [1, 100, 511, 513, 5_000, 20_000]
    for index, length in enumerate(lengths, start=1):
        run.step()
        run.add(own(index, length))
        while index not in run.first:
            run.step()
        assert run.waited(index) <= 3 + ceil(length / (share * chunk))
    assert 0 not in run.first


@pytest.mark.parametrize(("share", "length"), [(0.1, 100), (0.25, 3_000), (0.5, 2_000)])
def test_short_prompts_slow_a_long_one_by_their_share_at_most(share: float, length: int) -> None:
    run, chunk = Run.of(block_size=256, prefill_chunk=2048, short_prompt_share=share), 2048
    run.add(own(0, MILLION))
    steady(run, iter(lambda: length, 0))
    assert run.waited(0) <= 1.1 / (1 - share) * ceil(MILLION / chunk)
    assert len(run.first) > 100 * share


def test_prompts_of_one_length_are_computed_one_after_the_other() -> None:
    run = Run.of(prefill_chunk=100)
    for index in range(3):
        run.add(own(index, 200))
    while run.scheduler.has_work:
        run.step()
    assert run.first == {0: 2, 1: 4, 2: 6}


def arrivals(count: int, random: Random) -> list[tuple[int, Sequence]]:
    """(step, request): bursts and gaps, mostly short prompts, some that begin alike, three classes."""
    now, made = 0, []
    stems = [[1_000_000 + stem] * 120 for stem in range(5)]
    for index in range(count):
        now += random.choice([0, 0, 0, 1, 2, 12])
        stem = random.choice(stems)[: random.choice([0, 0, 40, 120])]
        prompt = stem + [index] * random.choice([1, 5, 20, 60, 300])
        made.append((now, request(index, prompt, random.randint(1, 12), random.choice([-1, 0, 0, 1]))))
    return made


def test_of_5_000_arrivals_none_waits_for_more_than_those_before_it_in_order() -> None:
    chunk, share = 64, 16
    run = Run.of(kvp=2, prefill_chunk=chunk, short_prompt_share=share / chunk, max_batch=5_000)
    coming = arrivals(5_000, Random(1))
    ahead: dict[int, int] = {}  # tokens of the prompts before it, when it came, or that came before it in order later
    live: list[Sequence] = []
    for number, (step, seq) in enumerate(coming):
        run.add(seq)
        live = [each for each in live if each.index not in run.first]
        before = [each for each in live if each.order < seq.order]  # type: ignore[operator]
        ahead[seq.index] = seq.prompt_len + sum(each.prompt_len - each.num_computed for each in before)
        for each in live:
            if seq.order < each.order:  # type: ignore[operator]
                ahead[each.index] += seq.prompt_len
        live.append(seq)
        until = coming[number + 1][0] if number + 1 < len(coming) else 1 << 60
        while run.scheduler.has_work and step < until:
            run.step()
            step += 1
    assert len(run.ended) == 5_000
    for index, tokens in ahead.items():
        assert run.waited(index) <= 3 + ceil(tokens / (chunk - share))
    assert max(run.waited(index) for index in ahead) > 50, "they did have to wait"


@pytest.mark.parametrize("steps", [1, 4])
def test_5_000_arrivals_in_few_pages_and_slots_all_end_and_return_every_page(steps: int) -> None:
    run = Run.of(kvp=2, num_pages=24, prefill_chunk=64, max_batch=6, decode_steps_per_chunk=steps)
    for step, seq in arrivals(5_000, Random(2)):
        while run.scheduler.has_work and run.now < step:
            run.step()
        run.add(seq)
    while run.scheduler.has_work:
        run.step()
    cache = run.scheduler.cache
    assert sorted(run.ended) == list(range(5_000)) and cache.counters.preemptions > 50
    assert [cache.num_available(rank) for rank in range(2)] == [24, 24]
    assert len(run.scheduler._free_slots) == 6


def test_who_cannot_begin_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.of(block_size=256, num_pages=1_200, prefill_chunk=512)
    run.add(own(0, 200_000))
    run.add(own(1, 250_000))
    for index in range(2, 40):
        run.add(own(index, 300_000))
    for _ in range(25):
        run.step()
    looked: list[int] = []
    claim = run.scheduler.cache.claim

    def look(keys: BlockKeys, *how: Any, **more: Any) -> Claim:
        looked.append(len(keys.token_ids))
        return claim(keys, *how, **more)

    monkeypatch.setattr(run.scheduler.cache, "claim", look)
    for _ in range(300):
        run.step()
    assert not looked
    run.add(own(40, 100))
    run.step()
    assert looked == [100] and 40 in run.first


# --- classes ----------------------------------------------------------------------------------------------------------


def test_a_higher_class_overtakes_and_a_lower_one_begins_when_it_has_waited_long_enough() -> None:
    run = Run.of(prefill_chunk=64, max_batch=1)
    for index, priority in enumerate((0, -1, 0, 2)):
        run.add(own(index, 10, 3, priority))
    while run.scheduler.has_work:
        run.step()
    assert run.ended == [3, 0, 2, 1]
    run.add(own(0, 10, 1, -1))
    index = 1
    del run.first[0]
    while 0 not in run.first:  # a higher class never lets the slot be empty
        run.add(own(index, 10, 9, 0))
        run.first.pop(index, None)
        while index not in run.first and 0 not in run.first:
            run.step()
        index += 1
    assert AGING <= run.waited(0) <= AGING + 20


def test_who_is_preempted_is_of_the_lowest_class_and_of_these_the_latest() -> None:
    run = Run.of(num_pages=9, block_size=4, prefill_chunk=64)
    for index, priority in enumerate((0, 1, -1, -1)):
        run.add(own(index, 8, 20, priority))
    run.step()
    lost: list[int] = []
    run.scheduler.on_leave = lambda seq: lost.append(seq.index)
    while not run.ended:
        run.step()
    assert lost == [3, 2, 0, 1], "two classes below, the latest of them first, then the middle one; the last has ended"


# --- who shares -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 7, 30])
@pytest.mark.parametrize("longest_first", [False, True])
def test_16_questions_on_a_document_that_is_not_cached_compute_it_once(late: int, longest_first: bool) -> None:
    run = Run.of(kvp=2, prefill_chunk=64)
    document = list(range(1600))
    order = sorted(range(16), reverse=longest_first)
    seqs = [request(index, document + [5_000 + index] * (10 + index), 40) for index in order]
    for number, seq in enumerate(seqs):
        if number == 1:
            for _ in range(late):
                run.step()
        run.add(seq)
    while run.scheduler.has_work:
        run.step()
    assert sum(run.computed.values()) == 1600 + sum(10 + index + 39 for index in range(16))


def test_children_of_one_prompt_fork_where_its_whole_blocks_end() -> None:
    run = Run.of(prefill_chunk=64)
    for index in range(8):
        run.add(request(index, range(16 * 20 + 5), 3))
    while run.scheduler.has_work:
        run.step()
    assert run.computed == {0: 16 * 20 + 5 + 2} | {index: 5 + 2 for index in range(1, 8)}


def test_who_waits_for_a_prompt_that_is_dropped_goes_on_from_what_it_had_computed() -> None:
    run = Run.of(prefill_chunk=64)
    leader, other = request(0, range(640)), request(1, [*range(640), 7])
    run.add(leader)
    run.add(other)
    for _ in range(4):
        run.step()
    assert other.waits_for is not None and not other.blocks.pages
    run.scheduler.remove(leader)
    while run.scheduler.has_work:
        run.step()
    assert run.computed == {0: 256, 1: 385}


def test_a_prompt_that_others_wait_for_is_as_short_as_the_shortest_of_them() -> None:
    run = Run.of(prefill_chunk=64, short_prompt_share=0.25)
    run.add(own(0, 100_000))
    run.add(request(1, [9] * 50_000))
    for _ in range(5):
        run.step()
    run.add(own(2, 30_000))
    run.step()
    assert run.computed[2] == 16, "it is shorter than the second"
    run.add(request(3, [9] * 1_000 + [8]))
    while 3 not in run.first:
        run.step()
    assert run.waited(3) <= 3 + ceil(1_001 / 16)
    assert run.computed[3] < 20


# --- decode rows beside chunks ----------------------------------------------------------------------------------------


def test_a_chunk_comes_beside_every_so_many_steps_of_decode_rows_and_the_others_are_launched_ahead() -> None:
    run = Run.of(prefill_chunk=64, decode_steps_per_chunk=3)
    run.add(own(0, 10, 100))
    run.step()
    run.add(own(1, 640))
    sizes = [sum(chunk.stop - chunk.start for chunk in run.step()) for _ in range(7)]
    assert sizes == [65, 1, 1, 65, 1, 1, 65]
    launched = run.scheduler.schedule()
    ahead = run.scheduler.look_ahead(launched)
    assert ahead is not None and [chunk.seq.index for chunk in ahead.chunks] == [0]
    behind = run.scheduler.look_ahead(ahead)
    assert behind is not None and [chunk.seq.index for chunk in behind.chunks] == [0, 1], "a chunk is due"
