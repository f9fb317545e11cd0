"""The control plane by examples: which blocks go, to the host or for good, and how they come back."""

from collections import Counter

import pytest

from helix.cache.movements import Offload, Onboard
from helix.cache.retention import Retention
from tests.helix.cache.world import path_of, world

A, B, C = list(range(100, 200)), list(range(200, 300)), list(range(300, 400))


def test_the_least_recently_used_leaf_goes_first() -> None:
    w = world(num_pages=6)
    w.run(A[:8])
    w.run(B[:8])
    w.run(A[:8])  # used again
    w.run(C[:12])  # needs one page more than is free
    cached = Counter(path[0] for _, path in map(path_of, w.cache.blocks.tree.walk()))
    assert cached == {A[0]: 2, B[0]: 1, C[0]: 3}, "the last block of B went, the one before stayed"


def test_blocks_of_low_priority_go_first_and_priorities_end() -> None:
    for wait, b_stays in ((0.0, True), (60.0, False)):
        w = world(num_pages=6)
        w.for_all(lambda cache: cache.advance(100.0))
        w.run(B[:8], retention=(Retention(priority=90, duration_s=30.0),))
        w.run(A[:8])
        w.for_all(lambda cache, now=100.0 + wait: cache.advance(now))
        assert bool(w.cache.blocks.expiries._heap) == b_stays
        w.run(C[:12])
        assert w.run(B[:7]) == (6 if b_stays else 4)


def test_blocks_that_went_before_their_priority_ended_are_forgotten() -> None:
    w = world(num_pages=8)
    for number in range(300):
        w.run([number] * 8, retention=(Retention(priority=90, duration_s=1e6),))
    assert len(w.cache.blocks.expiries._heap) < 100


def test_a_range_of_tokens_has_its_own_priority_and_a_reuse_can_change_it() -> None:
    w = world(num_pages=8)
    w.run(A[:16], retention=(Retention(priority=80), Retention(start=8, end=12, priority=5)))
    priorities = [block.priority for block in w.cache.blocks.tree.walk()]
    assert priorities == [80, 80, 5, 80]
    w.run(A[:9])
    assert [block.priority for block in w.cache.blocks.tree.walk()][:2] == [80, 80]
    w.run(A[:9], retention=(Retention(end=4, priority=1),))
    assert [block.priority for block in w.cache.blocks.tree.walk()][:2] == [1, 80]


def test_time_never_goes_back() -> None:
    w = world()
    w.for_all(lambda cache: cache.advance(50.0))
    w.for_all(lambda cache: cache.advance(10.0))
    assert w.cache.blocks.now == 50.0


def test_evicted_blocks_go_to_the_host_and_come_back_on_a_match() -> None:
    w = world(kvp=2, num_pages=3, host_pages=8)
    w.run(A[:22])
    assert w.run(B[:22]) == 0
    assert w.cache.counters.blocks_offloaded >= 5
    assert w.run(A[:22]) == 21
    assert w.cache.counters.blocks_onboarded >= 5
    assert w.cache.counters.blocks_evicted == 0


def test_blocks_below_the_threshold_are_dropped_not_offloaded() -> None:
    w = world(num_pages=4, host_pages=8, offload_min_priority=30)
    w.run(A[:16], retention=(Retention(priority=20),))
    w.run(B[:16])
    assert (w.cache.counters.blocks_offloaded, w.cache.counters.blocks_evicted) == (0, 4)
    w.run(C[:16])
    assert w.cache.counters.blocks_offloaded == 4


def test_a_block_whose_children_are_on_the_host_follows_them_whatever_its_priority() -> None:
    w = world(num_pages=2, host_pages=8, offload_min_priority=30)
    w.run(A[:8], retention=(Retention(end=4, priority=10), Retention(start=4, priority=80)))
    first = next(w.cache.blocks.tree.walk())
    w.run(B[:8])
    assert (first.priority, w.cache.counters.blocks_evicted) == (10, 0)
    assert w.run(A[:8]) == 7


