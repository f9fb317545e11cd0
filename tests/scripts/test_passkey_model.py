"""The model that finds a key: right at any depth, in any layout, and wrong once a part of the cache is missing."""

from pathlib import Path

import pytest
import torch

from helix import LLM, HelixConfig, SamplingParams
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from scripts.dummy_weights import BenchCache
from scripts.find_keys import FindKeysConfig, places, search
from scripts.make_checkpoint import make_checkpoint
from scripts.passkey_model import TURNING, prompt_with_key

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
    assert found["whole without it"] == 0 and found["right without the block"] < 5


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


@pytest.mark.parametrize(("layer", "head"), [(1, 0), (1, 1)], ids=("KV head 0", "KV head 1"))
def test_what_is_missing_from_the_cache_is_seen(path, monkeypatch, layer, head) -> None:
    llm = open_model(path, "float32")
    prompt, answer = prompt_with_key(300, 150, seed=1)
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


def test_a_key_must_have_a_token_before_it_and_end_before_the_question() -> None:
    for position in (0, 593):
        with pytest.raises(ValueError, match="must lie from 1 to 592"):
            prompt_with_key(600, position)
    prompt, answer = prompt_with_key(600, 592)
    assert prompt[593:598] == answer and prompt[-1] == prompt[592]


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers = 4 is not for family = passkey"):
        make_checkpoint(tmp_path, family="passkey", layers=4)
