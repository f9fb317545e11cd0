"""A real model tells what random weights cannot: turns end, stop strings come, text repeats, characters span tokens.

The model is the one that scripts/quickstart.sh makes, SmolLM2-135M-Instruct.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from attention import pages
from helix import LLM, HelixConfig, Request, RequestOutput, SamplingParams
from helix.config import CacheConfig, ModelConfig, RuntimeConfig, SpeculativeConfig
from helix.detokenize import Detokenizer
from helix.models.decoder import Decoder
from scripts.pass_key import hide
from scripts.quantize import quantize_checkpoint
from scripts.quickstart import count_equal

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "quickstart" / "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason="quickstart/smollm2 is missing; bash scripts/quickstart.sh makes it"
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Drafts, since greedy tokens may not depend on it."""
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(MODEL), dtype="float32"),
            cache=CacheConfig(num_pages=64),
            speculative=SpeculativeConfig(method="ngram"),
            runtime=RuntimeConfig(device="cpu"),
        )
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def ask(llm: LLM, **settings: Any) -> tuple[RequestOutput, list[str]]:
    """Return what became of the question, and the pieces of text as they came."""
    pieces, output = [], None
    for event in llm.stream([Request(messages=QUESTION)], SamplingParams(max_tokens=24, **settings)):
        pieces.append(event.text)
        output = event.output or output
    assert output is not None
    return output, pieces


def test_a_turn_of_the_chat_template_is_answered_and_ends(llm: LLM, tokenizer: Any) -> None:
    output, pieces = ask(llm)
    assert output.text == "".join(pieces) == "The capital of France is Paris."
    assert (output.finish_reason, tokenizer.decode(output.token_ids[-1:])) == ("stop", "<|im_end|>")


def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(llm: LLM) -> None:
    for stop, text in (
        ("France", "The capital of "),
        ("tal of Fr", "The capi"),
        (" is Paris.", "The capital of France"),
    ):
        output, pieces = ask(llm, stop=[stop])
        assert (output.text, "".join(pieces), output.finish_reason) == (text, text, "stop")


def test_drafts_of_a_text_that_repeats_itself_are_mostly_right_and_change_no_token(llm: LLM, tokenizer: Any) -> None:
    words = (ROOT / "LICENSE").read_text("utf-8").split()
    passage = tokenizer(" ".join(words[300:360]))["input_ids"]
    prompt = 2 * passage + passage[:20]
    output = llm.generate([prompt], SamplingParams(max_tokens=40))[0]
    made = llm.metrics.speculative
    assert made is not None
    assert made.accepted > 0.6 * made.drafted > 12
    assert count_equal(str(MODEL), [(prompt, output.token_ids)]) == 40


