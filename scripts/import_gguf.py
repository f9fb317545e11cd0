"""Turn a GGUF file of a supported family into a Hugging Face checkpoint folder.

    python -m scripts.import_gguf FILE.gguf output=DIR dtype=bfloat16

The folder gets config.json, generation_config.json, the tokenizer with its chat template, and the weights as
safetensors, no longer quantised. transformers unpacks the weights and rebuilds the tokenizer; what it leaves out is put
right here: the size of heads and experts, RoPE scaling, how text is split before tokens are merged, and every token
that ends a turn. What is not known to come over unchanged is refused.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helix.models.tokenizer import load_tokenizer
from scripts import cli

DTYPES = ("float32", "bfloat16", "float16")
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
REQUIRED_KEYS = (
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
)
ROPE_KEYS = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
CHECKED_KEYS = ("attention.value_length", "rope.dimension_count", "rope.scaling.finetuned", *ROPE_KEYS)
LLAMA3_FACTORS = "rope_freqs.weight"  # a factor a frequency, instead of the rule that made them
CONTROL = 3  # the token type of special tokens
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """What to turn into what.

    Attributes:
        file: the GGUF file; FILE without a key is the same.
        output: the folder to make; it must not be there yet, or be empty.
        dtype: of the weights that are written: float32, bfloat16 or float16.
        tokenizer: a folder that has the model's tokenizer, to take instead of the file's.
    """

    file: str = ""
    output: str = ""
    dtype: str = "bfloat16"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r} must be one of {', '.join(DTYPES)}")
        for key in ("file", "output"):
            if not getattr(self, key):
                raise ValueError(f"{key} is missing: python -m scripts.import_gguf FILE.gguf output=DIR")


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        values: its metadata, by key.
        tensors: the names of its tensors.
    """

    path: Path
    values: dict[str, Any]
    tensors: frozenset[str]

    @property
    def arch(self) -> str:
        """The architecture, which begins the keys of its sizes."""
        return str(self.values.get("general.architecture"))

    def size(self, key: str) -> Any:
        """Return the value of a key of the architecture, or None."""
        return self.values.get(f"{self.arch}.{key}")

    def of_tokenizer(self, key: str) -> Any:
        """Return the value of a key of the tokenizer, or None."""
        return self.values.get(f"tokenizer.ggml.{key}")


