"""The control plane by examples: what is found, what is copied, where a sequence begins, and who waits."""

import pytest

from helix.cache.keys import BlockKeys
from helix.cache.movements import CopyTokens
from tests.helix.cache.world import counted, world

A, B, C = list(range(100, 200)), list(range(200, 300)), list(range(300, 400))


@pytest.mark.parametrize("kvp", [1, 2, 4, 8])
def test_whole_blocks_then_part_of_one_are_found_whatever_kvp_is(kvp: int) -> None:
    w = world(kvp)
    assert w.run(A[:14]) == 0
    assert w.run(A[:14]) == 13, "everything but the last token"
    assert w.run(A[:10] + B[:10]) == 10
    assert w.run(B[:10]) == 0
    w.check()


def test_generated_blocks_are_found_by_the_next_turn() -> None:
    w = world(kvp=2)
    w.run(A[:6], made=B[:9])
    assert w.run(A[:6] + B[:9] + C[:5]) == 15


def test_full_blocks_are_found_while_their_sequence_still_runs() -> None:
    w = world(kvp=2)
    first = w.start(A[:10])
    assert first is not None
    w.compute(first, 9)
    second = w.start(A[:10])
    assert second is not None and second.num_computed == 8
    w.compute(second)
    w.compute(first)
    w.check()
    w.release(first)
    w.release(second)
    w.check()


def test_another_salt_finds_nothing() -> None:
    w = world(kvp=2)
    w.run(A[:12], salt="one")
    assert w.run(A[:12], salt="two") == 0
    assert w.run(A[:12]) == 0
    assert w.run(A[:12], salt="one") == 11
    w.for_all(lambda cache: cache.clear())
    assert not w.cache.blocks.tree.roots


def test_without_reuse_nothing_is_kept_and_without_partial_reuse_only_whole_blocks_are() -> None:
    off = world(reuse=False)
    assert [off.run(A[:14]) for _ in range(2)] == [0, 0]
    assert off.cache.num_available(0) == off.cache.blocks.device.num_free(0) == 32
    whole = world(partial_reuse=False)
    assert [whole.run(A[:14]) for _ in range(2)] == [0, 12]
    assert whole.run(A[:12]) == 8, "the last block holds the token that must be computed"


def test_a_leaf_that_matches_whole_is_taken_over_and_part_of_one_is_copied() -> None:
    w = world(kvp=2)
    w.run(A[:11])
    running = w.start(A[:11] + B[:1])
    assert running is not None and running.num_computed == 11
    assert (w.moved, counted(w)) == ([], (3, 0, 0))
    w.compute(running)
    w.release(running)
    for end in (1, 2):  # A[8:11] + B[:1] is a whole block now, which nobody uses: three of its tokens match
        other = w.start(A[:11] + [end] * 5)
        assert other is not None and other.num_computed == 11
        [copy] = w.moved
        assert isinstance(copy, CopyTokens) and copy.num_tokens == 3
        w.compute(other)
        w.release(other, keep=False)
        w.check()


@pytest.mark.parametrize(("kvp", "block_size"), [(1, 64), (8, 64), (8, 16)])
def test_prompts_that_share_a_beginning_take_nothing_from_each_other_while_pages_are_free(
    kvp: int, block_size: int
) -> None:
    w = world(kvp, block_size, num_pages=100)
    one, other = [0, *A[:50]], [0, *B[:50]]
    assert [w.run(tokens) for tokens in (one, other) * 4][2:] == [50] * 6


def test_of_several_claims_on_one_leaf_the_last_takes_it_over_and_the_others_copy() -> None:
    w = world(kvp=2)
    w.run(A[:7])
    claims = [w.claim(w.keys(A[:7] + [end] * 3)) for end in (1, 2, 3)]
    w.check(claims)
    running = [w.admit(each) for each in claims]
    w.move()
    assert [type(move) for move in w.moved] == [CopyTokens, CopyTokens]
    assert [each.num_computed for each in running if each] == [7, 7, 7]
    for each in running:
        assert each is not None
        w.compute(each)
    w.check()


def test_a_claimant_that_goes_before_its_copy_leaves_the_others_right() -> None:
    w = world(kvp=1, num_pages=6)
    w.run(A[:7])
    claims = [w.claim(w.keys(A[:6] + [end] * 3)) for end in (1, 2)]
    first = w.admit(claims[0])
    assert first is not None
    w.release(first)  # preempted: its copy is still to come, and its pages may go to others
    second = w.admit(claims[1])
    third = w.admit(w.claim(w.keys(B[:4])))
    assert second is not None and third is not None
    w.move()
    w.compute(third)
    w.compute(second)
    w.check()
    assert w.start(A[:6] + [1] * 3) is not None


def test_a_prompt_that_is_cached_whole_computes_its_last_token() -> None:
    w = world(kvp=2)
    w.run(A[:8], made=A[8:16])
    for length in range(1, 17):
        assert w.run(A[:length]) == length - 1


@pytest.mark.parametrize("kvp", [1, 2, 4])
def test_a_pool_of_exactly_one_requests_size_serves_any_request_after_any_other(kvp: int) -> None:
    w = world(kvp, num_pages=4)
    length = 4 * 4 * kvp
    sequences = [(A * 2)[:length], (A[:6] + B * 2)[:length], (B * 2)[:length], (A[:6] + C * 2)[:length]]
    for tokens in sequences * 2:
        w.run(tokens)
    assert w.cache.fits(length) and not w.cache.fits(length + 1)


