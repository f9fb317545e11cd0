"""What `load_spec` reads from a config, and what it refuses."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from helix.models.families import load_spec
from helix.models.spec import Experts

ROOT = Path(__file__).parents[3]
ROTARY = {
    "glm": GlmRotaryEmbedding,
    "llama": LlamaRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
    "qwen3_moe": Qwen3MoeRotaryEmbedding,
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "eos_token_id": 7,
}
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}


def rotary_of(module: str) -> Any:
    """The class that computes a family's angles in its model."""
    model = import_module(f"transformers.models.{module}.modeling_{module}")
    name = {"qwen3_5": "Qwen3_5TextRotaryEmbedding"}.get(module)
    names = [each for each in vars(model) if each.endswith("RotaryEmbedding")]
    return getattr(model, name or names[0])


def write_config(folder: Path, family: str, **settings: Any) -> Path:
    config = {"model_type": family, **SIZES, "rope_theta": 5e5, **settings}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize("family", ROTARY)
def test_spec_holds_the_sizes_of_the_config(tmp_path: Path, family: str) -> None:
    spec = load_spec(write_config(tmp_path, family))
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.ffn_size) == (family, 3, 64, 96)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 2, 16)
    assert (spec.vocab_size, spec.max_position, spec.rms_eps) == (320, 4096, 1e-5)
    assert spec.qkv_bias == (family in ("qwen2", "glm"))
    assert spec.qk_norm == (family in ("qwen3", "qwen3_moe"))
    assert (spec.experts is not None) == (family == "qwen3_moe")
    assert (spec.names.up is None) == (family == "glm")
    assert spec.rope.interleaved == (family == "glm")
    assert spec.rope.rotary_dim == (8 if family == "glm" else 16)
    assert not spec.tied_embeddings


@pytest.mark.parametrize(
    ("settings", "dense"), [({}, set()), ({"decoder_sparse_step": 2}, {0, 2}), ({"mlp_only_layers": [1]}, {1})]
)
def test_experts_follow_the_config(tmp_path: Path, settings: dict[str, Any], dense: set[int]) -> None:
    sizes = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
    spec = load_spec(write_config(tmp_path, "qwen3_moe", **sizes, **settings))
    assert spec.experts == Experts(
        num_experts=12, num_chosen=3, ffn_size=40, normalised=True, dense_layers=frozenset(dense)
    )
    assert [spec.experts_of(layer) is None for layer in range(3)] == [layer in dense for layer in range(3)]


def test_switches_follow_the_config(tmp_path: Path) -> None:
    assert load_spec(write_config(tmp_path, "llama", tie_word_embeddings=True)).tied_embeddings
    assert not load_spec(write_config(tmp_path, "glm", attention_bias=False)).qkv_bias
    for family in ("llama", "qwen3", "qwen3_moe"):
        biased = load_spec(write_config(tmp_path, family, attention_bias=True))
        assert biased.qkv_bias and biased.o_bias
    assert load_spec(write_config(tmp_path, "glm", partial_rotary_factor=0.25)).rope.rotary_dim == 4


def test_head_dim_defaults_to_an_equal_share_of_the_hidden_size(tmp_path: Path) -> None:
    for family in ("llama", "qwen2"):
        assert load_spec(write_config(tmp_path, family, head_dim=None)).head_dim == 8


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", ROTARY)
def test_rope_equals_the_reference_model(tmp_path: Path, family: str, scaling: str) -> None:
    rope = load_spec(write_config(tmp_path, family, rope_scaling=SCALINGS[scaling])).rope
    reference: Any = ROTARY[family](AutoConfig.from_pretrained(tmp_path))
    assert rope.inv_freq.dtype == torch.float32
    assert torch.equal(rope.inv_freq, reference.inv_freq)
    assert rope.attention_scaling == reference.attention_scaling
    assert (rope.attention_scaling != 1.0) == (scaling == "yarn")


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("mistral", "mistral"),
        ("mixtral", "mixtral"),
        ("seed_oss", "seed_oss"),
        ("gpt_oss", "gpt_oss"),
        ("glm4", "glm4"),
        ("glm4_moe", "glm4_moe"),
        ("qwen3_next", "qwen3_next"),
        ("qwen3_5_text", "qwen3_5"),
    ],
)
@pytest.mark.parametrize("scaling", ["default", "yarn"])
def test_rope_of_other_families_equals_their_models(tmp_path: Path, family: str, module: str, scaling: str) -> None:
    shared = {"rope_theta": 5e5, **(SCALINGS[scaling] or {"rope_type": "default"})}
    folder = write_config(tmp_path, family, rope_parameters=shared, rope_theta=None, layer_types=None)
    rope = load_spec(folder).rope
    reference = rotary_of(module)(AutoConfig.from_pretrained(folder))
    assert torch.equal(rope.inv_freq, reference.inv_freq)
    assert rope.attention_scaling == reference.attention_scaling


