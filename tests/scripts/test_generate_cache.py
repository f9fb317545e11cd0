"""What the generate command reads and writes of the cache: salts, retention, cached tokens, counters, events."""

import json
from pathlib import Path
from typing import Any

import pytest

from helix.cache.events import block_hash, root_hash
from helix.cache.keys import token_bytes
from helix.cache.retention import Retention
from helix.sampling import SamplingParams
from scripts.generate import GenerateConfig, run
from scripts.make_checkpoint import make_checkpoint
from scripts.prompt_file import parse_item, parse_line

PROMPT = list(range(50, 70))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ()),
        ({"retention": []}, ()),
        ({"retention": {"priority": 80}}, (Retention(priority=80),)),
        (
            {"retention": [{"end": 9, "priority": 1}, {"start": 9, "end": None, "duration_s": 2.5}]},
            (Retention(end=9, priority=1), Retention(start=9, duration_s=2.5)),
        ),
    ],
)
def test_a_line_may_say_how_long_its_blocks_stay(given: dict[str, Any], expected: tuple[Retention, ...]) -> None:
    request = parse_item(parse_line(json.dumps({"prompt": "a", **given})), "here", SamplingParams())
    assert (request.error, request.retention) == (None, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_salt": 3}, "cache_salt is a int, must be a string"),
        ({"retention": 3}, "retention must be an object"),
        ({"retention": [3]}, "retention must be an object"),
        ({"retention": {"prio": 3}}, "retention.prio is not a key; the keys are start, end, priority, duration_s"),
        ({"retention": {"priority": "high"}}, 'retention.priority = "high" must be a number'),
        ({"retention": {"priority": True}}, "retention.priority = true must be a number"),
        ({"retention": {"priority": 300}}, "retention.priority = 300 must lie in 0..100"),
        ({"retention": {"start": 5, "end": 5}}, "retention.end = 5 must be above retention.start = 5 and below 2**63"),
        ({"retention": {"duration_s": -1}}, "retention.duration_s = -1 must be positive and at most 1e+09"),
    ],
)
def test_a_line_with_a_bad_cache_key_carries_its_error(given: dict[str, Any], message: str) -> None:
    request = parse_item(parse_line(json.dumps({"prompt": "a", **given})), "line 3", SamplingParams())
    assert request.error is not None
    assert request.error.startswith(f"line 3: {message}")


def test_outputs_metrics_and_events_tell_what_was_cached(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", layers=1)
    lines = [{"prompt_token_ids": PROMPT, "cache_salt": salt} for salt in ("a", "a", "b")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = GenerateConfig(
        prompts=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out.jsonl"),
        metrics=str(tmp_path / "metrics.json"),
    )
    config.model.path = str(model)
    config.cache.block_size, config.cache.num_pages = 8, 5
    config.cache.events = str(tmp_path / "events.jsonl")
    config.scheduler.max_batch = 1
    config.sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    run(config)

    outputs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [output["cached_tokens"] for output in outputs] == [0, 19, 0]
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"] == outputs[2]["token_ids"]
    counters = json.loads((tmp_path / "metrics.json").read_text())["cache"]
    assert (counters["tokens_reused"], counters["tokens_missed"]) == (19, 41)
    assert counters["pages_per_kvp_rank"] == [{"free": 0, "cached": 5, "held": 0, "host": 0}]

    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"stored", "removed"}
    first = block_hash(root_hash(b"a"), token_bytes(PROMPT[:8]))
    second = block_hash(first, token_bytes(PROMPT[8:16]))
    assert events[0] == {
        "event": "stored",
        "hash": first.hex(),
        "parent": root_hash(b"a").hex(),
        "tier": "device",
        "rank": 0,
        "num_tokens": 8,
    }
    assert (events[1]["hash"], events[1]["parent"]) == (second.hex(), first.hex())
