"""Tokens over a cache of 8 bits equal transformers' in float32 over a cache of what its 8 bits mean."""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from attention.pages import FP8
from helix.config import (
    AttentionConfig,
    CacheConfig,
    DraftModelConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from helix.llm import LLM
from helix.models.checkpoint import Checkpoint
from helix.models.families import load_spec
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint
from tests.helix.eight_bits import caches_of_8_bits
from tests.helix.greedy import greedy_of
from tests.helix.test_parity import check

TOKENS = 12
TIE = 0.5  # in float32 the last bit of a sum may move an element of 8 bits by a sixteenth, or choose another expert


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cache(lambda family: str(make_checkpoint(tmp_path_factory.mktemp("fp8") / family, family=family)))


@pytest.fixture(scope="module")
def reference(checkpoint):
    """``reference(family, prompt, num_tokens)``: greedy tokens, and the gap of the two best logits at each."""
    from transformers import AutoModelForCausalLM

    def generate(family, prompt, num_tokens):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
        return greedy_of(model, prompt, num_tokens, past_key_values=caches_of_8_bits(model)())

    return cache(generate)


def body(path, kvp, tpa, runs, drafts, expand):
    """Prompts one after the other on pools that hold one: what begins alike is reused, offloaded and brought back."""
    speculative = SpeculativeConfig()
    if drafts:
        speculative = SpeculativeConfig(method="draft_model", max_draft_len=3, model=DraftModelConfig(path=path))
    llm = LLM(
        HelixConfig(
            model=ModelConfig(path=path, dtype="float32"),
            parallel=ParallelConfig(kvp=kvp, tpa=tpa),
            cache=CacheConfig(
                block_size=8, num_pages=-(-28 // kvp), host_pages=40, dtype="fp8_e4m3", offload_min_priority=0
            ),
            scheduler=SchedulerConfig(max_batch=2, prefill_chunk=17),
            attention=AttentionConfig(expand_rows=expand, workspace_tokens=128),
            speculative=speculative,
            runtime=RuntimeConfig(check_ranks=True),
        )
    )
    assert llm.runner.cache.planes[0].dtype == FP8 and llm.footprint.page_bytes == llm.runner.cache.page_bytes
    assert (llm.runner.decoder.made is not None) == bool(expand)
    outputs = []
    for _, [prompt], *_ in runs:
        [made] = llm.generate([list(prompt)], SamplingParams(max_tokens=TOKENS, ignore_eos=True))
        outputs.append([(made.token_ids, made.error)])
    counters = llm.engine.scheduler.cache.counters
    moved = {"offloaded": counters.blocks_offloaded, "onboarded": counters.blocks_onboarded}
    if drafts:
        drafter = llm.engine.speculator.drafter
        assert drafter._runner.cache.planes[0].dtype == FP8
    return outputs, moved


@pytest.mark.parametrize(
    ("family", "kvp", "tpa", "drafts", "expand"),
    [
        ("llama", 1, 1, True, 5),
        ("qwen2", 2, 2, False, 0),
        pytest.param("qwen2", 3, 1, False, 5, marks=pytest.mark.slow),
        ("deepseek_v3", 3, 1, False, 5),
        ("deepseek_v2", 1, 1, True, 0),
    ],
)
def test_tokens_equal_those_of_a_cache_of_what_8_bits_mean(
    ranks, checkpoint, reference, family, kvp, tpa, drafts, expand
):
    """Two prompts that share 43 tokens, another that takes their pages, and the first again."""
    generator = torch.Generator().manual_seed(7)

    def tokens(count):
        return torch.randint(0, 256, (count,), generator=generator).tolist()

    first = tokens(61)
    prompts = [tuple(first), (*first[:43], *tokens(20)), tuple(tokens(200)), tuple(first)]
    runs = [(8, [prompt], TOKENS) for prompt in prompts]
    results = ranks(kvp * tpa).run(body, checkpoint(family), kvp, tpa, runs, drafts, expand)
    check([outputs for outputs, _ in results], reference, family, runs, TIE)
    made = [tokens for [(tokens, _)] in results[0][0]]
    expected = [reference(family, prompt, TOKENS)[0] for prompt in prompts]
    assert sum(one == other for one, other in zip(made, expected, strict=True)) >= 3, "ties are rare"
    assert all(count > 0 for count in results[0][1].values()), results[0][1]


def test_a_cache_of_another_dtype_than_the_model_is_refused(checkpoint):
    config = HelixConfig(
        model=ModelConfig(path=checkpoint("llama"), dtype="float32"), cache=CacheConfig(dtype="bfloat16")
    )
    with pytest.raises(ValueError, match="cache.dtype = bfloat16 but the model is run in float32; use model.dtype=bf"):
        LLM(config)
    with pytest.raises(
        ValueError, match="cache.dtype = 'fp8' must be one of auto, float32, bfloat16, float16, fp8_e4m3"
    ):
        CacheConfig(dtype="fp8")


def test_a_checkpoints_kv_cache_scheme_and_its_scales_are_followed(tmp_path):
    path = make_checkpoint(tmp_path / "model", family="llama", layers=2)
    tensors, name = load_file(path / "model.safetensors"), "model.layers.{}.self_attn.{}_scale"
    for weight in [each for each in tensors if each.endswith("_proj.weight")]:
        tensors[f"{weight}_scale"] = tensors[weight].abs().amax().reshape(1) / 448
        tensors[weight] = (tensors[weight] / tensors[f"{weight}_scale"]).to(FP8)
    for layer in range(2):
        tensors |= {name.format(layer, part): torch.tensor([0.5 + layer + 0.25 * (part == "v")]) for part in "kv"}
    save_file(tensors, path / "model.safetensors")
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = settings | {"ignore": ["lm_head"], "kv_cache_scheme": scheme}
    (path / "config.json").write_text(json.dumps(config))
    llm = LLM(HelixConfig(model=ModelConfig(path=str(path)), cache=CacheConfig(num_pages=4, block_size=16)))
    llm.generate([list(range(20))], SamplingParams(max_tokens=1, ignore_eos=True))
    values, scales = llm.runner.cache.planes
    assert values.dtype == FP8
    for layer in range(2):
        assert (scales[layer, :, 0] == 0.5 + layer).any() and (scales[layer, :, 1] == 0.75 + layer).any()
    for change, problem in (
        (
            {name.format(1, "v"): torch.tensor([0.0])},
            "layers.1.self_attn.v_scale has the value 0.0, must be one positive",
        ),
        (
            {name.format(0, "k"): torch.ones(2)},
            r"layers.0.self_attn.k_scale has shape \(2,\), must be one positive number",
        ),
    ):
        save_file(tensors | change, path / "model.safetensors")
        with pytest.raises(ValueError, match=problem):
            LLM(HelixConfig(model=ModelConfig(path=str(path))))
    # modelopt's files say the same, with the scales beside the matrices
    renamed = {each.replace("attn.k_s", "attn.k_proj.k_s").replace("attn.v_s", "attn.v_proj.v_s"): t
               for each, t in tensors.items()}  # fmt: skip
    save_file(renamed, path / "model.safetensors")
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme}
    (path / "config.json").write_text(json.dumps(config))
    spec = load_spec(path)
    assert spec.quantization.caches_in_8_bits
    with Checkpoint(path, spec) as checkpoint:
        assert checkpoint.cache_scales(1).tolist() == [1.5, 1.75]
    # AutoFP8's say "static", and older ones have one scale for both
    both = {each: t for each, t in tensors.items() if "attn.k_s" not in each and "attn.v_s" not in each}
    both |= {f"model.layers.{layer}.self_attn.kv_scale": torch.tensor(0.5 + layer) for layer in range(2)}
    save_file(both, path / "model.safetensors")
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}
    (path / "config.json").write_text(json.dumps(config))
    spec = load_spec(path)
    assert spec.quantization.caches_in_8_bits
    with Checkpoint(path, spec) as checkpoint:
        assert checkpoint.cache_scales(1).tolist() == [1.5, 1.5]
    config["quantization_config"]["kv_cache_scheme"] = "int8"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config.kv_cache_scheme = 'int8'; valid: null, 'static', an obj"):
        load_spec(path)
