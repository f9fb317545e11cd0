"""What a step computes: budgets, order, batch slots, preemption. No model runs."""

from typing import Any

import pytest

from helix.cache.claim import Claim
from helix.cache.keys import BlockKeys
from helix.scheduler import Scheduler, Step
from tests.helix.scheduling import Run, advance, make_scheduler, make_sequence, spans, step


def test_a_long_prompt_is_computed_in_chunks_and_only_its_end_samples() -> None:
    scheduler = make_scheduler(prefill_chunk=16)
    scheduler.add(make_sequence(0, 40, 3))
    seen = []
    while scheduler.has_work:
        chunks = scheduler.schedule().chunks
        seen.append([(chunk.start, chunk.stop, chunk.samples) for chunk in chunks])
        advance(scheduler, chunks)
    prefill = [[(0, 16, False)], [(16, 32, False)], [(32, 40, True)]]
    assert seen == [*prefill, [(40, 41, True)], [(41, 42, True)]]


def test_prompts_share_the_budget_of_a_step_and_decode_rows_come_on_top() -> None:
    scheduler = make_scheduler(prefill_chunk=16)
    for index, prompt_len in enumerate((10, 10, 30)):
        scheduler.add(make_sequence(index, prompt_len, 9))
    assert step(scheduler) == [(0, 0, 10), (1, 0, 6)]
    assert step(scheduler) == [(0, 10, 11), (1, 6, 10), (2, 0, 12)]
    assert step(scheduler) == [(0, 11, 12), (1, 10, 11), (2, 12, 28)]
    assert step(scheduler) == [(0, 12, 13), (1, 11, 12), (2, 28, 30)]
    assert step(scheduler) == [(0, 13, 14), (1, 12, 13), (2, 30, 31)]


def test_a_later_short_prompt_does_not_overtake_one_that_waits_for_pages() -> None:
    scheduler = make_scheduler(num_pages=10, prefill_chunk=32)
    for index, prompt_len in enumerate((16, 30, 1)):
        scheduler.add(make_sequence(index, prompt_len, 2))
    assert step(scheduler) == [(0, 0, 16)]
    assert [seq.index for seq in scheduler.waiting] == [1, 2]
    assert step(scheduler) == [(0, 16, 17)]
    assert step(scheduler) == [(1, 0, 30), (2, 0, 1)]


def test_who_waits_behind_one_that_did_not_fit_begins_when_that_is_taken_out() -> None:
    scheduler = make_scheduler(num_pages=6)
    seqs = [make_sequence(0, 12, 4), make_sequence(1, 16, 4), make_sequence(2, 4, 2)]
    for seq in seqs:
        scheduler.add(seq)
    step(scheduler)
    assert scheduler.running == seqs[:1] and scheduler.waiting == seqs[1:]
    scheduler.remove(seqs[1])
    assert (2, 0, 4) in step(scheduler)


def test_a_full_batch_makes_others_wait_and_slots_are_used_again_lowest_first() -> None:
    scheduler = make_scheduler(max_batch=3, prefill_chunk=64)
    sequences = [make_sequence(index, 4, made) for index, made in enumerate((9, 2, 1, 9, 9))]
    for seq in sequences[:3]:
        scheduler.add(seq)
    assert step(scheduler) == [(0, 0, 4), (1, 0, 4), (2, 0, 4)]
    assert step(scheduler) == [(0, 4, 5), (1, 4, 5)]
    sequences.append(make_sequence(5, 4, 9))
    for seq in sequences[3:]:
        scheduler.add(seq)
    assert step(scheduler) == [(0, 5, 6), (3, 0, 4), (4, 0, 4)]
    assert [seq.batch_slot for seq in sequences] == [0, -1, -1, 1, 2, -1]


def test_the_latest_sequence_is_preempted_and_computed_again_with_what_it_had_made() -> None:
    scheduler = make_scheduler(num_pages=6)
    first, second = make_sequence(0, 8, 12), make_sequence(1, 8, 12)
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler) == [(0, 0, 8), (1, 0, 8)]
    for position in range(8, 12):  # three pages each: the pools are full
        assert step(scheduler) == [(0, position, position + 1), (1, position, position + 1)]
    assert scheduler.cache.num_available(0) == 0
    assert step(scheduler) == [(0, 12, 13)]
    assert (scheduler.cache.counters.preemptions, list(scheduler.waiting)) == (1, [second])
    assert (second.num_computed, second.batch_slot, second.blocks.pages) == (0, -1, [])
    assert second.token_ids == [1000 + position for position in range(13)]
    while scheduler.running == [first]:
        spanned = step(scheduler)
    assert spanned == [(0, 18, 19)]
    assert step(scheduler) == [(1, 4, 13)], "its first block was still cached"
    assert step(scheduler) == [(1, 13, 14)]


