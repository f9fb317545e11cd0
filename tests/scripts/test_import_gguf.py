"""A GGUF file becomes the checkpoint that it was made of, and what would not come over unchanged is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from helix.models.families import load_spec
from scripts.import_gguf import ImportConfig, import_gguf
from scripts.make_checkpoint import make_checkpoint

gguf = pytest.importorskip("gguf", reason="needs the extra demo")
FILE = "model.safetensors"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join the matrices of a layer's experts into one tensor, the first as the first."""
    experts: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors):  # as many as one digit counts
        if ".experts." in name:
            experts.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(tensors[name])
    plain = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    return plain | {name: np.stack(each) for name, each in experts.items()}


def write_gguf(path: Path, folder: Path, arch: str, **more: Any) -> Path:
    """Write a checkpoint as llama.cpp's converter does; ``more`` are further keys of the architecture."""
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 7)
    for key, value in more.items():
        writer.add_uint32(f"{arch}.{key}", value)
    if arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    for name, array in stacked({name: tensor.numpy() for name, tensor in load_file(folder / FILE).items()}).items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):  # llama.cpp turns neighbours, not halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    if config.rope_parameters["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = plain / load_spec(folder).rope.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("family", "arch", "sizes"),
    [
        ("llama", "llama", {"rope_scaling": LLAMA3, "head_dim": 32, "attention_bias": True}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"tied": True, "heads": 6, "kv_heads": 2}),
        ("qwen3_moe", "qwen3moe", {"layers": 1}),
    ],
)
def test_weights_and_config_are_those_that_the_file_was_made_of(
    tmp_path: Path, family: str, arch: str, sizes: dict[str, Any]
) -> None:
    source = make_checkpoint(tmp_path / "source", family=family, **sizes)
    file = write_gguf(tmp_path / "model.gguf", source, arch)
    made = import_gguf(
        ImportConfig(file=str(file), output=str(tmp_path / "made"), dtype="float32", tokenizer=str(source))
    )
    ours, theirs = load_file(made / FILE), load_file(source / FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    here, there = load_spec(made), load_spec(source)
    assert here.experts == there.experts
    for name in ("head_dim", "num_heads", "num_kv_heads", "tied_embeddings", "max_position", "rms_eps", "ffn_size"):
        assert getattr(here, name) == getattr(there, name), name
    torch.testing.assert_close(here.rope.inv_freq, there.rope.inv_freq)
    assert here.eos_token_ids == (there.eos_token_ids[0], 7)  # both tokens that the file says end a turn
    assert AutoTokenizer.from_pretrained(made).chat_template == AutoTokenizer.from_pretrained(source).chat_template


@pytest.mark.parametrize(
    ("arch", "more", "message"),
    [
        ("qwen3", {"attention.sliding_window": 128}, "qwen3.attention.sliding_window = 128 is not a setting"),
        ("llama", {"expert_count": 4}, "llama.expert_count = 4: only qwen3moe"),
        ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count = 8 is not the heads' size, 16"),
        ("stablelm", {}, "general.architecture = stablelm: import_gguf reads llama, qwen2, qwen3, qwen3moe"),
    ],
)
def test_what_would_not_come_over_is_refused_by_name(
    tmp_path: Path, arch: str, more: dict[str, int], message: str
) -> None:
    source = make_checkpoint(tmp_path / "source", family="llama")
    file = write_gguf(tmp_path / "model.gguf", source, arch, **more)
    with pytest.raises(ValueError, match=message):
        import_gguf(ImportConfig(file=str(file), output=str(tmp_path / "made"), tokenizer=str(source)))
    assert not (tmp_path / "made").exists()


def test_files_that_are_not_whole_and_folders_in_use_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", family="qwen3")
    file = write_gguf(tmp_path / "model.gguf", source, "qwen3")
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:3000])
    (tmp_path / "text.gguf").write_text("no weights here")
    made = str(tmp_path / "made")
    for name, message in (
        ("short.gguf", "is no whole GGUF file"),
        ("text.gguf", "is no whole GGUF file"),
        ("absent.gguf", "cannot be read: No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            import_gguf(ImportConfig(file=str(tmp_path / name), output=made, tokenizer=str(source)))
    with pytest.raises(ValueError, match="is there already; give a folder that is new or empty"):
        import_gguf(ImportConfig(file=str(file), output=str(source)))
    with pytest.raises(ValueError, match="has no tokenizer; give tokenizer=DIR"):
        import_gguf(ImportConfig(file=str(file), output=made))