def test_streamed_text_is_the_text_whatever_characters_tokens_split(tokenizer: Any) -> None:
    text = "naïve café, 3  spaces\t5, Ünïcödé, 日本語のテキスト, 🙂👩‍👩‍👧 and\n\n  don't 12345"
    ids = tokenizer(text)["input_ids"]
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)  # some tokens are no whole character
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join([*pieces, detokenizer.finish()]) == detokenizer.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_imported_tokenizer_splits_text_as_the_model_learned_it(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a  12 x") == ["a", "ĠĠ", "1", "2", "Ġx"]  # digits stand alone, before spaces are split
    assert tokenizer("<|im_start|>user")["input_ids"] == [1, 4093]
    assert tokenizer.eos_token_id == 2 and tokenizer.model_max_length == 8192


def perplexity(path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch, cache: str = "auto") -> float:
    """Return that of the tokens after the first, from the hidden states of one chunk."""
    model, held = ModelConfig(path=str(path), dtype="bfloat16"), CacheConfig(num_pages=16, dtype=cache)
    llm = LLM(HelixConfig(model=model, cache=held, runtime=RuntimeConfig(device="cpu")))
    decoder, seen = llm.runner.decoder, []

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(Decoder.forward(decoder, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(decoder, "forward", forward)
    llm.generate([ids], SamplingParams(max_tokens=1))
    assert len(seen[0]) == len(ids), "the prompt is no single chunk"
    logits = decoder.gather_logits(decoder.local_logits(seen[0][:-1]))
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp())


def page_of_text(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(" ".join((ROOT / "LICENSE").read_text("utf-8").split()[300:700]))["input_ids"]
    return ids


@pytest.mark.slow
def test_weights_of_8_bits_cost_at_most_2_percent_of_perplexity(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is 576 wide and has 9 heads of 64: no width of it is a multiple of a block's 128."""
    ids = page_of_text(tokenizer)
    quantize_checkpoint(MODEL, tmp_path / "fp8")
    plain, ours = (perplexity(path, ids, monkeypatch) for path in (MODEL, tmp_path / "fp8"))
    print(f"perplexity {plain:.3f} -> {ours:.3f}")
    assert 1 < plain < 30
    assert ours <= 1.02 * plain, (plain, ours)


@pytest.mark.slow
def test_a_cache_of_8_bits_costs_at_most_1_percent_of_perplexity(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = page_of_text(tokenizer)
    plain, ours = (perplexity(MODEL, ids, monkeypatch, cache) for cache in ("auto", "fp8_e4m3"))
    print(f"perplexity {plain:.3f} -> {ours:.3f}")
    assert ours <= 1.01 * plain, (plain, ours)


@pytest.mark.slow
def test_k_biases_of_300_cost_a_cache_of_8_bits_little(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand where Qwen2.5's do: in the pair that RoPE turns least, so that they change every score alike."""
    tensors = load_file(MODEL / "model.safetensors")
    config = json.loads((MODEL / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    for layer in range(config["num_hidden_layers"]):
        for name in ("q", "k", "v"):
            module = f"model.layers.{layer}.self_attn.{name}_proj"
            tensors[f"{module}.bias"] = torch.zeros(tensors[f"{module}.weight"].shape[0])
        tensors[f"model.layers.{layer}.self_attn.k_proj.bias"][width // 2 - 1 :: width] = 300.0
    shutil.copytree(MODEL, tmp_path / "biased")
    save_file(tensors, tmp_path / "biased" / "model.safetensors", metadata={"format": "pt"})
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "biased" / "config.json").write_text(json.dumps(config))
    ids = page_of_text(tokenizer)
    plain, ours = (perplexity(tmp_path / "biased", ids, monkeypatch, cache) for cache in ("auto", "fp8_e4m3"))
    print(f"perplexity {plain:.3f} -> {ours:.3f}")
    assert 1 < plain < 30 and ours <= 1.05 * plain, (plain, ours)
    monkeypatch.setattr(pages, "quantize", lambda x: (x.float().to(pages.FP8), torch.ones(x.shape[:-1])))
    fixed = perplexity(tmp_path / "biased", ids, monkeypatch, "fp8_e4m3")
    assert fixed > 1.05 * plain, "a fixed scale of 1 would do as well"


@pytest.mark.slow
def test_pass_keys_are_found_in_a_cache_of_8_bits(tokenizer: Any) -> None:
    text = " ".join((ROOT / "LICENSE").read_text("utf-8").split()[:900])
    model, cache = ModelConfig(path=str(MODEL), dtype="float32"), CacheConfig(num_pages=64, dtype="fp8_e4m3")
    llm = LLM(HelixConfig(model=model, cache=cache, runtime=RuntimeConfig(device="cpu")))
    hidden = [hide(text, depth, tokenizer) for depth in (0.1, 0.5, 0.9)]
    outputs = llm.generate([each.token_ids for each in hidden], SamplingParams(max_tokens=16))
    for each, output in zip(hidden, outputs, strict=True):
        assert output.text is not None and each.key in output.text, (each.key, output.text)
