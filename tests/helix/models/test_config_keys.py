"""Config keys that change what a model computes: refused, or read where they change nothing."""

from types import SimpleNamespace
from typing import Any

import pytest

from helix.models.config_keys import KEYS, Key
from helix.models.families import FAMILIES, spec_of
from helix.models.hf_config import layer_kinds
from helix.models.kinds import Kind

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 128}
DUAL_CHUNKS = {"chunk_size": 1024, "local_size": 64, "original_max_position_embeddings": 2048}


def load(family: str, max_position: int | None = None, **settings: Any) -> Any:
    return spec_of({"model_type": family, **SIZES, **settings}, "model.config", max_position=max_position)


def nested(name: str, value: object) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    rope = {"rope_type": "default", "rope_theta": 1e4} if outer.startswith("rope_") else {}
    return {outer: {**rope, inner: value} if inner else value}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.name} {','.join(key.families)}")
def test_key_is_refused_where_it_changes_results_and_read_where_not(key: Key) -> None:
    family = next(family for family in sorted(FAMILIES) if key.concerns(family))
    for value in (*key.neutral, None):
        assert load(family, **nested(key.name, value)).num_layers == 3
    odd: dict[str, Any] = {"scoring_func": "tanh", "topk_method": "random", "is_causal": False}
    odd["norm_topk_prob"] = True not in key.neutral
    with pytest.raises(ValueError, match=rf"^model.config: config {key.name} = .*; valid: null.*; remove it") as error:
        load(family, **nested(key.name, odd.get(key.name, 0.5)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_5_moe", "qwen3_moe", "qwen3_next"])
def test_other_routers_than_a_softmax_are_refused_by_all_families_of_one(family: str) -> None:
    for name, value in (
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("n_group", 4),
        ("moe_layer_freq", 2),
    ):
        with pytest.raises(ValueError, match=f"config {name} = "):
            load(family, **{name: value})
    normalised = load(family, norm_topk_prob=True).experts.normalised
    assert normalised
    if family in ("qwen3_moe", "qwen3_next"):
        assert not load(family, norm_topk_prob=False).experts.normalised


def test_keys_that_a_family_computes_are_read() -> None:
    assert load("glm", head_dim=16, partial_rotary_factor=0.25).rope.rotary_dim == 4
    assert load("qwen3", use_qk_norm=True).qk_norm
    assert load("qwen3_moe", norm_topk_prob=True).experts.normalised
    assert load("deepseek_v3", norm_topk_prob=False, topk_method="noaux_tc", scoring_func="sigmoid").experts.sigmoid
    assert load("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2).experts.groups == 4


@pytest.mark.parametrize(
    ("family", "settings", "longest"),
    [
        ("qwen3_moe", {**WINDOW}, 128),
        ("qwen3_moe", {**WINDOW, "max_window_layers": 3}, 128),  # transformers slides in all layers of this family
        ("llama", {"sliding_window": 128}, 128),
        ("deepseek_v2", {"sliding_window": 128}, 128),
        ("glm", {"attention_chunk_size": 512}, 512),
        ("qwen2", {"dual_chunk_attention_config": DUAL_CHUNKS}, 1024),
        ("qwen3_moe", {"dual_chunk_attention_config": {**DUAL_CHUNKS, "chunk_size": 4000}}, 2048),
    ],
)
def test_windows_and_chunks_limit_the_context(family: str, settings: dict[str, Any], longest: int) -> None:
    for max_position in (None, longest + 1):
        with pytest.raises(ValueError, match=rf"^model.config: config \w+ = .*; set model.max_position={longest} or"):
            load(family, max_position, **settings)
    assert load(family, longest, **settings).max_position == longest


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 128}),
        ("qwen2", {**WINDOW, "max_window_layers": 3}),
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 128}),
        ("llama", {"use_sliding_window": False, "sliding_window": 128}),
        ("glm", {"layer_types": ["full_attention"] * 3, "sliding_window": None}),
        ("qwen2", {"dual_chunk_attention_config": {}, "sliding_window": None}),
    ],
)
def test_unused_windows_and_chunks_are_read(family: str, settings: dict[str, Any]) -> None:
    assert load(family, **settings).max_position == 4096


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        {"layer_types": ["sliding_attention"] * 3},
        {"dual_chunk_attention_config": "yes"},
        {"dual_chunk_attention_config": {"chunk_size": "long"}},
        {"sliding_window": "wide"},
    ],
    ids=str,
)
def test_kinds_of_attention_that_are_unknown_are_refused_by_their_key(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^model.config: config {next(iter(settings))} = "):
        load("llama", **settings)


@pytest.mark.parametrize(
    ("family", "settings", "windows"),
    [
        ("qwen2", {**WINDOW, "max_window_layers": 1}, (1, 2)),
        ("qwen3", {**WINDOW, "max_window_layers": 0}, (0, 1, 2)),
        ("qwen3", {**WINDOW, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, (1,)),
        ("mistral", {"sliding_window": 128}, (0, 1, 2)),
        ("mistral", {"sliding_window": None}, ()),
    ],
)
def test_windows_that_a_family_computes_are_kinds_of_its_layers(
    family: str, settings: dict[str, Any], windows: tuple[int, ...]
) -> None:
    spec = load(family, **settings)
    assert (spec.layers_of("window"), spec.window) == (windows, 128 if windows else 0)
    assert load(family, 128, **settings).kinds == ()  # no row sees less than all


def test_kinds_of_layers_are_those_of_the_config() -> None:
    full, window, state = Kind(), Kind("window", 128), Kind("state")
    types = ["sliding_attention", "full_attention", "linear_attention"]
    config = SimpleNamespace(num_hidden_layers=3, sliding_window=128, layer_types=types)
    assert layer_kinds(config) == (window, full, state)
    assert layer_kinds(SimpleNamespace(num_hidden_layers=3, sliding_window=128)) == (window,) * 3
    assert layer_kinds(SimpleNamespace(num_hidden_layers=3, sliding_window=None)) == ()
    assert layer_kinds(SimpleNamespace(layer_types=["full_attention"] * 3, sliding_window=128)) == ()
    with pytest.raises(ValueError, match="window = 0 of a window layer"):
        layer_kinds(SimpleNamespace(layer_types=types, sliding_window=None))
    with pytest.raises(ValueError, match="config layer_types = 'chunked_attention'; Helix computes full_attention, "):
        layer_kinds(SimpleNamespace(layer_types=["chunked_attention"]))
