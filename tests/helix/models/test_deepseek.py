"""DeepSeek's specs, its temperature and its routers, against transformers' own; the routing kernels against those."""

import json
import math

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3TopkRouter

from attention.append import append
from attention.pages import PageLayout, pages_to_wide
from attention.ranges import PAGE
from helix.models.experts import mix_queued, mix_reference
from helix.models.families import load_spec
from helix.models.latent import MadeOfLatents
from helix.models.routing import route
from helix.models.spec import Experts, Latent
from helix.models.tokenizer import load_tokenizer
from tests.helix.models.chosen import experts_in_use

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "rope_theta": 10000.0,
}
FAMILIES = ["deepseek_v2", "deepseek_v3"]
ROUTERS = {"deepseek_v2": DeepseekV2TopkRouter, "deepseek_v3": DeepseekV3TopkRouter}


def config_of(family, **settings):
    method = {"topk_method": "group_limited_greedy"} if family == "deepseek_v2" else {}
    return AutoConfig.for_model(family, **(SIZES | method | settings))


def spec_of(folder, family, **settings):
    config_of(family, **settings).save_pretrained(folder)
    return load_spec(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spec_holds_what_the_config_says(tmp_path, family):
    spec = spec_of(tmp_path, family)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.cache_planes) == (8, 1, 40, 32, 1)
    assert spec.latent == Latent(
        rank=32, turned_dim=8, plain_dim=16, value_dim=12, q_rank=40, scale=pytest.approx(24**-0.5)
    )
    assert (spec.rope.rotary_dim, spec.rope.interleaved) == (8, True)
    experts, third = spec.experts, family == "deepseek_v3"
    assert (experts.num_experts, experts.num_chosen, experts.ffn_size, experts.shared_size) == (12, 3, 24, 48)
    assert (experts.groups, experts.groups_chosen, experts.scale) == (4, 2, 2.5)
    assert (experts.sigmoid, experts.dense_layers) == (third, {0})


def test_kimi_is_the_third_generation_and_its_tokenizer_is_not_run(tmp_path, caplog):
    third = spec_of(tmp_path, "deepseek_v3", rope_parameters=YARN)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "kimi_k2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    kimi = load_spec(tmp_path)
    assert (kimi.family, kimi.latent, kimi.experts, kimi.scale) == (
        "deepseek_v3",
        third.latent,
        third.experts,
        third.scale,
    )
    auto_map = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    with caplog.at_level("INFO"):
        assert load_tokenizer(tmp_path) is None
    assert "its tokenizer is code, which is not run: prompts have to be token ids" in caplog.text


