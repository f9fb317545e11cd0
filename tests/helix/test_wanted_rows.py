"""In the last layer of a prompt's step, what stands behind attention is computed for rows that choose a token alone."""

from pathlib import Path
from typing import Any

import pytest

from helix import LLM, HelixConfig, SamplingParams
from helix.config import AttentionConfig, CacheConfig, ModelConfig, RuntimeConfig, SchedulerConfig
from helix.models.decoder import Decoder
from scripts.make_checkpoint import make_checkpoint

PROMPTS = [[7 * i % 250 for i in range(20)], [5 * i % 250 for i in range(9)]]


@pytest.mark.parametrize(
    ("family", "expand_rows"),
    [("llama", 0), ("deepseek_v3", 0), ("deepseek_v3", 8), ("qwen3_next", 0), ("gpt_oss", 0)],
)
def test_rows_that_choose_nothing_end_with_the_last_attention(
    family: str, expand_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path / "model", family=family)
    llm = LLM(
        HelixConfig(
            model=ModelConfig(path=str(path), dtype="float32"),
            cache=CacheConfig(block_size=4, num_pages=40, reuse=False),
            attention=AttentionConfig(expand_rows=expand_rows, workspace_tokens=128),
            scheduler=SchedulerConfig(prefill_chunk=16),
            runtime=RuntimeConfig(device="cpu"),
        )
    )
    fed: list[int] = []
    feed_forward = Decoder._feed_forward

    def count(self: Decoder, weights: Any, normed: Any, *rest: Any) -> Any:
        fed.append(len(normed))
        return feed_forward(self, weights, normed, *rest)

    attended: list[int] = []
    attend = Decoder._attend

    def note(self: Decoder, q: Any, *rest: Any) -> Any:
        attended.append(len(q))
        return attend(self, q, *rest)

    monkeypatch.setattr(Decoder, "_feed_forward", count)
    monkeypatch.setattr(Decoder, "_attend", note)

    def run(**settings: int) -> tuple[list[list[int]], list[list[tuple[int, float]]]]:
        """Return the rows that each layer fed forward, of each step; and each prompt's next tokens with their logs."""
        fed.clear()
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=1, logprobs=4, ignore_eos=True, **settings))
        depth = llm.spec.num_layers
        found = [
            [(token, log) for each in output.logprobs or () for token, log in each.top.items()] for output in outputs
        ]
        return [fed[at : at + depth] for at in range(0, len(fed), depth)], found

    (first, second), found = run()
    assert set(first[:-1]) == {16} and set(second[:-1]) == {13}
    assert (first[-1], second[-1]) == (1, 2)  # one that nobody reads, as nobody chooses; then the prompts' last rows
    num_full = len(llm.spec.layers_of("full"))
    assert (attended[num_full - 1], attended[2 * num_full - 1]) == (1, 2)
    steps, whole = run(prompt_logprobs=0)  # the prompt's log-probabilities need all rows
    assert [set(rows) for rows in steps] == [{16}, {13}]
    for few, every in zip(found, whole, strict=True):
        assert [token for token, _ in few] == [token for token, _ in every]
        # products of fewer rows may add up in another order: which, is the processor's choice
        assert [log for _, log in few] == pytest.approx([log for _, log in every], rel=1e-5, abs=1e-5)
