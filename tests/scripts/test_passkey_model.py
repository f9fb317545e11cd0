"""The model that finds a key: right at any depth, in any layout, and wrong once a part of the cache is missing."""

from pathlib import Path

import pytest
import torch

from helix import LLM, HelixConfig, SamplingParams
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from scripts.dummy_weights import BenchCache
from scripts.find_keys import FindKeysConfig, is_right, places, search
from scripts.make_checkpoint import make_checkpoint
from scripts.passkey_model import CHARACTERS, HEAD_DIM, LETTERS, MOST_KEYS, STILL, TURNING, text_with_keys

BLOCK, LENGTH = 16, 240
FIVE = SamplingParams(max_tokens=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("passkey") / "model", family="passkey", dtype="bfloat16"))


def open_model(path: str, dtype: str, **layout: int) -> LLM:
    return LLM(
        HelixConfig(
            model=ModelConfig(path=path, dtype=dtype),
            parallel=ParallelConfig(**layout),
            cache=CacheConfig(block_size=BLOCK, num_pages=200, reuse=False),
            scheduler=SchedulerConfig(prefill_chunk=100),
            runtime=RuntimeConfig(device="cpu"),
        )
    )


def found_body(path: str, dtype: str, layout: dict[str, int]) -> None:
    config = FindKeysConfig(
        parallel=ParallelConfig(**layout), block_size=BLOCK, prefill_chunk=100, cache=BenchCache(dtype=dtype),
        runtime=RuntimeConfig(device="cpu"), lengths=[LENGTH], keys=2,
    )  # fmt: skip
    found = search(config.open(path, LENGTH), LENGTH, config.keys)
    assert (found["right"], found["keys"]) == (25, 5)
    assert (found["keys without their block"], found["whole without it"]) == (2, 0)
    assert found["right without the next"] == found["of these"] == 10
    assert is_right(found) and found["cached at least"] >= LENGTH - BLOCK


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("fp8_e4m3", {"kvp": 4}), ("auto", {"kvp": 2, "tpa": 2})],
    ids=("8 bits kvp 4", "kvp 2 x tpa 2"),
)
def test_a_key_is_found_wherever_it_stands_and_lost_with_its_block(path, ranks, dtype, layout) -> None:
    """At both ends, on each rank, and across the border of two ranks' blocks."""
    ranks(layout["kvp"] * layout.get("tpa", 1)).run(found_body, path, dtype, layout)


def test_keys_stand_on_each_rank_in_turn_and_across_a_border() -> None:
    inside, others = places(65536, 4, 64, 2)
    assert [position // 64 % 2 for position in inside] == [0, 1, 0, 1]
    assert all(position // 64 == (position + 5) // 64 for position in inside)
    assert others == [1, 32765, 65528]
    with pytest.raises(ValueError, match="lengths: 100 must lie from 768, for 4 keys, to 2097152"):
        FindKeysConfig(lengths=[100])
    with pytest.raises(ValueError, match="keys = 7 must lie from 2 to 6"):
        FindKeysConfig(keys=7)


def test_a_run_without_a_gpu_takes_a_shorter_text_unless_one_is_named(capsys) -> None:
    whole, short = FindKeysConfig().on("cuda"), FindKeysConfig().on("cpu")
    assert (whole.lengths, whole.prefill_chunk) == ([65536, 262144, 1 << 20], 8192)
    assert (short.lengths, short.prefill_chunk) == ([4096], 1024)
    assert "no GPU; lengths=[16384] names others" in capsys.readouterr().out
    named = FindKeysConfig(lengths=[65536], prefill_chunk=512).on("cpu")
    assert (named.lengths, named.prefill_chunk) == ([65536], 512)
    with pytest.raises(ValueError, match="lengths: 4096 must lie from 6144"):
        FindKeysConfig(block_size=512).on("cpu")


def test_a_text_of_which_one_answer_is_wrong_is_not_right() -> None:
    good = {"right": 25, "of": 25, "whole without it": 0, "right without the next": 10, "of these": 10}
    assert is_right(good)
    for wrong in ({"right": 24}, {"whole without it": 1}, {"right without the next": 9}):
        assert not is_right(good | wrong)


@pytest.mark.parametrize(("layer", "head"), [(1, 0), (1, 1)], ids=("KV head 0", "KV head 1"))
def test_what_is_missing_from_the_cache_is_seen(path, monkeypatch, layer, head) -> None:
    llm = open_model(path, "float32")
    text, [[mark, *answer]] = text_with_keys(299, [150], seed=1)
    prompt = [*text, mark]
    [whole] = llm.generate([prompt], FIVE)
    assert whole.token_ids == answer
    pages = llm.runner.cache.layers[layer]
    launch = llm.runner.launch

    def without_the_keys_block(chunks):
        table = chunks[0].seq.blocks
        pages[table.pages[150 // BLOCK], :, head] = 0.0
        return launch(chunks)

    monkeypatch.setattr(llm.runner, "launch", without_the_keys_block)
    [cut] = llm.generate([prompt], FIVE)
    llm.close()
    assert cut.token_ids != answer


def test_distances_up_to_two_million_tokens_are_told_apart() -> None:
    turns = 10.0 ** (-torch.arange(TURNING, dtype=torch.float64) / 4)
    score = sum(torch.cos(torch.arange(-1, 1 << 21, dtype=torch.float64) * turn) for turn in turns)
    others = torch.cat((score[:1], score[2:]))
    assert others.max() < score[1] - 0.6  # times 2 * SHARPNESS


def test_keys_stand_in_the_text_apart_from_each_other() -> None:
    for positions, why in (
        ([0], "must lie from 1 to 592"),
        ([593], "must lie from 1 to 592"),
        ([7, 12], "6 tokens from"),
    ):
        with pytest.raises(ValueError, match=why):
            text_with_keys(599, positions)
    with pytest.raises(ValueError, match="at most 9"):
        text_with_keys(599, range(1, 101, 10))
    text, [last, first] = text_with_keys(599, [592, 1])
    assert text[592:598] == last and text[1:7] == first
    assert len({*last, *first}) == 12 and not {*last, *first} & {*text[7:592]}


def test_every_character_of_keys_is_told_from_all_others() -> None:
    assert len(CHARACTERS) == 6 * MOST_KEYS <= HEAD_DIM - 2 * STILL and not {*CHARACTERS} & {*LETTERS}


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers = 4 is not for family = passkey"):
        make_checkpoint(tmp_path, family="passkey", layers=4)