def test_room_on_one_rank_costs_only_blocks_that_lead_to_it() -> None:
    w = world(kvp=2, num_pages=2)
    owners = []
    for tokens in (A[:4], B[:4], C[:4]):  # one block each; A is the oldest
        running = w.start(tokens)
        assert running is not None
        owners.append(running.tables[0].first_owner)
        w.compute(running)
        w.release(running)
    assert owners == [0, 1, 0]
    w.run([7] * 4)  # begins on rank 1
    for tokens in ([8] * 4, [9] * 4):
        w.run(tokens)  # each evicts on its own rank only
    cached = {tuple(path) for _, path in map(path_of, w.cache.blocks.tree.walk())}
    assert len(cached) == 4, "no page is free, and none was emptied for nothing"


def test_an_old_sequence_goes_from_its_end_though_its_end_is_on_another_rank() -> None:
    w = world(kvp=2, num_pages=2)
    w.run(A[:8])  # ends on rank 1
    w.run(B[:4])  # begins on rank 0
    assert [w.cache.blocks.device.num_free(rank) for rank in range(2)] == [0, 1]
    w.run(C[:7])  # begins on rank 1, and needs a page of rank 0
    cached = {tuple(path[:1]) for _, path in map(path_of, w.cache.blocks.tree.walk())}
    assert cached == {(B[0],), (C[0],)}, "A is older: its two blocks went, the last one first"


def test_the_use_of_a_sequence_is_a_use_of_all_its_blocks() -> None:
    w = world(num_pages=4)
    ends = (Retention(start=4, priority=1),)
    w.run(A[:8], retention=ends)
    w.run(B[:4])
    w.run(A[:8], retention=ends)
    w.run(C[:12])  # the end of A goes for its priority, then B, which is older than the beginning of A
    cached = [path[:1] for _, path in map(path_of, w.cache.blocks.tree.walk())]
    assert A[:1] in cached and B[:1] not in cached


def test_a_full_host_keeps_what_ranks_higher() -> None:
    w = world(num_pages=4, host_pages=4)
    w.run(A[:16], retention=(Retention(priority=80),))
    w.run(B[:16])
    w.run(C[:16])
    assert w.run(A[:16]) == 15
    assert w.run(B[:16]) == 0


def test_a_host_page_matched_in_the_step_that_offloads_it_is_read_after_it_is_written() -> None:
    w = world(num_pages=4, host_pages=8)
    w.run(A[:16])
    other = w.admit(w.claim(w.keys(B[:8])))  # offloads the last two blocks of A
    assert other is not None
    w.release(other, keep=False)
    again = w.admit(w.claim(w.keys(A[:16])))  # and they come back before anything was moved
    assert again is not None and again.num_computed == 15
    w.move()
    kinds = [type(move) for move in w.moved]
    assert kinds.index(Offload) < kinds.index(Onboard)
    w.compute(again)
    w.check()


def test_part_of_a_block_on_the_host_is_brought_in_whole_and_stays_there_while_others_need_it() -> None:
    w = world(num_pages=4, host_pages=8)
    w.run(A[:15])
    w.run(B[:16])
    claims = [w.claim(w.keys(A[:2] + [end] * 3)) for end in (1, 2)]
    running = [w.admit(each) for each in claims]
    w.move()
    for each in running:
        assert each is not None and each.num_computed == 2
        w.compute(each)
    w.check()
    for each in running:
        assert each is not None
        w.release(each)
    assert w.run(A[:8]) == 7


def test_what_one_claim_onboards_another_finds_on_the_device() -> None:
    w = world(num_pages=8, host_pages=8)
    w.run(A[:16])
    w.run(B[:32])
    claims = [w.claim(w.keys([*A[:13], end])) for end in (1, 2)]
    running = [w.admit(each) for each in claims]
    w.move()
    assert w.cache.counters.blocks_onboarded == 3 + 2, "three whole blocks once, part of the fourth for each"
    for each in running:
        assert each is not None
        w.compute(each)
    w.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, r"retention.start = -1 must lie in \[0, 2\*\*63\)"),
        ({"start": 4, "end": 4}, "retention.end = 4 must be above retention.start = 4"),
        ({"priority": 101}, "retention.priority = 101 must lie in 0..100"),
        ({"duration_s": 0}, "retention.duration_s = 0 must be positive"),
    ],
)
def test_retention_out_of_range_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retention(**settings)  # type: ignore[arg-type]
