"""Reading a Hugging Face config: what all families share, and the refusals.

The config object is transformers' own, so that old and new spellings of a setting (`rope_scaling`, `rope_parameters`)
come out alike. Its models' files are not imported, which would take seconds. Whatever a config may ask for that
the runtime would compute wrongly without a word is refused here, with the setting's name.
"""

import copy
from typing import Any

import torch

from ..checks import one_line
from .kinds import FULL, STATE, WINDOW, Kind
from .rope import RopeSpec
from .spec import Experts, Latent, ModelSpec
from .weight_names import WeightNames

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
UNUSED = {"bos_token_id": None, "pad_token_id": None}  # whatever they hold, nothing here reads them


def read_config(raw: dict[str, Any]) -> Any:
    """Return the transformers config of the JSON object `raw`; no code is taken from the checkpoint.

    Raises ValueError when transformers itself refuses the config.
    """
    from transformers import CONFIG_MAPPING

    known = copy.deepcopy(raw) | UNUSED
    if "eos_token_id" in raw:  # transformers refuses an id that is no integer
        known["eos_token_id"] = list(as_token_ids(raw["eos_token_id"])) or None
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(known)
    except Exception as error:  # the library's validation raises its own types, which differ between its versions
        raise ValueError(f"config.json was refused: {one_line(error)}") from error


def spec_from(
    config: Any,
    family: str,
    *,
    turned_share: float | None = None,
    activation: str = "silu",
    qkv_bias: bool = False,
    qk_norm: bool = False,
    interleaved: bool = False,
    names: WeightNames | None = None,
    experts: Experts | None = None,
    latent: Latent | None = None,
    **more: Any,
) -> ModelSpec:
    """Return the spec of `config`, given what distinguishes its family.

    ``turned_share``: see ``rope_of``. ``activation`` is what the family calls its gate's. ``more`` are other fields of
    the spec.

    Raises ValueError for a setting that Helix does not compute.
    """
    said = getattr(config, "hidden_act", activation)
    require(said == activation, "hidden_act", said, f"Helix computes {activation!r} only")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = config.num_key_value_heads or config.num_attention_heads
    if latent is not None:  # what is cached of a token is one head, for all
        head_dim, num_kv_heads = latent.rank + latent.turned_dim, 1
    return ModelSpec(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=getattr(config, "intermediate_size", None) or config.moe_intermediate_size,
        vocab_size=config.vocab_size,
        rms_eps=config.rms_norm_eps,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied_embeddings=bool(config.tie_word_embeddings),
        max_position=config.max_position_embeddings,
        rope=rope_of(
            config, turned_share, interleaved=interleaved, kind=FULL_ATTENTION if "window_rope" in more else None
        ),
        eos_token_ids=as_token_ids(config.eos_token_id),
        names=names or WeightNames(),
        experts=experts,
        latent=latent,
        **more,
    )


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise ValueError "config NAME = VALUE; RULE" unless `ok`."""
    if not ok:
        raise ValueError(f"config {name} = {value!r}; {rule}")


def require_full_rotation(spec: ModelSpec) -> ModelSpec:
    """Return `spec`; raise ValueError unless RoPE turns whole heads, which is all that its family does."""
    rule = f"family {spec.family} rotates all {spec.head_dim} elements of a head"
    require(spec.rope.rotary_dim == spec.head_dim, "rotary size", spec.rope.rotary_dim, rule)
    return spec


def rope_of(
    config: Any, turned_share: float | None = None, *, interleaved: bool = False, kind: str | None = None
) -> RopeSpec:
    """Return how positions rotate.

    turned_share: the part of a head that turns where the config does not say; None for a family that turns all of it.
    kind: of layers, in a family whose config may say it of each kind.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = kind is not None and kind in settings
    rule = f"family {config.model_type} turns all layers alike: give rope_type and rope_theta"
    require(kind is not None or FULL_ATTENTION not in settings, "rope_parameters", settings, rule)
    for each in settings.values() if several else (settings,):
        rope_type = each.get("rope_type", each.get("type", "default"))
        require(rope_type in ROPE_TYPES, "rope_type", rope_type, f"supported: {', '.join(ROPE_TYPES)}")
    own = settings[kind] if several else settings
    rope_type = own.get("rope_type", own.get("type", "default"))
    if rope_type == "default":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if turned_share is not None:
            size = int(size * own.get("partial_rotary_factor", turned_share))
        inv_freq, scaling = 1.0 / (own["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size)), 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, None, layer_type=kind if several else None)
    return RopeSpec(
        inv_freq=inv_freq.to("cpu", torch.float32),
        attention_scaling=float(scaling),
        interleaved=interleaved,
        rotary_dim=2 * inv_freq.numel(),
    )


KINDS = {FULL_ATTENTION: FULL, SLIDING_ATTENTION: WINDOW, "linear_attention": STATE}


def layer_kinds(config: Any) -> tuple[Kind, ...]:
    """Return the kinds of layers that a config asks for by ``layer_types`` and ``sliding_window``; empty for all full.

    Without ``layer_types`` a window is that of every layer. Raises ValueError for a kind that Helix does not know.
    """
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not types:
        return (Kind(WINDOW, window),) * config.num_hidden_layers if window else ()
    for each in types:
        require(each in KINDS, "layer_types", each, f"Helix computes {', '.join(KINDS)}")
    kinds = tuple(Kind(KINDS[each], window or 0 if KINDS[each] == WINDOW else 0) for each in types)
    return kinds if any(kind.is_bounded for kind in kinds) else ()


def as_token_ids(value: Any) -> tuple[int, ...]:
    """Return a config's eos_token_id, which may be one id, several or none, as a tuple.

    Tools write ids as floats, as text and in lists of lists; -1 stands for none. Raises ValueError for anything else.
    """
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(token for each in value for token in as_token_ids(each)))
    try:
        token = -1 if value is None else int(value)
        if isinstance(value, bool) or token < -1 or (isinstance(value, float) and token != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"eos_token_id = {value!r}; must be a token id or a list of them") from None
    return () if token == -1 else (token,)
