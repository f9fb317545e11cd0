"""Loading the tokenizer of a checkpoint folder."""

from pathlib import Path

import pytest

from helix.models.tokenizer import load_tokenizer
from scripts.make_checkpoint import FAMILIES, make_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_gives_bytes_back(tmp_path: Path, family: str) -> None:
    tokenizer = load_tokenizer(make_checkpoint(tmp_path, family=family))
    text = "Hello  wörld\n\t漢字"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 320
    assert tokenizer("<|user|>a<|eos|>").input_ids == [258, 97, 257]
    assert tokenizer.decode([65, 300, 66], skip_special_tokens=True) == "AB"


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_template_ends_with_the_turn_of_the_assistant(tmp_path: Path, family: str) -> None:
    tokenizer = load_tokenizer(make_checkpoint(tmp_path, family=family))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>s<|eos|><|user|>hi<|eos|><|assistant|>"


def test_folder_without_tokenizer_gives_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(tmp_path / "config.json") is None


@pytest.mark.parametrize("broken", ["", "{", '{"version": "1.0"}'])
def test_broken_tokenizer_is_refused_in_one_line(tmp_path: Path, broken: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(ValueError, match=r"^model.path = .*: its tokenizer does not load: ") as refusal:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)
