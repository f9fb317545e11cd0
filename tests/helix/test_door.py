"""What rank 0 alone sees reaches every rank at the same step, and nothing that happens there parts them."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import torch.distributed as dist

from helix import LLM, HelixConfig, Request, SamplingParams
from helix.cache.retention import Retention
from helix.commands import Abort, Close, encode
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from helix.door import Door, DoorClosed
from helix.inbox import Full, Inbox
from helix.request import StreamEvent
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("door") / "model", layers=1)


def make_llm(path: Path, kvp: int = 1, *, check: bool = False, **cache: Any) -> LLM:
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(path), dtype="float32"),
            parallel=ParallelConfig(kvp=kvp),
            cache=CacheConfig(**{"block_size": 4, "num_pages": 24} | cache),
            scheduler=SchedulerConfig(max_batch=6, prefill_chunk=24),
            runtime=RuntimeConfig(device="cpu", check_ranks=check),
        )
    )


# --- the inbox --------------------------------------------------------------------------------------------------------


def test_a_full_inbox_refuses_requests_and_still_takes_aborts() -> None:
    inbox = Inbox(limit=2)
    inbox.put(b"1")
    inbox.put(b"2")
    with pytest.raises(Full):
        inbox.put(b"3")
    inbox.put(b"abort", always=True)
    assert inbox.take(0.0) == [b"1", b"2", b"abort"] and inbox.take(0.0) == []
    threading.Timer(0.05, inbox.put, [b"late"]).start()
    assert inbox.take(30.0) == [b"late"]


# --- a walk -----------------------------------------------------------------------------------------------------------


def walk_body(path: Path, kvp: int, seed: int, num_requests: int) -> tuple[dict[int, tuple[Any, ...]], list[int]]:
    """Requests that come and are aborted at any time. Return what became of each, and who was aborted."""
    llm = make_llm(path, kvp)
    random, inbox, aborted = Random(seed), Inbox(), []
    prompts = prompts_of(seed, num_requests)
    turns = llm.turns(inbox)
    outputs: dict[int, tuple[Any, ...]] = {}
    text: dict[int, str] = {}
    added = turn_number = 0
    for events in turns:
        for event in events:
            text[event.index] = text.get(event.index, "") + event.text
            if event.output is not None:
                out = event.output
                assert event.index not in outputs, "a request ends once"
                assert out.text == text[event.index]
                outputs[event.index] = (out.token_ids, out.finish_reason, out.cached_tokens, out.error)
        if llm.launch.speaks:
            turn_number += 1
            for _ in range(random.choice([0, 0, 1, 3]) if added < num_requests else 0):
                if added < num_requests:
                    inbox.put(llm.preparer.settle(added, prompts[added], SamplingParams(ignore_eos=True)).data)
                    added += 1
            if added and random.random() < 0.25:
                aborted.append(random.randrange(max(0, added - 8), added + 1))  # some have ended, or never come
                inbox.put(encode(Abort(aborted[-1])))
            if added == num_requests and len(outputs) >= num_requests - 3:
                inbox.put(encode(Close(abort=random.random() < 0.5)))
                added += 1
    cache = llm.engine.scheduler.cache
    assert [cache.num_available(rank) for rank in range(kvp)] == [llm.num_pages] * kvp
    assert all(block.pins == 0 for block in cache.blocks.tree.walk()) and not llm.engine._live
    return outputs, aborted


def prompts_of(seed: int, number: int) -> list[Request]:
    random = Random(seed + 1)
    shared = [random.choices(range(256), k=30) for _ in range(3)]
    requests = []
    for _ in range(number):
        prompt = random.choice(shared)[: random.randint(1, 30)] + random.choices(range(256), k=random.randint(0, 6))
        sampling = SamplingParams(
            max_tokens=random.randint(1, 12),
            ignore_eos=True,
            temperature=random.choice([0.0, 0.0, 0.9]),
            seed=random.randrange(1000),
            stop=random.choice([[], list("abcdefghijklm"), list("nopqrstuvwxyz"), list("ABCDEFGH")]),
        )
        requests.append(Request(prompt_token_ids=prompt, sampling=sampling))
    requests[::17] = [Request(prompt_token_ids=[]) for _ in requests[::17]]
    return requests


def test_arrivals_and_aborts_at_any_time_part_no_ranks_and_change_no_survivor(
    ranks: Callable[..., Any], model: Path
) -> None:
    seed, number = 3, 80
    (outputs, aborted), (others, _) = ranks(2).run(walk_body, model, 2, seed, number)
    assert outputs == others
    alone = make_llm(model, num_pages=256).generate(prompts_of(seed, number))
    reasons = {index: output[1] for index, output in outputs.items()}
    assert set(reasons.values()) == {"stop", "length", "error", "abort"}
    for index, (token_ids, reason, _, _) in outputs.items():
        expected = alone[index]
        if reason == "abort":
            assert token_ids == expected.token_ids[: len(token_ids)]
        else:
            assert (token_ids, reason) == (expected.token_ids, expected.finish_reason), index
    assert sum(reason == "abort" for reason in reasons.values()) <= len(set(aborted))


# --- rank 0 counts ----------------------------------------------------------------------------------------------------


def none_body(path: Path) -> list[tuple[Any, ...]]:
    """Other ranks bring no prompts, or wrong ones."""
    llm = make_llm(path, 2, check=True)
    prompts = ["some text", [1, 2, 3], 3.5, [], Request(prompt="no", cache_salt="\ud800")]
    told = []
    for mine in (None, ["other"] * 2):
        for output in llm.generate(prompts if llm.launch.speaks else mine, SamplingParams(max_tokens=5, seed=1)):
            told.append((output.token_ids, output.finish_reason, output.error, output.text))
    return told


def test_rank_0s_prompts_count_and_its_text_stays_there(ranks: Callable[..., Any], model: Path) -> None:
    first, second = ranks(2).run(none_body, model)
    assert [output[:3] for output in first] == [output[:3] for output in second]
    assert first[:5] == first[5:] and [output[1] for output in first[:5]] == ["length"] * 2 + ["error"] * 3
    assert "not a float" in first[2][2] and "cache_salt is no valid text" in first[4][2]
    assert any(text for *_, text in first) and not any(text for *_, text in second)


def failing_body(path: Path) -> tuple[str, int]:
    """Rank 0 fails while it reads the prompts; afterwards both go on."""
    llm = make_llm(path, 2)

    def prompts() -> Iterator[list[int]]:
        yield [1, 2]
        raise KeyError("a bad list")

    try:
        llm.generate(prompts() if llm.launch.speaks else None)  # type: ignore[arg-type]
    except (KeyError, DoorClosed) as error:
        return type(error).__name__ + str(error), len(llm.generate([[1, 2]]))
    return "", 0


def test_what_fails_on_rank_0_alone_ends_the_call_on_all_ranks(ranks: Callable[..., Any], model: Path) -> None:
    first, second = ranks(2).run(failing_body, model)
    assert first == ("KeyError'a bad list'", 1)
    assert second == ("DoorClosedrank 0 failed: KeyError: 'a bad list'", 1)


# --- time -------------------------------------------------------------------------------------------------------------


def test_retention_counts_from_the_time_of_the_request(model: Path) -> None:
    llm = make_llm(model)
    keep = Retention(start=0, priority=90, duration_s=600.0)
    llm.generate([Request(prompt_token_ids=list(range(20)), retention=(keep,))], SamplingParams(max_tokens=4))
    priorities = {block.priority for block in llm.engine.scheduler.cache.blocks.tree.walk()}
    assert 90 in priorities and llm.engine.scheduler.cache.blocks.now > 0


def idle_body(path: Path) -> tuple[float, float, int]:
    """Nothing comes for longer than the time-out of a collective. Return CPU seconds, seconds, and tokens made."""
    llm = make_llm(path, 2)
    llm.config.runtime.timeout_s = 0.4  # heartbeats every 0.1 s
    inbox = Inbox()
    cpu, began = time.process_time(), time.monotonic()
    if llm.launch.speaks:

        def late() -> None:
            inbox.put(llm.preparer.settle(0, [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True)).data)
            inbox.put(encode(Close()))

        threading.Timer(1.5, late).start()
    events: Sequence[StreamEvent] = [event for turn in llm.turns(inbox) for event in turn]
    return time.process_time() - cpu, time.monotonic() - began, len(events)


def test_an_idle_world_lives_and_burns_no_core(ranks: Callable[..., Any], model: Path) -> None:
    for cpu_s, elapsed_s, num_events in ranks(2).run(idle_body, model):
        assert elapsed_s > 1.4 and cpu_s < 0.5 and num_events == 3


def share_body(number: int) -> list[int]:
    """Payloads below, at and beyond what one message holds."""
    inbox, sizes = Inbox(), []
    door = Door(inbox, timeout_s=60)
    for size in (0, 900, 990, 1000, 1010, 200_000)[:number]:
        if dist.get_rank() == 0 and size:
            inbox.put(msgspec.msgpack.encode(b"x" * size))
        turn = door.share([], lambda: b"n", idle=False)
        sizes.append(sum(len(bytes(each)) for each in turn.commands))
    return sizes


def test_turns_of_any_size_arrive_whole(ranks: Callable[..., Any]) -> None:
    first, second = ranks(2).run(share_body, 6)
    assert first == second and first[0] == 0 and first[-1] > 200_000