def test_the_source_of_a_copy_is_given_up_where_it_is_what_is_missing() -> None:
    w = world(num_pages=4)
    w.run(A[:16])
    running = w.start(A[:6] + B[:10])  # block 1 has children: copying would need a fifth page
    assert running is not None and running.num_computed == 4
    w.compute(running)
    w.check()


def test_a_request_that_does_not_fit_changes_nothing() -> None:
    w = world(kvp=2, num_pages=3)
    w.run(A[:9])
    running = w.start(B[:12])
    assert running is not None
    before = [w.cache.num_available(rank) for rank in range(2)]
    assert w.start(A[:8] + C[:9]) is None
    assert [w.cache.num_available(rank) for rank in range(2)] == before
    w.check()
    assert not w.extend(running, C[:30])
    w.check()


@pytest.mark.parametrize("kvp", [2, 4, 8])
def test_sequences_that_share_nothing_begin_on_the_rank_with_most_room(kvp: int) -> None:
    w = world(kvp, num_pages=4)
    running = [w.start([1000 * i + j for j in range(3)]) for i in range(2 * kvp)]
    owners = [each.tables[0].first_owner for each in running if each]
    assert owners == [*range(kvp)] * 2


@pytest.mark.parametrize("shared", [1, 40], ids=["first token", "most of a block"])
@pytest.mark.parametrize("partial_reuse", [True, False])
def test_sequences_that_share_less_than_a_block_are_balanced(shared: int, partial_reuse: bool) -> None:
    w = world(8, 64, num_pages=100, partial_reuse=partial_reuse)
    start = A[:shared]
    w.run(start + [7] * 500)  # a conversation that began alike
    running = [w.start(start + [1000 + number] * (51 - shared)) for number in range(64)]
    for each in running:
        assert each is not None
        w.compute(each)
    held = [figures["held"] for figures in w.cache.occupancy()]
    assert sum(held) == 64 and max(held) - min(held) <= 2
    for each in running:
        assert each is not None and w.extend(each, B[:100])
        w.compute(each)
    held = [figures["held"] for figures in w.cache.occupancy()]
    assert sum(held) == 3 * 64 and max(held) - min(held) <= 2
    w.check()


def test_equal_prompts_that_start_together_begin_on_one_rank_and_share_what_follows() -> None:
    w = world(kvp=4)
    twins = [w.start(A[:9]), w.start(A[:9])]
    for twin in twins:
        assert twin is not None
        w.compute(twin)
    w.check()
    one, other = [twin for twin in twins if twin]
    assert one.tables[0].first_owner == other.tables[0].first_owner
    assert other.tables[0].own == [0, 1]
    assert w.extend(other, B[:8])
    w.compute(other)
    w.check()
    for twin in (one, other):
        w.release(twin)
    w.check()
    assert w.run(A[:9] + B[:8]) == 16


def test_the_same_tokens_on_another_rank_are_computed_and_not_kept() -> None:
    w = world(kvp=2)
    short, other = w.start(A[:2]), w.start(A[:2])  # too short to know that they will be equal
    assert short is not None and other is not None
    assert short.tables[0].first_owner != other.tables[0].first_owner
    for each in (short, other):
        w.compute(each)
        assert w.extend(each, A[2:9])
        w.compute(each)
    w.check()
    w.release(other)
    w.release(short)
    w.check()
    assert w.run(A[:9]) == 8


def test_keys_of_a_waiting_request_are_cut_once() -> None:
    tokens = A[:10]
    keys = BlockKeys(tokens, 4)
    before = [id(key) for key in keys.full]
    tokens += B[:3]
    keys.update()
    assert [id(key) for key in keys.full][:2] == before
    assert keys.full[2] == keys.part(2, 12)
    assert (keys.part(2, 11), keys.part(3, 13)) == (keys.full[2][:12], BlockKeys(B[2:3], 1).full[0])


def test_the_cache_is_not_cleared_under_a_running_sequence() -> None:
    w = world()
    assert w.start(A[:5]) is not None
    with pytest.raises(RuntimeError, match="while sequences hold pages"):
        w.cache.clear()


@pytest.mark.parametrize("clear", [False, True], ids=["kept", "cleared"])
def test_detached_pages_are_never_given_out_until_they_are_reattached(clear: bool) -> None:
    w = world(kvp=2, num_pages=8)
    w.run(A[:12])
    running = w.start(A[:8] + B[:10])  # two blocks are shared, three are its own
    assert running is not None
    own = [(block % 2, page) for block, page in enumerate(running.tables[0].pages)][2:]
    pages = [cache.detach(table) for cache, table in zip(w.caches, running.tables, strict=True)]
    w.running.remove(running)
    assert [sorted(each) for each in pages] == [sorted(own)] * 2
    if clear:
        w.for_all(lambda cache: cache.clear())
    held = []
    while (each := w.start([1000 + len(held)])) is not None:
        held.append((each.tables[0].first_owner, each.tables[0].pages[0]))
        w.compute(each)
    assert len(set(held)) == 2 * 8 - 3 and not set(held) & set(own)
    for each in list(w.running):
        w.release(each, keep=False)
    for cache, detached in zip(w.caches, pages, strict=True):
        cache.reattach(detached)
    assert [w.cache.num_available(rank) for rank in range(2)] == [8, 8]
    w.check()
    assert w.run(list(range(2000, 2060))) == 0, "a sequence can have every page again"
