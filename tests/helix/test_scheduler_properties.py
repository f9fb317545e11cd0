"""Whatever comes, a scheduler ends it: each step is checked, and pages hold the tokens themselves."""

from hypothesis import given
from hypothesis import strategies as st

from parallel.placement import BlockCyclic
from tests.helix.scheduling import Run, make_scheduler, make_sequence

LOADS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 25), st.integers(0, 12)), min_size=1, max_size=12)


@st.composite
def settings_that_fit(draw: st.DrawFn) -> dict[str, int]:
    kvp, block_size = draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 4, 16]))
    least = -(-BlockCyclic(block_size, kvp).num_blocks(40 + 25) // kvp)  # the longest sequence alone
    return {
        "kvp": kvp,
        "block_size": block_size,
        "num_pages": least + draw(st.integers(0, 2 * least)),
        "max_batch": draw(st.integers(1, 6)),
        "prefill_chunk": draw(st.integers(1, 32)),
    }


def whole_run(settings: dict[str, int], load: list[tuple[int, int, int]]) -> Run:
    """Run sequences of (prompt, output tokens, step of arrival) to their end."""
    run = Run(make_scheduler(**settings), settings["prefill_chunk"], settings["max_batch"])
    arrivals = sorted(load, key=lambda item: item[2])
    sequences = [make_sequence(index, prompt, made) for index, (prompt, made, _) in enumerate(arrivals)]
    now = 0
    while run.scheduler.has_work or now <= arrivals[-1][2]:
        for seq, (_, _, arrival) in zip(sequences, arrivals, strict=True):
            if arrival == now:
                run.scheduler.add(seq)
        if run.scheduler.has_work:
            run.step()
        now += 1
        assert now < 10_000
    return run


@given(settings=settings_that_fit(), load=LOADS)
def test_every_run_ends_with_all_tokens_made_and_all_pages_free(
    settings: dict[str, int], load: list[tuple[int, int, int]]
) -> None:
    run = whole_run(settings, load)
    assert sorted(seq.index for seq in run.ended) == list(range(len(load)))
    for seq in run.ended:
        assert seq.token_ids == [1000 * seq.index + position for position in range(seq.max_len)]
        assert seq.num_computed == seq.max_len - 1
        assert seq.batch_slot == -1
    cache = run.scheduler.cache
    assert [cache.num_available(rank) for rank in range(settings["kvp"])] == [settings["num_pages"]] * settings["kvp"]


@given(settings=settings_that_fit(), load=LOADS)
def test_two_copies_fed_the_same_take_the_same_decisions(
    settings: dict[str, int], load: list[tuple[int, int, int]]
) -> None:
    assert whole_run(settings, load).decisions == whole_run(settings, load).decisions


def test_the_properties_are_tried_on_runs_that_preempt() -> None:
    settings = {"kvp": 2, "block_size": 2, "num_pages": 18, "max_batch": 6, "prefill_chunk": 8}
    run = whole_run(settings, [(12, 25, 0), (10, 25, 0), (9, 25, 1), (1, 25, 4)])
    assert run.scheduler.cache.counters.preemptions >= 2
    assert [seq.index for seq in run.ended] == [0, 1, 2, 3]
