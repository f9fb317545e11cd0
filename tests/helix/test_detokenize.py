"""Claims about helix.detokenize: pieces add up to the tokenizer's text, stop strings end it, the cost stays flat."""

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helix.detokenize import Detokenizer

TEXTS = [
    "plain words, with  double spaces and\nlines\n\n",
    "naïve café, Ελληνικά, кириллица",
    "你好。世界。深い文脈 한국어",
    "😀 family: 👨‍👩‍👧‍👦 flags: 🇫🇷🇯🇵 skin: 👍🏽",
    " leading space, trailing space ",
    "spaces , before . punctuation ! they do n't go",
    "a genuine \ufffd character \ufffd\ufffd",
]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Token i is byte i; ids 256 and 257 are special."""
    plain = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # these stand for themselves, the others for 256 and up
    pieces = [chr(b if b in plain else 256 + sum(a not in plain for a in range(b))) for b in range(256)]
    assert set(pieces) == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: byte for byte, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>"})
    return fast


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Words carry their leading space as ▁, the first one loses it; unknown characters fall back to byte tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "▁b", "lo", ",", "b"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_special_tokens({"eos_token": "<eos>"})
    return fast


class Pieces:
    """A tokenizer whose token i is the string pieces[i]; it counts how many tokens it decodes."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces
        self.num_decoded = 0

    def decode(self, token_ids: list[int], **_: bool) -> str:
        self.num_decoded += len(token_ids)
        return "".join(self.pieces[i] for i in token_ids)


def own_text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def run(detokenizer: Detokenizer, ids: Iterable[int]) -> list[str]:
    """Push until a stop string is found, then finish; the last piece is finish's."""
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped is not None:
            break
    return [*pieces, detokenizer.finish()]


def run_text(text: str, stop: Sequence[str], cuts: Iterable[int] = ()) -> tuple[str, str | None]:
    """Feed text cut into tokens at the given places (default: into characters)."""
    edges = sorted({0, len(text), *(cuts or range(len(text)))})
    parts = [text[start:end] for start, end in pairwise(edges)]
    detokenizer = Detokenizer(Pieces(parts), stop)
    pieces = run(detokenizer, range(len(parts)))
    assert "".join(pieces) == detokenizer.text
    return detokenizer.text, detokenizer.stopped


def oracle(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Read character by character; of the stop strings that end at one place, the longest wins."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_a_decode_of_its_own_is_asked(byte_level: PreTrainedTokenizerFast) -> None:
    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **settings: Any) -> str:
            return super()._decode(*args, **settings).upper()

    shouting = Shouting(tokenizer_object=byte_level.backend_tokenizer)
    assert "".join(run(Detokenizer(shouting), b"words")) == "WORDS"


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_add_up_to_the_whole_text(byte_level: PreTrainedTokenizerFast, text: str) -> None:
    ids = list(text.encode())
    assert own_text(byte_level, ids) == text
    detokenizer = Detokenizer(byte_level)
    pieces = run(detokenizer, ids)
    assert "".join(pieces) == detokenizer.text == text


def test_character_appears_with_its_last_byte_and_never_broken(byte_level: PreTrainedTokenizerFast) -> None:
    pieces = run(Detokenizer(byte_level), "aé你😀b".encode())
    assert pieces == ["a", "", "é", "", "", "你", "", "", "", "😀", "b", ""]


def test_text_before_an_incomplete_character_is_not_held_back() -> None:
    class TwoTokens:
        def decode(self, token_ids: list[int], **_: bool) -> str:
            return b"".join((b"word\xe4\xbd", b"\xa0!")[i] for i in token_ids).decode(errors="replace")

    assert run(Detokenizer(TwoTokens()), [0, 1, 0, 1]) == ["word", "你!", "word", "你!", ""]


def test_unfinished_character_is_flushed_at_the_end(byte_level: PreTrainedTokenizerFast) -> None:
    ids = list("ok😀".encode()[:-1])
    pieces = run(Detokenizer(byte_level), ids)
    assert pieces == ["o", "k", "", "", "", "\ufffd"]
    assert "".join(pieces) == own_text(byte_level, ids)


@pytest.mark.parametrize(
    "data", [b"ab\xff\xfecd\xe4", b"\xe4\xe4\xbd\xa0\xbd", b"\xff" * 100 + b"ok", b"\xf0\x9f" * 40]
)
def test_invalid_bytes_give_the_tokenizers_own_replacements(byte_level: PreTrainedTokenizerFast, data: bytes) -> None:
    ids = list(data)
    assert "".join(run(Detokenizer(byte_level), ids)) == own_text(byte_level, ids)


