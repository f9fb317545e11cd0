"""Loading the tokenizer of a checkpoint folder."""

from pathlib import Path

import pytest
import sentencepiece

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


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair model of the kind that Llama 2 has."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\nthis is no question\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "it"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder / "it.model"


def test_sentencepiece_file_alone_is_read_where_its_class_is_named(tmp_path: Path, sentencepiece_file: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    for settings in (None, "{}"):
        if settings:
            (tmp_path / "tokenizer_config.json").write_text(settings)
        with pytest.raises(
            ValueError, match=r"^model.path = .*: tokenizer.model alone does not say .*; add the model's"
        ):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    exact = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for text in ("the quick fox", "jumps  over", "über\nthe 犬", ""):
        assert tokenizer(text, add_special_tokens=False).input_ids == exact.encode(text)


def test_pointer_of_a_tokenizer_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(ValueError, match=r"tokenizer.json is a git-lfs pointer; run git lfs pull in its folder"):
        load_tokenizer(tmp_path)