def read_gguf(path: Path) -> GgufFile:
    """Return the header of a file.

    Raises:
        ValueError: when the package that reads it is missing, and when the file is, or is no GGUF.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ValueError("reading GGUF needs the extra demo: pip install -c constraints.txt -e '.[demo]'") from error
    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise ValueError(f"file = {path} cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError) as error:  # what the reader raises for bytes that are no GGUF, or too few
        raise ValueError(f"file = {path} is no whole GGUF file: {error}") from error
    values = {key: _shortest(field.contents()) for key, field in reader.fields.items()}
    return GgufFile(path, values, frozenset(tensor.name for tensor in reader.tensors))


def config_of(file: GgufFile) -> Any:
    """Return the transformers config that the metadata describes.

    Raises:
        ValueError: for another family, and for a setting that is not known to come over unchanged.
    """
    from transformers import AutoConfig

    if file.arch not in FAMILIES:
        raise ValueError(f"general.architecture = {file.arch}: import_gguf reads {', '.join(FAMILIES)}")
    for key, value in file.values.items():
        name = key.removeprefix(f"{file.arch}.")
        if name != key and name not in CONFIG_KEYS and name not in CHECKED_KEYS:
            raise ValueError(f"{key} = {value} is not a setting that import_gguf knows; use the model's own checkpoint")
    if file.values.get("split.count", 1) != 1:
        raise ValueError(f"file = {file.path} is one of {file.values['split.count']} that belong together; merge them")
    for key in REQUIRED_KEYS:
        if type(file.size(key)) is not int:
            raise ValueError(
                f"{file.arch}.{key} = {file.size(key)} must be one integer; use the model's own checkpoint"
            )
    if file.arch != "qwen3moe" and file.size("expert_count"):
        raise ValueError(f"{file.arch}.expert_count = {file.size('expert_count')}: only qwen3moe may have experts")
    settings = {name: file.size(key) for key, name in CONFIG_KEYS.items() if file.size(key) is not None}
    heads = settings["num_attention_heads"]
    settings.setdefault("head_dim", file.size("rope.dimension_count") or settings["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.size(key) not in (None, settings["head_dim"]):
            raise ValueError(f"{file.arch}.{key} = {file.size(key)} is not the heads' size, {settings['head_dim']}")
    settings.setdefault("vocab_size", len(file.of_tokenizer("tokens") or ()))
    settings["rope_parameters"] = {"rope_theta": settings.pop("rope_theta", 10000.0), **_rope_scaling(file)}
    if file.arch == "qwen3moe":
        settings["norm_topk_prob"] = True  # what the format means by this architecture
    biases = {"attention_bias": True} if "blk.0.attn_q.bias" in file.tensors and file.arch != "qwen2" else {}
    config = AutoConfig.for_model(
        FAMILIES[file.arch],
        **settings,
        **biases,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.of_tokenizer("bos_token_id"),
        eos_token_id=_ends(file)[0] if _ends(file) else None,
        pad_token_id=file.of_tokenizer("padding_token_id"),
    )
    if LLAMA3_FACTORS in file.tensors:
        _add_llama3_scaling(config, file)
    return config


def tokenizer_of(file: GgufFile) -> Any:
    """Return the tokenizer that the metadata describes.

    Raises:
        ValueError: when the file has none, or one that cannot be rebuilt from it.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    way_out = "give tokenizer=DIR, a folder that has the model's own"
    tokens, split = file.of_tokenizer("tokens"), file.of_tokenizer("pre") or "default"
    if not tokens:
        raise ValueError(f"file = {file.path} has no tokenizer; {way_out}")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    except Exception as error:  # whatever the library's converters raise
        raise ValueError(f"file = {file.path}: its tokenizer was refused: {error}; {way_out}") from error
    if split == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif split not in ("default", "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS):
        raise ValueError(f"tokenizer.ggml.pre = {split} is a way to split text that is not known here; {way_out}")
    for number, (token, kind) in enumerate(zip(tokens, file.of_tokenizer("token_type") or (), strict=False)):
        if kind == CONTROL and tokenizer(token, add_special_tokens=False)["input_ids"] != [number]:
            raise ValueError(f"token {number}, {token!r}, is not one token to the rebuilt tokenizer; {way_out}")
    tokenizer.model_max_length = file.size("context_length")
    return tokenizer


def model_of(file: GgufFile, config: Any, dtype: torch.dtype) -> Any:
    """Return the transformers model with the file's weights in a dtype.

    Raises:
        ValueError: unless every tensor of the file has a place in the model, and every weight of the model a tensor.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(file.arch, TensorProcessor)(config=config.to_dict())
    places = get_gguf_hf_weights_map(model, processor)
    known = {*places, *(f"{name}.weight" for name in places), LLAMA3_FACTORS}  # stacked experts have no ending there
    homeless = sorted(file.tensors - known)
    if homeless:
        raise ValueError(f"file = {file.path}: {homeless[0]} and {len(homeless) - 1} others have no place in the model")
    weights = load_gguf_checkpoint(str(file.path), return_tensors=True, model_to_load=model, torch_dtype=dtype)
    missing, unknown = model.load_state_dict(weights["tensors"], strict=False, assign=True)
    missing = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or unknown:
        raise ValueError(f"file = {file.path} lacks {len(missing)} weights of the model: {[*missing, *unknown][0]}")
    model.tie_weights()
    model.config.dtype = dtype
    return model


def import_gguf(config: ImportConfig) -> Path:
    """Make the folder, whole or not at all, and return it.

    Raises:
        ValueError: in one line, for a file that does not come over, and an output that is in use.
    """
    from transformers import GenerationConfig

    path, output = Path(config.file).expanduser(), Path(config.output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output = {output} is there already; give a folder that is new or empty")
    file = read_gguf(path)
    settings = config_of(file)
    tokenizer = tokenizer_of(file) if config.tokenizer is None else _tokenizer_in(config.tokenizer)
    model = model_of(file, settings, getattr(torch, config.dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=settings.bos_token_id, eos_token_id=_ends(file) or None, pad_token_id=settings.pad_token_id
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as beside:
        part = Path(beside) / "whole"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.replace(output)
    return output


def run(config: ImportConfig) -> None:
    """Run the command."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    output = import_gguf(config)
    num_bytes = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: {num_bytes / 1e6:.0f} MB, {config.dtype}")


def _tokenizer_in(folder: str) -> Any:
    """Return the tokenizer of another folder; ValueError where it has none that loads."""
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "tokenizer", 1)) from error
    if tokenizer is None:
        raise ValueError(f"tokenizer = {folder} has no tokenizer's files")
    return tokenizer


def _ends(file: GgufFile) -> list[int]:
    """Return the ids of the tokens that end a turn, the model's first."""
    ids = [file.of_tokenizer(key) for key in END_KEYS]
    return list(dict.fromkeys(int(number) for number in ids if number is not None))


def _rope_scaling(file: GgufFile) -> dict[str, Any]:
    kind, factor, original = (file.size(key) for key in ROPE_KEYS)
    if kind in (None, "none"):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ValueError(f"{file.arch}.rope.scaling.type = {kind}: import_gguf knows none, linear and yarn")


def _add_llama3_scaling(config: Any, file: GgufFile) -> None:
    """Find the rule of Llama 3 that gives the file's factors; ValueError where it does not."""
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = next(tensor.data for tensor in GGUFReader(file.path).tensors if tensor.name == LLAMA3_FACTORS)
    theta, dim = config.rope_parameters["rope_theta"], config.head_dim
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(np.max(given)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    made, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if not torch.allclose(plain / torch.from_numpy(np.array(given, np.float64)), made.double(), rtol=1e-4):
        raise ValueError(f"{LLAMA3_FACTORS} is not Llama 3's rule of a factor {np.max(given)} beyond 8192 tokens")


def _shortest(value: Any) -> Any:
    """Return a float32 as the shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


if __name__ == "__main__":
    sys.argv[1:] = [
        argument
        if argument.startswith("-") or ("=" in argument and not Path(argument).is_file())
        else f"file={argument}"
        for argument in sys.argv[1:]
    ]
    cli.main("import_gguf", ImportConfig, run)