def test_random_tokens_of_a_sentencepiece_vocabulary_add_up_to_the_whole_text(
    sentencepiece: PreTrainedTokenizerFast,
) -> None:
    choose = random.Random(3)
    words = sentencepiece.convert_tokens_to_ids(["▁", "▁Hello", "▁world", "▁b", "lo", ",", "b", "<eos>"])
    character = sentencepiece.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "你".encode()])
    for _ in range(300):
        ids = [token for _ in range(20) for token in choose.choice([[choose.choice(words)]] * 6 + [character])]
        pieces = run(Detokenizer(sentencepiece), ids)
        assert "".join(pieces) == own_text(sentencepiece, ids)
        assert "\ufffd" not in "".join(pieces)


def test_space_of_a_word_is_kept_after_many_skipped_special_tokens(sentencepiece: PreTrainedTokenizerFast) -> None:
    hello, world, eos = sentencepiece.convert_tokens_to_ids(["▁Hello", "▁world", "<eos>"])
    ids = [hello, *[eos] * 50, world, eos, world]
    detokenizer = Detokenizer(sentencepiece)
    run(detokenizer, ids)
    assert detokenizer.text == own_text(sentencepiece, ids) == "Hello world world"


def test_word_continuations_join_their_word() -> None:
    vocab = {"[UNK]": 0, "un": 1, "##believ": 2, "##able": 3, "luck": 4}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert run(Detokenizer(fast), [1, 2, 3, 4, 1, 2]) == ["un", "believ", "able", " luck", " un", "believ", ""]


def test_special_tokens_are_shown_only_on_request(byte_level: PreTrainedTokenizerFast) -> None:
    a, eos = byte_level.convert_tokens_to_ids(["a", "<eos>"])
    assert "".join(run(Detokenizer(byte_level), [a, eos, a])) == "aa"
    assert "".join(run(Detokenizer(byte_level, skip_special_tokens=False), [a, eos, a])) == "a<eos>a"


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        (["<eos>"], ("ab", "<eos>")),
        (["b<eos>"], ("a", "b<eos>")),
        (["<eos>c"], ("ab", "<eos>c")),
        (["<pad>", "cd"], ("ab", "cd")),
        (["<eos><eos>"], ("abcd<eos", None)),
        (["d<eos>", "d<eos"], ("abc", "d<eos")),
    ],
)
def test_a_special_token_that_is_not_shown_still_stops(
    byte_level: PreTrainedTokenizerFast, stop: list[str], want: tuple[str, str | None]
) -> None:
    eos = byte_level.eos_token_id
    detokenizer = Detokenizer(byte_level, stop)
    pieces = run(detokenizer, [*b"ab", eos, *b"cd<eos"])
    assert ("".join(pieces), detokenizer.stopped) == (detokenizer.text, want[1]) == want


def test_text_after_a_prompt_is_what_the_prompts_own_text_is_followed_by(
    sentencepiece: PreTrainedTokenizerFast, byte_level: PreTrainedTokenizerFast
) -> None:
    hello, world, eos = sentencepiece.convert_tokens_to_ids(["▁Hello", "▁world", "<eos>"])
    for prompt in ([hello], [world] * 50 + [hello], [eos] * 3 + [hello]):
        assert run(Detokenizer(sentencepiece, prompt=prompt), [world, world]) == [" world", " world", ""]
    assert run(Detokenizer(sentencepiece, prompt=[eos]), [world]) == ["world", ""]
    smile = "😀".encode()
    for cut in (1, 2, 3):
        prompt = [*"é😀".encode(), *smile[:cut]]
        assert run(Detokenizer(byte_level, prompt=prompt), [*smile[cut:], *"né".encode()])[3 - cut :] == [
            "😀", "n", "", "é", ""
        ]  # fmt: skip
        for answer in (b"ab", b"\xf9r", "\ufffdx".encode()):
            pieces = run(Detokenizer(byte_level, prompt=prompt), answer)
            assert "".join(pieces) == own_text(byte_level, list(answer)), "what the prompt left broken is its own"


@pytest.mark.parametrize("piece", ["word ", "", "\ufffd"], ids=["text", "nothing", "replacement"])
def test_cost_of_a_token_does_not_grow(piece: str) -> None:
    tokenizer = Pieces([piece])
    detokenizer = Detokenizer(tokenizer, ["stop"])
    most = 0
    for _ in range(2000):
        before = tokenizer.num_decoded
        detokenizer.push(0)
        most = max(most, tokenizer.num_decoded - before)
    detokenizer.finish()
    assert most <= 48  # a window of at most 2 x 16 tokens, and its new context
    assert detokenizer.text == piece * 2000


