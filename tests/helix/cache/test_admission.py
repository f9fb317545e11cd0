"""Admission in two phases: what is promised to any request of a batch is what it reuses, and the budget holds."""

from collections.abc import Callable, Iterable
from random import Random

import pytest

from helix.ahead import Ahead
from helix.cache.claim import Claim
from helix.cache.control import CacheControl
from helix.cache.keys import BlockKeys
from helix.config import SchedulerConfig
from helix.fair_share import Due
from helix.request import RequestOutput, Sequence
from helix.sampling import SamplingParams
from helix.scheduler import Scheduler, Step
from helix.waiting import WaitingLine
from parallel.placement import BlockCyclic

A, B, C = list(range(100, 200)), list(range(200, 300)), list(range(300, 400))


class LineOfOne(WaitingLine):
    def choose(self, dues: list[Due], running: Iterable[Sequence], num_slots: int) -> list[tuple[Sequence, Claim]]:
        return [(seq, self.claim(seq)) for seq in self.seqs[:1]]


class OneByOne(Scheduler):
    """The test double: each request is matched and admitted before the next is looked at."""

    def __init__(self, config: SchedulerConfig, cache: CacheControl) -> None:
        super().__init__(config, cache)
        self._line = LineOfOne(cache, self._divided, recomputed=0)

    def _admit_waiting(self, step: Step, ahead: Ahead) -> None:
        num_admitted = -1
        while num_admitted < len(step.admitted):
            num_admitted = len(step.admitted)
            super()._admit_waiting(step, ahead)


def sequence(index: int, tokens: list[int], made: int = 1) -> Sequence:
    return Sequence(
        index=index,
        token_ids=list(tokens),
        prompt_len=len(tokens),
        sampling=SamplingParams(max_tokens=made),
        seed=0,
        max_len=len(tokens) + made,
        output=RequestOutput(None),
    )


def make(
    kind: Callable[..., Scheduler] = Scheduler, *, num_pages: int, prefill_chunk: int = 64, kvp: int = 1, **cache: int
) -> Scheduler:
    control = CacheControl(BlockCyclic(4, kvp), num_pages, **cache)  # type: ignore[arg-type]
    return kind(SchedulerConfig(max_batch=8, prefill_chunk=prefill_chunk), control)


def run(scheduler: Scheduler, *sequences: Sequence) -> list[Step]:
    """Run sequences that arrive together to their end."""
    for seq in sequences:
        scheduler.add(seq)
    steps = []
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step.chunks
        steps.append(step)
        scheduler.commit(step.chunks)
        for chunk in step.chunks:
            if chunk.samples:
                chunk.seq.token_ids.append(chunk.seq.index)
                if len(chunk.seq.token_ids) == chunk.seq.max_len:
                    scheduler.remove(chunk.seq)
    return steps


def first_chunks(step: Step) -> dict[int, tuple[int, int]]:
    return {chunk.seq.index: (chunk.start, chunk.stop) for chunk in step.chunks}


def promised(scheduler: Scheduler, seq: Sequence) -> int:
    """What a claim finds now."""
    claim = scheduler.cache.claim(BlockKeys(seq.token_ids, 4))
    scheduler.cache.drop(claim)
    return claim.num_tokens


def test_two_phases_keep_the_reuse_that_admission_one_by_one_loses() -> None:
    """One prompt that shares nothing, one that begins with the oldest blocks, and room for both and no more."""
    outcome = {}
    for kind in (Scheduler, OneByOne):
        scheduler = make(kind, num_pages=8, prefill_chunk=32)
        run(scheduler, sequence(0, A[:13]))
        run(scheduler, sequence(1, C[:13]))
        arriving = [sequence(2, B[:15]), sequence(3, A[:12] + B[50:53])]
        expected = sum(len(seq.token_ids) - promised(scheduler, seq) for seq in arriving)
        for seq in arriving:
            scheduler.add(seq)
        step = scheduler.schedule()
        wanted = sum(len(seq.token_ids) - seq.num_computed for seq in step.admitted)
        outcome[kind] = (expected, wanted, len(step.admitted))
    assert outcome[Scheduler] == (18, 18, 2)
    assert outcome[OneByOne] == (18, 30, 2), "the double is there to show the race; does it still?"


def test_who_does_not_fit_waits_whole_and_nobody_overtakes() -> None:
    scheduler = make(num_pages=8)
    long = sequence(0, A[:16], made=4)
    scheduler.add(long)
    scheduler.commit(scheduler.schedule().chunks)
    long.token_ids.append(0)
    for seq in (sequence(1, A[:12] + B[:20]), sequence(2, A[:12] + C[:3])):
        scheduler.add(seq)
    step = scheduler.schedule()
    assert [chunk.seq.index for chunk in step.chunks] == [0]
    assert [seq.index for seq in scheduler.waiting] == [1, 2]
    assert scheduler.cache.occupancy()[0]["held"] == 5, "no claim is left behind"


def test_a_claim_behind_gives_way_to_the_request_in_front() -> None:
    scheduler = make(num_pages=6)
    run(scheduler, sequence(0, A[:20]))
    for seq in (sequence(1, B[:20]), sequence(2, A[:20])):
        scheduler.add(seq)
    assert first_chunks(scheduler.schedule()) == {1: (0, 20)}, "A's blocks are in the way, and nothing else runs"


@pytest.mark.parametrize("kvp", [1, 2, 4])
@pytest.mark.parametrize("host_pages", [0, 6])
def test_the_budget_is_never_exceeded_and_everything_ends(kvp: int, host_pages: int) -> None:
    random = Random(kvp)
    stem = [random.randrange(9) for _ in range(40)]
    scheduler = make(num_pages=-(-48 // 4 // kvp) + 2, prefill_chunk=16, kvp=kvp, host_pages=host_pages)
    for turn in range(6):
        arriving = []
        for index in range(12):
            cut = random.randint(0, 40)
            tail = [random.randrange(9) for _ in range(random.randint(1, 41 - cut))]
            arriving.append(sequence(index, stem[:cut] + tail, made=random.randint(1, 6)))
        for step in run(scheduler, *arriving):
            started = {id(seq) for seq in step.admitted}
            prefill = sum(
                chunk.stop - chunk.start
                for chunk in step.chunks
                if id(chunk.seq) in started or chunk.stop - chunk.start > 1
            )
            assert prefill <= 16
        assert [scheduler.cache.num_available(rank) for rank in range(kvp)] == [scheduler.cache.num_pages] * kvp
        assert turn == 0 or scheduler.cache.counters.tokens_reused > 0


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks() -> None:
    scheduler = make(num_pages=6)
    steps = run(scheduler, sequence(0, A[:8], made=12), sequence(1, B[:8], made=8))
    assert scheduler.cache.counters.preemptions == 1
    resumed = [seq for step in steps[1:] for seq in step.admitted]
    assert [seq.index for seq in resumed] == [1]
    assert scheduler.cache.counters.tokens_reused > 0