def test_a_step_that_preempts_admits_nobody() -> None:
    scheduler = make_scheduler(kvp=2, num_pages=2)
    scheduler.add(make_sequence(0, 8, 8))
    scheduler.add(make_sequence(1, 2, 5))
    assert step(scheduler) == [(0, 0, 8), (1, 0, 2)]
    assert step(scheduler) == [(0, 8, 9)]  # took the page of rank 0 that 1 had; rank 1 has one to spare
    assert (scheduler.cache.counters.preemptions, scheduler.cache.num_available(1)) == (1, 1)
    assert step(scheduler) == [(0, 9, 10), (1, 0, 3)]


def test_a_sequence_that_makes_again_what_is_cached_runs_in_the_pages_that_it_needs() -> None:
    """Its blocks are in the tree and in pages of its own at once, until it is preempted and shares them."""
    scheduler = make_scheduler(block_size=1, num_pages=15)
    run = Run(scheduler, prefill_chunk=16, max_batch=8)
    for _ in range(2):
        scheduler.add(make_sequence(0, 8, 8))
        while scheduler.has_work:
            run.step()
    assert [len(seq.token_ids) for seq in run.ended] == [16, 16]
    assert scheduler.cache.counters.preemptions == 1


def test_several_preempted_at_once_come_back_in_their_order() -> None:
    scheduler = make_scheduler(num_pages=6, block_size=4, kvp=1, prefill_chunk=64)
    sequences = [make_sequence(index, length, 9) for index, length in enumerate((8, 4, 4, 4))]
    for seq in sequences:
        scheduler.add(seq)
    step(scheduler)
    assert len(scheduler.running) == 4
    step(scheduler)
    order = [seq.index for seq in (*scheduler.running, *scheduler.waiting)]
    assert scheduler.cache.counters.preemptions == 2
    assert order == [0, 1, 2, 3]


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("kvp", [2, 8])
def test_first_owners_balance_short_sequences_over_the_ranks(kvp: int, shared: int) -> None:
    """They begin alike, as with a BOS, and so does what is cached."""
    scheduler = make_scheduler(kvp=kvp, max_batch=3 * kvp, prefill_chunk=1000)
    scheduler.add(make_sequence(0, 30, 1))
    while scheduler.has_work:
        step(scheduler)
    sequences = [make_sequence(index, 3, 1) for index in range(1, 3 * kvp + 1)]
    for seq in sequences:
        seq.token_ids[:shared] = range(shared)
        scheduler.add(seq)
    scheduler.schedule()
    owners = [seq.blocks.first_owner for seq in sequences]
    assert [owners.count(rank) for rank in range(kvp)] == [3] * kvp


def test_pages_of_a_finished_sequence_serve_the_next_one_at_once() -> None:
    scheduler = make_scheduler(num_pages=2, block_size=4)
    for index in range(3):
        scheduler.add(make_sequence(index, 7, 2))
    seen = []
    while scheduler.has_work:
        seen += step(scheduler)
    assert seen == [(index, *span) for index in range(3) for span in ((0, 7), (7, 8))]
    assert scheduler.cache.counters.preemptions == 0


# --- the step after one that is launched ------------------------------------------------------------------------------


def test_the_step_after_a_launched_one_has_the_next_row_of_all_that_go_on_and_waits_for_what_is_freed() -> None:
    scheduler = make_scheduler(max_batch=2, prefill_chunk=64)
    first, second, third = (make_sequence(index, 4, made) for index, made in enumerate((9, 9, 9)))
    for seq in (first, second, third):
        scheduler.add(seq)
    step(scheduler)
    launched = scheduler.schedule()
    ahead = scheduler.look_ahead(launched)
    assert ahead is not None, "the third has no slot, so it holds nothing up"
    assert (spans(launched.chunks), spans(ahead.chunks)) == ([(0, 4, 5), (1, 4, 5)], [(0, 5, 6), (1, 5, 6)])
    assert len(first.blocks.pages) == 2 and all(chunk.samples for chunk in ahead.chunks)
    advance(scheduler, launched.chunks)
    first.output.finish_reason = "stop"
    assert scheduler.look_ahead(ahead) is None, "the third will have its place"
    scheduler.remove(first)
    behind = scheduler.look_ahead(Step(ahead.chunks[1:]))
    assert behind is not None and spans(behind.chunks) == [(1, 6, 7), (2, 0, 4)], "and has it now"