def test_without_a_tokenizer_the_text_stays_empty_and_stop_strings_are_refused() -> None:
    detokenizer = Detokenizer(None)
    assert run(detokenizer, [5, 6]) == ["", "", ""]
    assert (detokenizer.text, detokenizer.stopped) == ("", None)
    with pytest.raises(
        ValueError, match=r"sampling\.stop = \['END'\] needs a tokenizer; valid without one: stop_token_ids"
    ):
        Detokenizer(None, ["END"])


# --- stop strings -----------------------------------------------------------------------------------------------------


def test_stop_string_over_several_tokens_ends_the_text_before_it() -> None:
    detokenizer = Detokenizer(Pieces(["Hi ", "E", "N", "D", " more"]), ["END"])
    assert run(detokenizer, range(5)) == ["Hi ", "", "", "", ""]
    assert (detokenizer.text, detokenizer.stopped) == ("Hi ", "END")


def test_stop_string_inside_one_token_cuts_that_token() -> None:
    detokenizer = Detokenizer(Pieces(["a", "b END c"]), ["END"])
    assert run(detokenizer, range(2)) == ["a", "b ", ""]
    assert detokenizer.stopped == "END"


def test_stop_string_may_be_the_whole_output() -> None:
    detokenizer = Detokenizer(Pieces(["END"]), ["END"])
    assert run(detokenizer, [0]) == ["", ""]
    assert (detokenizer.text, detokenizer.stopped) == ("", "END")


def test_held_back_prefix_is_released_as_soon_as_it_cannot_match() -> None:
    detokenizer = Detokenizer(Pieces(["E", "N", "E", "x"]), ["END"])
    assert run(detokenizer, range(4)) == ["", "", "EN", "Ex", ""]
    assert detokenizer.stopped is None


def test_held_back_prefix_is_released_at_the_end() -> None:
    detokenizer = Detokenizer(Pieces(["see EN"]), ["END"])
    assert run(detokenizer, [0]) == ["see ", "EN"]
    assert (detokenizer.text, detokenizer.stopped) == ("see EN", None)


def test_finish_twice_adds_nothing(byte_level: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(byte_level, ["END"])
    run(detokenizer, b"see EN")
    assert detokenizer.finish() == ""
    assert detokenizer.text == "see EN"


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("xaaab", ["aab"], ("xa", "aab")),
        ("xababac", ["abac"], ("xab", "abac")),
        ("xabcd", ["abcd", "bc"], ("xa", "bc")),
        ("xabc", ["bc", "abc"], ("x", "abc")),
        ("xabc", ["abc", "ab"], ("x", "ab")),
        ("xabd", ["abc", "bd"], ("xa", "bd")),
        ("one two", ["two", "one"], ("", "one")),
        ("你好。再见", ["。再"], ("你好", "。再")),
        ("no stop here", [], ("no stop here", None)),
    ],
)
def test_overlapping_stop_strings_resolve_as_if_read_by_character(
    text: str, stop: list[str], want: tuple[str, str | None]
) -> None:
    assert oracle(text, stop) == want
    for cuts in ([], [len(text)], [1], [2], [3], [1, 3], [2, 4]):
        assert run_text(text, stop, cuts) == want


@given(
    text=st.text("ab", max_size=24),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    cuts=st.sets(st.integers(1, 23)),
)
def test_result_does_not_depend_on_how_text_is_cut_into_tokens(text: str, stop: list[str], cuts: set[int]) -> None:
    assert run_text(text, stop, {cut for cut in cuts if cut < len(text)} or {len(text)}) == oracle(text, stop)


def test_stop_string_of_multibyte_characters_is_found_in_byte_tokens(byte_level: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(byte_level, ["。再"])
    run(detokenizer, "你好。再见".encode())
    assert (detokenizer.text, detokenizer.stopped) == ("你好", "。再")


def test_stop_string_completed_by_flushed_text_still_stops() -> None:
    detokenizer = Detokenizer(Pieces(["ab", "\ufffd"]), ["b\ufffd"])
    assert run(detokenizer, [0, 1]) == ["a", "", ""]
    assert (detokenizer.text, detokenizer.stopped) == ("a", "b\ufffd")


def test_token_after_the_stop_string_is_refused() -> None:
    detokenizer = Detokenizer(Pieces(["END", "x"]), ["END"])
    detokenizer.push(0)
    with pytest.raises(RuntimeError, match="token 1 was pushed after the stop string 'END' ended the text"):
        detokenizer.push(1)
    assert detokenizer.text == ""


def test_bytes_after_the_stop_string_are_not_flushed() -> None:
    detokenizer = Detokenizer(Pieces(["a END\ufffd"]), ["END"])
    assert run(detokenizer, [0]) == ["a ", ""]
    assert detokenizer.text == "a "


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling\.stop = \[''\] must not contain an empty string"):
        Detokenizer(Pieces([]), [""])