@pytest.mark.parametrize(("family", "module"), [("gemma3_text", "gemma3"), ("mimo_v2_flash", "mimo_v2_flash")])
def test_rope_of_each_kind_of_layers_equals_the_model(tmp_path: Path, family: str, module: str) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    own = {"full_attention": {"rope_theta": 5e5, **SCALINGS["linear"]}, "sliding_attention": {"rope_theta": 1e4}}
    more = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"} if module == "gemma3" else {"v_head_dim": 16}
    folder = write_config(
        tmp_path, family, rope_parameters=own, rope_theta=None, layer_types=kinds, sliding_window=32, **more
    )
    spec = load_spec(folder)
    reference = rotary_of(module)(AutoConfig.from_pretrained(folder))
    assert spec.window_rope is not None
    for kind, rope in (("full_attention", spec.rope), ("sliding_attention", spec.window_rope)):
        assert torch.equal(rope.inv_freq, getattr(reference, f"{kind}_inv_freq"))
    assert not torch.equal(spec.rope.inv_freq, spec.window_rope.inv_freq)


def test_one_rope_for_layers_that_turn_alike(tmp_path: Path) -> None:
    own = {kind: {"rope_theta": 5e5, "rope_type": "default"} for kind in ("full_attention", "sliding_attention")}
    with pytest.raises(ValueError, match=r"family gpt_oss turns all layers alike: give rope_type and rope_theta"):
        load_spec(write_config(tmp_path, "gpt_oss", rope_parameters=own, rope_theta=None))


def test_specs_are_read_without_the_models_files(tmp_path: Path) -> None:
    """What they import takes seconds."""
    folder = write_config(tmp_path, "glm")
    heavy = "[name for name in ('transformers.models.glm.modeling_glm', 'torch._dynamo') if name in sys.modules]"
    code = f"import sys; from helix.models.families import load_spec; load_spec({str(folder)!r}); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_scalings_differ_from_each_other(tmp_path: Path) -> None:
    """Guards the test above: a config whose scaling is dropped would agree with a reference that drops it too."""
    found = [load_spec(write_config(tmp_path, "llama", rope_scaling=scaling)).rope for scaling in SCALINGS.values()]
    for i, left in enumerate(found):
        for right in found[i + 1 :]:
            assert not torch.allclose(left.inv_freq, right.inv_freq)
    assert torch.allclose(found[0].inv_freq[1], torch.tensor(5e5) ** (-2 / 16))


def test_old_spelling_of_the_rope_type_is_understood(tmp_path: Path) -> None:
    old = load_spec(write_config(tmp_path, "llama", rope_scaling={"type": "linear", "factor": 4.0})).rope
    new = load_spec(write_config(tmp_path, "llama", rope_scaling=SCALINGS["linear"])).rope
    assert torch.equal(old.inv_freq, new.inv_freq)


def test_path_may_be_the_config_file_itself(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "qwen3")
    assert load_spec(folder / "config.json").num_layers == load_spec(str(folder)).num_layers == 3


