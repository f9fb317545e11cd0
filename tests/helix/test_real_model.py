"""A real model tells what random weights cannot: turns end, stop strings come, text repeats, characters span tokens.

The model is the one that scripts/quickstart.sh makes, SmolLM2-135M-Instruct.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from helix import LLM, HelixConfig, Request, RequestOutput, SamplingParams
from helix.config import CacheConfig, ModelConfig, RuntimeConfig, SpeculativeConfig
from helix.detokenize import Detokenizer
from helix.models.decoder import Decoder
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


def perplexity(path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return that of the tokens after the first, from the hidden states of one chunk."""
    model = ModelConfig(path=str(path), dtype="bfloat16")
    llm = LLM(HelixConfig(model=model, cache=CacheConfig(num_pages=16), runtime=RuntimeConfig(device="cpu")))
    decoder, seen = llm.runner.decoder, []

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(Decoder.forward(decoder, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(decoder, "forward", forward)
    llm.generate([ids], SamplingParams(max_tokens=1))
    assert len(seen[0]) == len(ids), "the prompt is no single chunk"
    logits = decoder.gather_logits(decoder.local_logits(seen[0][:-1]))
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp())


@pytest.mark.slow
def test_weights_of_8_bits_cost_at_most_2_percent_of_perplexity(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is 576 wide and has 9 heads of 64: no width of it is a multiple of a block's 128."""
    page = " ".join((ROOT / "LICENSE").read_text("utf-8").split()[300:700])
    ids = tokenizer(page)["input_ids"]
    quantize_checkpoint(MODEL, tmp_path / "fp8")
    plain, ours = (perplexity(path, ids, monkeypatch) for path in (MODEL, tmp_path / "fp8"))
    print(f"perplexity {plain:.3f} -> {ours:.3f}")
    assert 1 < plain < 30
    assert ours <= 1.02 * plain, (plain, ours)
