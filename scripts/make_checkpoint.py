"""Make a tiny checkpoint of a supported family: random weights, a byte tokenizer, a chat template, a few MB at most.

    python -m scripts.make_checkpoint DIR --family llama

It is what the tests and the quickstart run on, so its weights are made for telling right from wrong. Freshly
initialised weights attend almost evenly, have biases of zero and norms of one, and repeat themselves: nearly any fault
in a runtime would pass unseen. Here attention is sharp and outweighs the token's own embedding, so the output depends
on every token of the prompt and on its position; biases and norms are random; and the logits are spread, so that
rounding does not decide which is the largest.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from helix.checks import one_line
from helix.models.families import TEXT_PARTS
from scripts.key_help import meanings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

FAMILIES = ("deepseek_v2", "deepseek_v3", "glm", "llama", "qwen2", "qwen3", "qwen3_moe")
BESIDE = ("glm4", "glm4_moe", "seed_oss")  # families that tests of all families leave out
# of gpt_oss every second layer, as of other families that may
WINDOWED = ("gemma3", "gpt_oss", "mimo_v2_flash", "mistral", "mixtral")
HYBRIDS = ("qwen3_5", "qwen3_5_moe", "qwen3_next")  # of state layers and attention, in turn
PASSKEY = "passkey"  # a Llama made by hand: scripts/passkey_model.py
ALL = (*FAMILIES, *BESIDE, *WINDOWED, *HYBRIDS, PASSKEY)
DTYPES = ("float32", "bfloat16", "float16")
GROUPED, NUM_GROUPS = ("deepseek_v2", "deepseek_v3", "glm4_moe", "mimo_v2_flash"), 3  # whose experts stand in groups
MAY_BE_0 = ("kv_heads", "experts", "window", "seed")
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>")
NUM_BYTES = 256
EOS_ID = NUM_BYTES + SPECIAL_TOKENS.index("<|eos|>")
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|eos|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# First match wins; everything else has gain 1. Scores come out at about 4, so that a head picks few of its tokens, and
# o lifts their average above the embedding. A v bias is the same for all tokens: a large one would drown the rest.
GAINS = {
    "q_proj.bias": 0.5,
    "k_proj.bias": 0.5,
    "v_proj.bias": 0.1,
    "o_proj.bias": 0.5,
    "q_proj": 2.0,
    "k_proj": 2.0,
    "q_b_proj": 3.0,
    "kv_b_proj": 1.75,
    "q_norm": 2.0,
    "k_norm": 2.0,
    "o_proj": 4.0,
    "sinks": 2.0,
    "proj_bias": 0.5,
    "gate": 1.5,
    "down_proj": 2.0,
    "lm_head": 5.0,
}


@dataclass(frozen=True)
class Recipe:
    """The model to make.

    Attributes:
        family: the model_type of its config; passkey is a Llama of a size of its own whose weights find a key anywhere
            in a text (scripts/passkey_model.py): of what follows it takes max_position, dtype and max_shard_size alone.
        layers: decoder layers.
        hidden: elements of a row.
        heads: query heads.
        kv_heads: KV heads; 0 is the family's own default, 2 for glm, glm4, mimo_v2_flash and hybrids, else 4.
        head_dim: elements a head; deepseek_* have latents of twice as many, keys of so many, and of half as many that
            RoPE turns.
        ffn: units of a feed-forward network.
        experts: of qwen3_moe and qwen3_next, whose second layer has none, and of deepseek_*, glm4_moe and
            mimo_v2_flash, whose first has none; with 0 no layer.
        experts_chosen: experts that a token goes through.
        expert_ffn: units of an expert.
        vocab: 256 bytes, 6 special tokens, the rest "<|extra_ID|>".
        max_position: the model's own limit of context, in tokens.
        seed: of the weights.
        tied: use the embedding as the output head.
        dtype: float32, bfloat16 or float16.
        max_shard_size: a size such as 200KB splits the weights over several files; empty keeps one file.
        rope_scaling: the config's own setting of that name.
        window: tokens that layers with a window see; 0 for none.
        attention_bias: of llama, qwen3 and qwen3_moe: attention's projections have biases.
    """

    family: str = "llama"
    layers: int = 2
    hidden: int = 64
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 16
    ffn: int = 160
    experts: int = 6
    experts_chosen: int = 2
    expert_ffn: int = 72
    vocab: int = 320
    max_position: int = 65536
    seed: int = 0
    tied: bool = False
    dtype: str = "float32"
    max_shard_size: str = ""
    rope_scaling: dict[str, Any] | None = None
    window: int = 0
    attention_bias: bool = False

    def __post_init__(self) -> None:
        if self.family not in ALL:
            raise ValueError(f"family = {self.family!r}, must be one of {', '.join(ALL)}")
        if self.family == PASSKEY:
            fixed = {field.name: field.default for field in fields(Recipe)}
            for name in {*fixed} - {"family", "max_position", "dtype", "max_shard_size"}:
                if getattr(self, name) != fixed[name]:
                    raise ValueError(
                        f"{name} = {getattr(self, name)!r} is not for family = passkey, whose size is its own"
                    )
        if self.attention_bias and self.family not in ("llama", "qwen3", "qwen3_moe"):
            raise ValueError(f"attention_bias = true is not for family = {self.family}; for llama, qwen3 and qwen3_moe")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if self.vocab < NUM_BYTES + len(SPECIAL_TOKENS):
            raise ValueError(f"vocab = {self.vocab}, must be at least {NUM_BYTES + len(SPECIAL_TOKENS)}")
        for field in fields(Recipe):
            size, least = getattr(self, field.name), 0 if field.name in MAY_BE_0 else 1
            if field.type is int and not least <= size < 1 << 31:
                raise ValueError(f"{field.name} = {size}, must lie in [{least}, 2**31)")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads}, must divide heads = {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}, must be even: RoPE turns pairs")
        if 0 < self.experts < self.experts_chosen:
            raise ValueError(f"experts_chosen = {self.experts_chosen}, must be at most experts = {self.experts}")
        if self.family in GROUPED and self.experts % NUM_GROUPS:
            raise ValueError(
                f"experts = {self.experts}, must be a multiple of {NUM_GROUPS}, the groups of {self.family}"
            )


def make_checkpoint(path: str | Path, *, force: bool = False, **sizes: Any) -> Path:
    """Write a checkpoint folder at `path` and return it; `sizes` are the fields of `Recipe`.

    The same recipe gives the same weights. Raises ValueError when the folder holds files already, unless `force`,
    which replaces the weights, config and tokenizer in it, and for sizes that no model has.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from scripts.passkey_model import construct

    recipe, path = Recipe(**sizes), Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"DIR = {path} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise ValueError(f"DIR = {path} is not empty; --force replaces the checkpoint in it")
    path.mkdir(parents=True, exist_ok=True)
    for old in [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]:
        old.unlink()

    try:
        model = AutoModelForCausalLM.from_config(_config(recipe))
    except Exception as error:  # of a size that its family or this machine's memory does not take: types of the library
        raise ValueError(f"there is no {recipe.family} of these sizes: {one_line(error)}") from error
    if recipe.family == PASSKEY:
        construct(model)
    else:
        randomise(model, recipe.seed)
    model.generation_config = GenerationConfig(bos_token_id=NUM_BYTES, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    shards = {"max_shard_size": recipe.max_shard_size} if recipe.max_shard_size else {}
    with _no_progress_bar():
        model.to(getattr(torch, recipe.dtype)).save_pretrained(path, **shards)
    _tokenizer(recipe).save_pretrained(path)
    return path


def randomise(model: "torch.nn.Module", seed: int) -> None:
    """Overwrite every parameter of a transformers model, in the order of their names, from one seed.

    Gain g gives a matrix outputs of size g for inputs of size one; biases and embeddings have size g, norms about g.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
            if weight.dim() == 1 and "norm" in name:
                weight.uniform_(0.6 * gain, 1.6 * gain, generator=generator)
            elif weight.dim() == 1 or "embed" in name:
                weight.normal_(0.0, gain, generator=generator)
            else:
                weight.normal_(0.0, gain / weight.shape[-1] ** 0.5, generator=generator)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1, generator=generator)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _config(recipe: Recipe) -> Any:
    from transformers import AutoConfig

    from scripts.passkey_model import SIZES

    ends = {
        "vocab_size": recipe.vocab,
        "max_position_embeddings": recipe.max_position,
        "tie_word_embeddings": recipe.tied,
        "bos_token_id": NUM_BYTES,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }
    if recipe.family == PASSKEY:
        return AutoConfig.for_model("llama", **SIZES, **ends)
    more: dict[str, Any] = {"rope_scaling": recipe.rope_scaling} if recipe.rope_scaling else {}
    if recipe.family in ("qwen3_moe", "qwen3_next", "qwen3_5_moe"):
        more |= {
            "num_experts": recipe.experts,
            "num_experts_per_tok": recipe.experts_chosen,
            "moe_intermediate_size": recipe.expert_ffn,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        }
    if recipe.family == "gpt_oss":
        more |= {
            "num_local_experts": recipe.experts,
            "num_experts_per_tok": recipe.experts_chosen,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": recipe.max_position // 32, "rope_theta": 150000.0,
            },
            "swiglu_limit": 2.0,
        }  # fmt: skip
    of_all = recipe.family in ("mistral", "mixtral")
    if recipe.family == "mixtral":
        more |= {"num_local_experts": recipe.experts, "num_experts_per_tok": recipe.experts_chosen}
    if recipe.attention_bias:
        more["attention_bias"] = True
    if recipe.window or of_all:
        more["sliding_window"] = recipe.window or None
    if recipe.family == "gemma3":
        more |= {"query_pre_attn_scalar": 2 * recipe.head_dim}
    if recipe.window and not of_all:
        more["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(recipe.layers)]
        more["use_sliding_window"] = True
    if recipe.family in HYBRIDS:
        more |= {
            "layer_types": [("linear_attention", "full_attention")[layer % 2] for layer in range(recipe.layers)],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": recipe.heads,
            "linear_key_head_dim": recipe.head_dim,
            "linear_value_head_dim": recipe.head_dim - 4,
            "shared_expert_intermediate_size": recipe.expert_ffn,
        }
    if recipe.family == "glm4_moe":
        more |= {
            "attention_bias": True,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "n_routed_experts": recipe.experts or 6,
            "num_experts_per_tok": recipe.experts_chosen,
            "moe_intermediate_size": recipe.expert_ffn,
            "n_group": NUM_GROUPS,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1 if recipe.experts else recipe.layers,
        }
    if recipe.family == "mimo_v2_flash":
        sparse = "sparse" if recipe.experts else "dense"
        more |= {
            "v_head_dim": recipe.head_dim - 4,
            "layer_types": more.get("layer_types", ["full_attention"] * recipe.layers),
            "mlp_layer_types": ["dense"] + [sparse] * (recipe.layers - 1),
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
                for kind, theta in (("full_attention", 500_000.0), ("sliding_attention", 10_000.0))
            },
            "n_routed_experts": recipe.experts or 6,
            "num_experts_per_tok": recipe.experts_chosen,
            "moe_intermediate_size": recipe.expert_ffn,
            "n_group": NUM_GROUPS,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        }
    kv_heads = recipe.kv_heads or (2 if recipe.family in ("glm", "glm4", "mimo_v2_flash", *HYBRIDS) else 4)
    head_dim = recipe.head_dim
    if recipe.family.startswith("deepseek"):
        third = recipe.family == "deepseek_v3"
        kv_heads, head_dim = recipe.heads, recipe.head_dim // 2
        more |= {
            "kv_lora_rank": 2 * recipe.head_dim,
            "q_lora_rank": 3 * recipe.head_dim if third else None,
            "qk_nope_head_dim": recipe.head_dim,
            "qk_rope_head_dim": head_dim,
            "v_head_dim": recipe.head_dim + 4,
            "n_routed_experts": recipe.experts or 6,
            "num_experts_per_tok": recipe.experts_chosen,
            "moe_intermediate_size": recipe.expert_ffn,
            "n_shared_experts": 1,
            "n_group": NUM_GROUPS,
            "topk_group": 2,
            "topk_method": "noaux_tc" if third else "group_limited_greedy",
            "norm_topk_prob": third,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1 if recipe.experts else recipe.layers,
        }
    return AutoConfig.for_model(
        TEXT_PARTS.get(recipe.family, recipe.family),
        num_hidden_layers=recipe.layers,
        hidden_size=recipe.hidden,
        num_attention_heads=recipe.heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=recipe.ffn,
        **ends,
        **more,
    )


def _tokenizer(recipe: Recipe) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(_byte_letters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    extra = [f"<|extra_{number}|>" for number in range(NUM_BYTES + len(SPECIAL_TOKENS), recipe.vocab)]
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL_TOKENS, *extra)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.max_position,
        clean_up_tokenization_spaces=False,
    )


def _byte_letters() -> list[str]:
    """Return each byte's letter in byte-level BPE: its own character if printable, else one from U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(NUM_BYTES)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main() -> None:
    """Run the command line."""
    parser = _Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dir", metavar="DIR", type=Path)
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there already")
    said = dict(meanings(Recipe))
    for item in fields(Recipe):
        flag, text = "--" + item.name.replace("_", "-"), said[item.name]
        if item.name == "family":
            parser.add_argument(flag, choices=ALL, required=True, help=text)
        elif item.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif item.name == "dtype":
            parser.add_argument(flag, choices=DTYPES, default=item.default, help=f"{text} Default: %(default)s")
        elif item.name != "rope_scaling":
            text += f" Default: {item.default or repr(item.default)}"
            parser.add_argument(flag, type=type(item.default), default=item.default, help=text)
    options = vars(parser.parse_args())
    path = options.pop("dir")
    try:
        make_checkpoint(path, **options)
    except ValueError as error:
        parser.error(str(error))
    print(f"{path}: {options['family']}, {sum(file.stat().st_size for file in path.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