def test_generation_config_overrides_the_eos_ids(tmp_path: Path) -> None:
    write_config(tmp_path, "llama")
    assert load_spec(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_spec(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    assert load_spec(tmp_path).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        ("5", (5,)),
        (5.0, (5,)),
        ([[5], ["6", 6.0]], (5, 6)),
        ([None, 5, -1], (5,)),
        ([], ()),
        ([5, 5], (5,)),
    ],
)
def test_eos_ids_of_odd_types_are_read(tmp_path: Path, value: Any, ids: tuple[int, ...]) -> None:
    for family in ("llama", "qwen3_moe"):
        assert load_spec(write_config(tmp_path, family, eos_token_id=value, pad_token_id=[0.5])).eos_token_ids == ids
    write_config(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert load_spec(tmp_path).eos_token_ids == (ids or (7,))


@pytest.mark.parametrize("value", ["</s>", 5.5, True, -2, {"id": 5}, [5, ["x"]], float("inf")])
def test_eos_ids_that_could_mean_anything_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"eos_token_id = .*; must be a token id or a list of them"):
        load_spec(write_config(tmp_path, "llama", eos_token_id=value))
    write_config(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id = .*; must be"):
        load_spec(tmp_path)


def test_max_position_can_be_overridden_and_what_exceeds_the_models_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_config(tmp_path, "llama")
    load_spec(folder, max_position=1 << 22)  # as a run's settings are checked, before anything is logged
    with caplog.at_level("INFO"):
        assert load_spec(folder, max_position=4096).max_position == 4096 and not caplog.messages
        spec = load_spec(folder, max_position=1 << 22)
        load_spec(folder, max_position=1 << 22)  # for a hash of the model
    assert spec.max_position == 1 << 22
    [said] = caplog.messages
    assert "model.max_position = 4194304 exceeds the 4096 tokens that model.path = " in said
    assert torch.equal(spec.rope.inv_freq, load_spec(tmp_path).rope.inv_freq)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "gemma2",
            {},
            "has model_type 'gemma2'; supported: deepseek_v2, deepseek_v3, gemma3, ",
        ),
        ("chatglm", {"auto_map": {"AutoConfig": "code.Config"}}, "has model_type 'chatglm'; supported: deepseek"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias = True; Helix has no biases of gated queries"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; Helix computes 'silu' only"),
        ("glm", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method = 'gptq'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'; supported"),
        ("llama", {"num_key_value_heads": 3}, "num_heads = 8 is not a multiple of num_kv_heads = 3"),
        ("mimo_v2_flash", {"swa_head_dim": 64}, "swa_head_dim = 64; Helix computes 16 beside"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [1, 0, 0]}, "hybrid_layer_pattern = [1, 0, 0]; Helix computes [0,"),
        ("llama", {"num_hidden_layers": 0}, "num_layers = 0, must be an integer of at least 1"),
        ("llama", {"head_dim": -1}, "RuntimeError: upper bound and lower bound inconsistent"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "ZeroDivisionError: integer modulo by zero"),
        ("llama", {"model_type": []}, "has model_type []; supported: deepseek_v2"),
    ],
)
@pytest.mark.filterwarnings("default")  # transformers warns of some of these configs; here only the refusal counts
def test_unsupported_config_is_refused(tmp_path: Path, family: str, settings: dict[str, Any], message: str) -> None:
    write_config(tmp_path, family, **settings)
    with pytest.raises(ValueError) as refusal:
        load_spec(tmp_path)
    text = str(refusal.value)
    assert message in text
    assert f"model.path = {tmp_path}" in text
    assert "\n" not in text


def test_wrong_type_in_the_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path = ") as refusal:
        load_spec(write_config(tmp_path, "llama", hidden_size="wide"))
    assert "hidden_size" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path = .*nowhere does not exist"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",\n oops}')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: line 2, "):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config.json holds list, must be a JSON object"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        load_spec(tmp_path)
    write_config(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is not valid JSON"):
        load_spec(tmp_path)


def test_importing_the_package_does_not_import_transformers() -> None:
    program = "import sys, helix.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0
