"""The benchmark of speculation runs without a GPU, on a model that counts, and ends with one JSON line."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helix.config import ModelConfig, RuntimeConfig
from scripts.bench_speculative import BenchSpeculativeConfig, CountingDrafter, run
from tests.helix.speculative.test_ngram import sequence

TINY = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
}


TINY_WITH_LAYER = TINY | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A tiny model's threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("drafter", ["given", "mtp"])
def test_every_case_is_measured_and_drafts_are_right_as_often_as_asked(
    drafter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        BenchSpeculativeConfig(
            model=ModelConfig(load="dummy", config=TINY if drafter == "given" else TINY_WITH_LAYER),
            drafter=drafter,
            runtime=RuntimeConfig(device="cpu"),
            context=40,
            batches=[1, 2],
            lengths=[1, 3],
            acceptance=[0.7],
            tokens=40,
            repeats=1,
            block_size=16,
        )
    )
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows: dict[Any, dict[str, Any]] = {(row["p"], row["batch"], row["draft length"]): row for row in figures["rows"]}
    assert len(rows) == 2 * (4 if drafter == "given" else 6)
    for (p, _, length), row in rows.items():
        k = 0 if length == "none" else int(length.split()[0])
        assert row["tokens a step"] == pytest.approx((1 - p ** (k + 1)) / (1 - p), rel=0.2)
        assert row["TTL ms"] > 0 and row["padding rows"] == 0
    assert figures["targets"]["padding rows (target 0)"] == 0
    assert figures["targets"]["schedule over best fixed, worst (target 1.03)"] > 0.2


def test_errors_are_the_same_positions_for_every_draft_length() -> None:
    drafter = CountingDrafter(0.5, 100, batch=1, max_len=64)
    seq = sequence([98])
    [long] = drafter.draft([seq], [20])
    right = [(99 + step) % 100 for step in range(20)]
    assert 3 < sum(one == other for one, other in zip(long, right, strict=True)) < 17
    assert drafter.draft([seq], [5]) == [long[:5]]
    seq.token_ids += right[:4]
    assert drafter.draft([seq], [16]) == [long[4:]]