def test_nothing_is_launched_ahead_past_the_end_nor_where_that_would_preempt() -> None:
    scheduler = make_scheduler(num_pages=3)
    scheduler.add(make_sequence(0, 4, 8))
    scheduler.add(make_sequence(1, 4, 3))
    assert step(scheduler) == [(0, 0, 4), (1, 0, 4)]
    assert step(scheduler) == [(0, 4, 5)], "one of the two could have the last page"
    scheduler = make_scheduler(num_pages=3)
    scheduler.add(make_sequence(0, 4, 8))
    step(scheduler)
    launched, seen = scheduler.schedule(), []
    while (ahead := scheduler.look_ahead(launched)) is not None:
        seen += spans(ahead.chunks)
        advance(scheduler, launched.chunks)
        launched = ahead
    assert seen == [(0, position, position + 1) for position in range(5, 11)], "the last of 12 is never computed"
    scheduler = make_scheduler(num_pages=4)
    for index in range(2):
        scheduler.add(make_sequence(index, 7, 9))
    step(scheduler)
    launched = scheduler.schedule()
    assert spans(launched.chunks) == [(0, 7, 8), (1, 7, 8)]
    assert scheduler.look_ahead(launched) is None
    assert scheduler.cache.counters.preemptions == 0 and len(scheduler.running) == 2


# --- what waits costs nothing -----------------------------------------------------------------------------------------


def count_claims(scheduler: Scheduler) -> list[int]:
    """The lengths of the sequences that are matched from now on."""
    plain, lengths = scheduler.cache.claim, list[int]()

    def claim(keys: BlockKeys, *how: Any, **more: Any) -> Claim:
        lengths.append(len(keys.token_ids))
        return plain(keys, *how, **more)

    scheduler.cache.claim = claim  # type: ignore[method-assign]
    return lengths


def test_who_waits_is_matched_and_its_keys_are_cut_when_it_may_start() -> None:
    scheduler = make_scheduler(max_batch=2, prefill_chunk=16)
    seqs = [make_sequence(index, 20, 4) for index in range(100)]
    for seq in seqs:
        scheduler.add(seq)
    claimed = count_claims(scheduler)
    step(scheduler)
    assert claimed == [20] * 3
    assert [seq.keys is not None for seq in seqs] == [True] * 3 + [False] * 97, "a few may have something cached"


def test_one_that_does_not_fit_is_matched_again_when_pages_come_back_and_not_before() -> None:
    scheduler = make_scheduler(num_pages=8, prefill_chunk=64)
    for seq in (make_sequence(0, 16, 8), make_sequence(1, 25, 2)):
        scheduler.add(seq)
    claimed = count_claims(scheduler)
    while len(scheduler.waiting):
        step(scheduler)
        assert len(claimed) < 5
    assert claimed[:2] == [16, 25]
    assert claimed[2:] == [25]


def test_pages_that_another_group_lets_go_let_a_waiting_sequence_start() -> None:
    scheduler = make_scheduler(num_pages=8, prefill_chunk=64)
    held = scheduler.cache.admit(scheduler.cache.claim(BlockKeys([7] * 16, 4)), 16)
    assert held is not None
    pages = scheduler.cache.detach(held)
    scheduler.add(make_sequence(1, 25, 2))
    for _ in range(3):
        assert step(scheduler) == []
    scheduler.cache.reattach(pages)
    assert step(scheduler) == [(1, 0, 25)]


def test_one_that_waits_starts_as_soon_as_the_prompt_beside_it_has_the_blocks_that_it_lacks() -> None:
    scheduler = make_scheduler(num_pages=7, prefill_chunk=16)
    first, second = make_sequence(0, 23, 9), make_sequence(1, 24, 1)
    second.token_ids[:20] = first.token_ids[:20]
    scheduler.add(first)
    scheduler.add(second)
    assert [step(scheduler) for _ in range(3)] == [[(0, 0, 16)], [(0, 16, 23)], [(0, 23, 24), (1, 20, 24)]]
