"""Keys of a config.json that change what a model computes and that its family here does not compute.

transformers drops keys that a family does not know, in silence; the checkpoint's authors meant them. So each key below
must be absent, null or neutral. Where a key changes nothing up to some length of context, it limits the context instead
of being refused. docs/models.md shows both tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REMOVE = "remove it from config.json if the weights were trained without it"


@dataclass(frozen=True)
class Key:
    """A key (dotted where it stands in an object), the values beside null that change nothing, and what else it asks
    for; `families` are those that it is looked for in, all where there are none, but never those of `computed_by`.
    """

    name: str
    neutral: tuple[Any, ...]
    meaning: str
    families: tuple[str, ...] = ()
    computed_by: tuple[str, ...] = ()

    def concerns(self, family: str) -> bool:
        """Return whether the key is looked for in configs of a family."""
        return family not in self.computed_by and (not self.families or family in self.families)


@dataclass(frozen=True)
class Limit:
    """A key under which a model computes what Helix computes up to a context of so many tokens, and no further."""

    name: str
    meaning: str
    of: Callable[[Any], int | None]


SPARSE = "it attends to some tokens only, which approximates the full attention of Helix"
QWEN3_NEXT = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
QWEN3 = ("qwen3", "qwen3_moe", *QWEN3_NEXT)
BY_SOFTMAX = ("gpt_oss", "mixtral", "qwen3_5_moe", "qwen3_moe", "qwen3_next")
BY_SIGMOID = ("deepseek_v3", "glm4_moe", "mimo_v2_flash")
PARTLY = "a part of each head would be rotated"
PARTLY_ROTATED = ("glm", "glm4", "glm4_moe", "mimo_v2_flash", *QWEN3_NEXT)
KEYS = (
    Key("is_causal", (True,), "tokens would see later ones"),
    Key("use_bidirectional_attention", (False,), "tokens would see later ones"),
    Key("sparse_attention_config", ({},), SPARSE),
    Key("dual_chunk_attention_config.sparse_attention_config", ({}, []), SPARSE),
    Key("attn_logit_softcapping", (0, False), "scores would be capped"),
    Key("final_logit_softcapping", (0, False), "logits would be capped"),
    Key("logits_scaling", (1,), "logits would be divided"),
    Key("logit_scale", (1,), "logits would be multiplied"),
    Key("dim_model_base", (), "logits would be divided"),
    Key("residual_multiplier", (1,), "what a layer adds would be multiplied"),
    Key("scale_depth", (), "what a layer adds would be multiplied"),
    Key("embedding_multiplier", (1,), "embeddings would be multiplied"),
    Key("scale_emb", (1,), "embeddings would be multiplied"),
    Key("attention_multiplier", (), "scores would be multiplied by it instead of 1 / sqrt(head size)"),
    Key(
        "query_pre_attn_scalar",
        (),
        "scores would be multiplied by another factor than 1 / sqrt(head size)",
        computed_by=("gemma3",),
    ),
    Key("attn_temperature_tuning", (False, 0), "queries would be scaled by their position"),
    Key("use_logn_attn", (False,), "queries would be scaled by their position"),
    Key("use_dynamic_ntk", (False,), "RoPE would change with the length of the context"),
    Key("no_rope_layers", ([],), "some layers would not rotate their heads"),
    Key("no_rope_layer_interval", (0,), "some layers would not rotate their heads"),
    Key("alibi", (False,), "scores would be biased by distance"),
    Key("clip_qkv", (0, False), "queries, keys and values would be clipped"),
    Key("use_qk_norm", (False,), "queries and keys would be normalised", computed_by=("glm4_moe", *QWEN3)),
    Key("rope_ratio", (1,), "RoPE would have another base"),
    Key("partial_rotary_factor", (1,), PARTLY, computed_by=PARTLY_ROTATED),
    Key(
        "rope_parameters.partial_rotary_factor",
        (1,),
        PARTLY,
        computed_by=PARTLY_ROTATED,
    ),
    Key("rope_scaling.partial_rotary_factor", (1,), PARTLY, computed_by=PARTLY_ROTATED),
    Key("index_topk", (), SPARSE),
    Key("scoring_func", ("softmax",), "experts would be weighted by another function", ("deepseek_v2", *BY_SOFTMAX)),
    Key("scoring_func", ("sigmoid",), "experts would be weighted by another function", BY_SIGMOID),
    Key("topk_method", ("noaux_tc",), "experts would be chosen by another rule", BY_SIGMOID),
    Key("topk_method", ("greedy", "group_limited_greedy"), "experts would be chosen by another rule", ("deepseek_v2",)),
    Key("topk_method", ("greedy",), "experts would be chosen by another rule", BY_SOFTMAX),
    Key("n_group", (0, 1), "experts would be chosen from some groups only", BY_SOFTMAX),
    Key("norm_topk_prob", (False,), "the weights of the experts chosen would sum to one", ("deepseek_v2",)),
    Key(
        "norm_topk_prob",
        (True,),
        "the weights of the experts chosen would not sum to one",
        ("gpt_oss", "mixtral", "qwen3_5_moe"),
    ),
    Key("routed_scaling_factor", (1,), "what experts add would be multiplied", BY_SOFTMAX),
    Key("attn_output_gate", (True,), "attention's output would not be gated", QWEN3_NEXT),
    Key(
        "moe_layer_freq",
        (1,),
        "some layers would have no experts",
        ("deepseek_v2", "deepseek_v3", "glm4_moe", *BY_SOFTMAX),
    ),
)


def check_keys(raw: dict[str, Any], config: Any, family: str, max_position: int) -> None:
    """Raise ValueError, in one line, when the config asks for what its family here does not compute.

    raw: the content of config.json. config: what transformers makes of it. max_position: the longest context, in
    tokens, that the run allows.
    """
    for key in KEYS:
        value = _value_of(raw, key.name)
        if key.concerns(family) and value is not None and value not in key.neutral:
            raise ValueError(f"config {key.name} = {_short(value)}; {key.meaning}; {valid_values(key)}; {REMOVE}")
    for limit in LIMITS:
        value = _short(getattr(config, limit.name, None))
        try:
            longest = limit.of(config)
            longest = None if longest is None else int(longest)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"config {limit.name} = {value}; not of the form that models have; correct it") from error
        if longest is not None and max_position > longest:
            way_out = f"set model.max_position={longest} or less" if longest else "Helix cannot run it"
            raise ValueError(f"config {limit.name} = {value}; {limit.meaning} (here {max_position}); {way_out}")


def valid_values(key: Key) -> str:
    """Return the values of a key that change nothing, as JSON has them."""
    names = {True: "true", False: "false"}
    return "valid: " + ", ".join(["null", *(names[v] if isinstance(v, bool) else str(v) for v in key.neutral)])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _value_of(raw: Any, name: str) -> Any:
    for part in name.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _other_layers(config: Any) -> int | None:
    """Return 0 where a layer is of a kind that has no length up to which it equals full attention."""
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if hasattr(config, "linear_num_value_heads"):
        others -= {"linear_attention"}
    known = {"sliding_attention"} if getattr(config, "sliding_window", None) else set()
    return 0 if others - known else None


WINDOWED = (
    "gemma3_text",
    "gpt_oss",
    "mimo_v2_flash",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
)  # families whose layers with a window are computed


def _sliding_window(config: Any) -> int | None:
    """Return the least window of any layer; None where all attend to everything, or the family computes windows."""
    if config.model_type in WINDOWED:
        return None
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and any(kind != "full_attention" for kind in kinds):
        return window
    return None if getattr(config, "use_sliding_window", None) is False else window  # else it is that of every layer


def _dual_chunks(config: Any) -> int | None:
    """Return up to where positions are as they are: one chunk with its neighbourhood, and no scaling by length."""
    settings = getattr(config, "dual_chunk_attention_config", None)
    if not settings:
        return None
    chunk = int(settings.get("chunk_size", 8192))
    return min(chunk, int(settings.get("original_max_position_embeddings") or chunk))


def _chunk(config: Any) -> int | None:
    if config.model_type == "mimo_v2_flash":  # whose config has it beside the window, and nothing reads it
        return None
    return getattr(config, "attention_chunk_size", None)


LIMITS = (
    Limit(
        "layer_types",
        "of layers, full_attention, a family's own linear_attention and sliding_attention with a window are computed",
        _other_layers,
    ),
    Limit(
        "sliding_window",
        "layers of families without windows here equal full attention up to its length only",
        _sliding_window,
    ),
    Limit("attention_chunk_size", "attention within chunks equals full attention up to one chunk only", _chunk),
    Limit(
        "dual_chunk_attention_config",
        "beyond one chunk it counts positions chunk by chunk, which Helix does not",
        _dual_chunks,
    ),
)
