"""Bytes of a rank, against arithmetic by hand and against what the runtime allocates."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from helix import LLM, HelixConfig
from helix.config import CacheConfig, ModelConfig, SchedulerConfig
from helix.models.loading import read_spec
from helix.models.quantization import Quantization
from helix.plan.footprint import Footprint, Storage
from helix.plan.hardware import named_hardware
from helix.plan.planner import Setup
from parallel.layout import Layout
from scripts.make_checkpoint import WINDOWED, make_checkpoint
from tests.helix.plan.presets import CONF, preset

STREAM = 2 * 4096  # bytes of a row of GLM-4-9B's hidden states


def test_weights_of_a_dense_model_by_hand() -> None:
    """GLM-4-9B over kvp 4 x tpa 2: 16 of 32 query heads, 1 KV head, 4 heads and 1,712 of 13,696 units after that."""
    foot = Footprint(preset("glm4_9b_1m"), Layout(kvp=4, tpa=2))
    qkv, o, ffn = (16 + 2) * 128, 4 * 128, 13696 // 8
    layer = STREAM * (qkv + o + 3 * ffn + 2) + 2 * qkv  # two norms; q, k and v have biases
    top = STREAM * (151552 + 151552 // 8 + 1)
    assert foot.weights_bytes == 40 * layer + top == 4_003_262_464


def test_cache_of_a_dense_model_by_hand() -> None:
    foot = Footprint(preset("glm4_9b_1m"), Layout(kvp=4, tpa=2), block_size=16)
    assert foot.token_bytes == 40 * 2 * 128 * 2
    assert foot.page_bytes == 16 * 20480
    assert foot.cache_bytes_per_token(1 << 20) == 20480 / 4
    assert foot.cache_bytes_per_token(100) == 2 * 16 * 20480 / 100  # of 7 blocks the fullest rank holds 2
    assert foot.num_pages(1_000_000_000) == 1_000_000_000 // 327_680 == 3051
    assert foot.max_tokens(3051) == 3051 * 64


def test_plain_tp_beyond_the_kv_heads_keeps_copies() -> None:
    foot = Footprint(preset("glm4_9b_1m"), Layout(kvp=1, tpa=8))
    assert foot.cache_bytes_per_token(1 << 20) == 40 * 2 * 128 * 2


def test_weights_of_experts_by_hand() -> None:
    """Qwen3-30B-A3B over kvp 2 x tpa 2 with ep 2: 64 of 128 experts, 384 of 768 units of each."""
    foot = Footprint(preset("qwen3_30b_a3b"), Layout(kvp=2, tpa=2, ep=2))
    attention = 2048 * (16 + 2 * 2) * 128 + 2048 * 8 * 128 + 2 * 128 + 2 * 2048
    experts = 128 * 2048 + 64 * 3 * 384 * 2048
    top = 2048 * (151936 + 151936 // 4 + 1)
    assert foot.weights_bytes == 2 * (48 * (attention + experts) + top)


def test_latents_are_cached_once_whatever_the_heads() -> None:
    foot = Footprint(preset("deepseek_v2_lite"), Layout(kvp=8, tpa=1))
    assert foot.token_bytes == 27 * (512 + 64) * 2
    narrow = replace(foot, storage=Storage("bf16", "fp8"))
    assert narrow.token_bytes == 27 * (512 + 4 + 2 * 64)


def test_a_workspace_holds_as_many_tokens_as_bytes_allow() -> None:
    few_heads, many = preset("glm4_9b_1m"), preset("llama3_405b")
    for spec, tokens in ((few_heads, 32768), (many, 16384)):  # 2 and 8 KV heads of 128, keys and values of 2 bytes
        foot = Footprint(spec, Layout(), Storage("fp8", "fp8"), 64)
        assert foot.workspace_tokens() == tokens and foot.workspace_tokens(128) == 128
    assert Footprint(preset("deepseek_v2_lite"), Layout(), Storage("bf16", "bf16"), 64).workspace_tokens() == 16384


def test_sequences_bring_their_states_along() -> None:
    """Qwen3.5-35B-A3B on one GPU: each sequence takes its pages, a quarter more for checkpoints, and a state."""
    setup = Setup(preset("qwen3_5_35b_a3b"), named_hardware("h200"))
    foot = setup.cost_of(Layout()).footprint
    free = int(0.9 * 150.1e9) - foot.weights_bytes - foot.activation_bytes(2048 + 64) - int(1.5e9)
    each = 64 * (foot.page_bytes + foot.page_bytes // 4) + foot.state_bytes(1)
    assert setup.max_sequences(foot, 4096) == (free - foot.state_bytes(1)) // each > 64


def test_fp8_rows_have_a_scale_for_each_block_of_columns_that_they_touch(tmp_path) -> None:
    """192 of 384 units: a slice that ends within a block of columns has scales for the whole of it."""
    spec = read_spec(ModelConfig(path=str(make_checkpoint(tmp_path / "model", family="llama"))))
    spec = replace(spec, ffn_size=384, hidden_size=256)
    wide, narrow = (Footprint(spec, Layout(kvp=2), Storage(weights)).layers[0].matrices for weights in ("bf16", "fp8"))
    assert narrow["gate_up"].num_bytes == wide["gate_up"].num_bytes // 2 + 4 * 2 * 192 * 2
    assert narrow["down"].num_bytes == wide["down"].num_bytes // 2 + 4 * 256 * 2
    assert narrow["input_norm"] == wide["input_norm"]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("glm4_9b_1m", Layout()), ("qwen3_235b", Layout(kvp=2, tpa=4)), ("qwen3_5_35b_a3b", Layout()),
        ("deepseek_r1", Layout(kvp=8)), ("deepseek_v2_lite", Layout()), ("mimo_v2_flash", Layout(kvp=2, tpa=4)),
    ],
)  # fmt: skip
def test_layers_of_8_bits_take_little_more_than_half_the_bytes(name: str, layout: Layout) -> None:
    """Experts, shared ones, states and latents included, whose keys' and values' projections are widened."""
    taken = []
    for storage, how in (("bf16", None), ("fp8", Quantization())):
        foot = Footprint(replace(preset(name), quantization=how), layout, Storage(storage))
        taken.append(sum(kind.count * sum(each.num_bytes for each in kind.matrices.values()) for kind in foot.layers))
    assert 0.5 < taken[1] / taken[0] <= 0.55


def test_the_first_rank_is_the_fullest() -> None:
    spec = replace(preset("qwen2_5_7b_1m"), num_heads=28)
    foot = Footprint(spec, Layout(kvp=8))
    heads = [foot.layout.merged_heads(28, 4, 0, rank) for rank in range(8)]
    assert max(stop - start for start, stop in heads) == heads[0][1] - heads[0][0] == 4


def test_a_plan_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import helix.plan.planner"  # importing None fails
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("family", "dtype", "cache"),
    [
        ("glm", "auto", "fp32"), ("deepseek_v3", "fp8_e4m3", "fp8"), ("gpt_oss", "fp8_e4m3", "fp8"),
        ("mixtral", "auto", "fp32"), ("mistral", "auto", "fp32"), ("qwen3_next", "auto", "fp32"),
        ("qwen3_5", "fp8_e4m3", "fp8"), ("qwen3_5_moe", "auto", "fp32"), ("gemma3", "fp8_e4m3", "fp8"),
        ("glm4_moe", "auto", "fp32"),
    ],
)  # fmt: skip
def test_the_runtime_allocates_what_was_counted(tmp_path, family, dtype, cache) -> None:
    path = str(make_checkpoint(tmp_path / "model", family=family, window=24 if family in WINDOWED else 0))
    config = HelixConfig(
        model=ModelConfig(path=path),
        cache=CacheConfig(num_pages=8, block_size=2, dtype=dtype),
        scheduler=SchedulerConfig(max_batch=4, prefill_chunk=32),
    )
    llm = LLM(config)
    foot = Footprint(llm.spec, llm.layout, Storage("fp32", cache), 2)
    decoder = llm.runner.decoder
    assert foot.weights_bytes == decoder.layer_bytes + sum(tensor.nbytes for tensor in decoder.top.values())
    if foot.page_bytes:
        assert foot.page_bytes == llm.runner.cache.page_bytes
    assert foot.states_bytes(4, max_run=1) == (0 if decoder.states is None else decoder.states.num_bytes)
    windows = [each if isinstance(each, torch.Tensor) else (each.values, each.scales) for each in decoder.windows or ()]
    taken = sum(plane.nbytes for each in windows for plane in (each if isinstance(each, tuple) else (each,)))
    assert foot.windows_bytes(4, prefill_chunk=32) == taken
    llm.close()


def test_experts_in_mxfp4_have_a_scale_for_32_elements_and_nothing_else_is_narrow() -> None:
    """Of gpt-oss-20b's sizes: 32 experts of 3 x 2,880 x 2,880 a layer."""
    config = {
        "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 32, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    spec = read_spec(ModelConfig(load="dummy", config=config))
    wide, narrow = (Footprint(spec, Layout(), Storage(weights)).weights_bytes for weights in ("bf16", "fp4"))
    elements = 2 * 32 * 3 * 2880 * 2880
    assert wide - narrow == 2 * elements - elements // 2 - elements // 32


def test_matrices_that_a_checkpoint_keeps_wide_are_counted_so() -> None:
    """Block FP8 but for one layer's down projection: its layer is of a kind of its own."""
    kept = {"quant_method": "fp8", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"]}  # fmt: skip
    config = yaml.safe_load((CONF / "model" / "bench.yaml").read_text())["config"]
    shape = config | {"num_hidden_layers": 3, "quantization_config": kept}
    model = ModelConfig(load="dummy", dtype="bfloat16", config=shape)
    llm = LLM(HelixConfig(model=model, cache=CacheConfig(num_pages=8)))
    foot = Footprint(llm.spec, llm.layout, Storage("fp8", "bf16"))
    assert [kind.count for kind in foot.layers] == [1, 2]
    decoder = llm.runner.decoder
    assert foot.weights_bytes == decoder.layer_bytes + sum(tensor.nbytes for tensor in decoder.top.values())
    llm.close()