KIMI = {  # what its authors' config.json says
    "model_type": "kimi_k2", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 64,
    "num_key_value_heads": 64, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.827, "moe_layer_freq": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 50000.0, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
    "attention_bias": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "eos_token_id": 163585,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "rope_scaling": {
        "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    },
}  # fmt: skip


@pytest.mark.filterwarnings("default")
def test_kimi_is_read_as_its_authors_write_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KIMI))
    spec = load_spec(tmp_path)
    experts = spec.experts
    assert (experts.num_experts, experts.num_chosen, experts.sigmoid, experts.normalised) == (384, 8, True, True)
    assert (experts.groups, experts.scale, experts.dense_layers, experts.shared_size) == (1, 2.827, {0}, 2048)
    assert spec.scale == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2)
    assert (spec.num_layers, spec.max_position, spec.latent.q_rank, spec.head_dim) == (61, 131072, 1536, 576)
    assert spec.rope.interleaved and spec.rope.attention_scaling == 1.0
    assert spec.is_quantized("model.layers.3.mlp.experts.383.up_proj.weight")
    assert not spec.is_quantized("model.layers.3.mlp.gate.weight") and not spec.is_quantized("lm_head.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scale_is_that_of_transformers_with_yarn(tmp_path, family):
    attention = DeepseekV3Attention if family == "deepseek_v3" else DeepseekV2Attention
    spec = spec_of(tmp_path, family, rope_parameters=YARN)
    assert spec.scale == pytest.approx(attention(config_of(family, rope_parameters=YARN), 0).scaling)
    assert spec.scale > 24**-0.5


@pytest.mark.parametrize(
    ("family", "settings", "problem"),
    [
        ("deepseek_v3", {"attention_bias": True}, "config attention_bias = True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "config topk_method = 'noaux_tc'; .*; valid: null, greedy, group"),
        ("deepseek_v3", {"n_group": 5}, r"experts.groups = 5 must divide experts.num_experts = 12"),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 4}, "exceeds the experts of 1 of 4 groups"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "latent.rank = 0"),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, family, settings, problem):
    with pytest.raises(ValueError, match=problem):
        spec_of(tmp_path, family, **settings)


@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_and_kernels_choose_what_transformers_chooses(tmp_path, family, groups):
    settings = {"n_group": groups, "topk_group": min(groups, 2)}
    experts, router = spec_of(tmp_path, family, **settings).experts, ROUTERS[family](config_of(family, **settings))
    generator = torch.Generator().manual_seed(groups)
    with torch.no_grad():
        router.weight.normal_(0.0, 0.3, generator=generator)
        bias = torch.randn(12, generator=generator) * 0.2 if experts.sigmoid else None
        if bias is not None:
            router.e_score_correction_bias.copy_(bias)
        x = torch.randn(40, 64, generator=generator)
        _, weights, ids = router(x)
    expected = torch.zeros(40, 12).scatter(1, ids, weights)
    ours_weights, ours_ids = route(x, router.weight.detach(), experts, bias)
    torch.testing.assert_close(torch.zeros(40, 12).scatter(1, ours_ids, ours_weights), expected, rtol=1e-5, atol=1e-6)

    logits = (x @ router.weight.detach().T).to(DEVICE)
    on_device = None if bias is None else bias.to(DEVICE)
    used = experts_in_use(logits.unsqueeze(0), 7, experts, first=3, bias=on_device)
    torch.testing.assert_close(used.row_weights.cpu(), expected.T[3:10], rtol=1e-4, atol=1e-6)

    gate_up, down = (torch.randn(*shape, generator=generator) * 0.2 for shape in ((7, 16, 64), (7, 64, 8)))
    reference = mix_reference(x, ours_weights, ours_ids, gate_up, down, first=3)
    queued = mix_queued(
        x.to(DEVICE), logits, gate_up.to(DEVICE), down.to(DEVICE), experts=experts, first=3, bias=on_device
    )
    torch.testing.assert_close(queued.cpu(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("sigmoid", [True, False])
def test_scores_that_are_no_numbers_choose_no_expert(sigmoid):
    """After a fault a step computes on what is left in memory: it may not write where it should not."""
    experts = Experts(
        num_experts=8, num_chosen=2, ffn_size=4, normalised=True, sigmoid=sigmoid, groups=2, groups_chosen=1
    )
    logits, bias = torch.full((3, 8), torch.nan, device=DEVICE), torch.zeros(8, device=DEVICE)
    logits[1] = torch.arange(8)
    used = experts_in_use(logits.unsqueeze(0), 8, experts, first=0, bias=bias)
    assert used.ids[: int(used.count)].tolist() == [6, 7]
    assert not used.row_weights[:, [0, 2]].any()


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_keys_and_values_are_made_of_what_pages_hold(in_8_bits):
    """Of two heads, plain elements of 6, values of 4, latents of 8 and 4 turned ones; 8 bits are widened first."""
    latent = Latent(rank=8, turned_dim=4, plain_dim=6, value_dim=4, q_rank=None, scale=1.0)
    generator = torch.Generator().manual_seed(0)
    cached, slots = torch.randn(20, 1, 12, generator=generator), torch.randperm(20, generator=generator).int()
    layout = PageLayout(1, 4, 12, torch.float32, 8, in_8_bits)
    pages = layout.pages_of(layout.views(torch.empty(5, layout.page_bytes, dtype=torch.uint8)))
    append(cached, None, pages, torch.arange(20))
    held = pages_to_wide(pages, torch.arange(5), torch.float32).flatten(0, 3)
    weights = {role: torch.randn(2 * n, 8, generator=generator) for role, n in (("k_up", 6), ("v_up", 4))}
    made = MadeOfLatents(latent, 2, 100, dtype=torch.float32, device=torch.device("cpu"))
    assert made.capacity == PAGE
    made.make(slots, pages, weights)
    latents, turned = held[slots.long()].split((8, 4), -1)
    workspace = made.workspace
    torch.testing.assert_close(workspace.k[:20].flatten(1), latents @ weights["k_up"].T)
    torch.testing.assert_close(workspace.v[:20].flatten(1), latents @ weights["v_up"].T)
    torch.testing.assert_close(workspace.turned[:20], turned, rtol=0, atol=0)
