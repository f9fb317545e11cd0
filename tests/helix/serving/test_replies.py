"""An answer is worded alike whole and in chunks."""

import pytest

from helix.fields import COMPLETIONS
from helix.request import Request
from helix.sampling import SamplingParams
from helix.serving.asking import Asked
from helix.serving.link import Piece
from helix.serving.replies import CompletionReply
from helix.serving.wire import End, TokenChance
from helix.token_texts import TokenTexts


class Letters:
    """A tokenizer whose tokens are letters."""

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return chr(token_id)


def piece_of(text: str, *, prompt: str = "", ends: bool = False) -> Piece:
    chances = [TokenChance(ord(letter), -1.0, {}) for letter in text]
    of_prompt = [TokenChance(ord(letter), -2.0, {}) for letter in prompt[1:]]
    end = End("length", len(prompt), 0, None) if ends else None
    return Piece([*map(ord, text)], text, chances, end, [None, *of_prompt] if prompt else [])


@pytest.mark.parametrize("echo", [False, True])
def test_log_probabilities_of_a_whole_answer_are_those_of_its_chunks(echo: bool) -> None:
    request = Request(prompt_token_ids=[*b"abc"], sampling=SamplingParams(logprobs=0))
    asked = Asked(COMPLETIONS, [request], echo=echo)
    whole, streamed = (CompletionReply(TokenTexts(Letters()), asked, [("abc", [*b"abc"])]) for _ in range(2))
    made = whole.whole(0, piece_of("defg", prompt="abc", ends=True))
    first, last = piece_of("de", prompt="abc"), piece_of("fg", ends=True)
    chunks = [streamed.first(0, first), streamed.chunk(0, first), streamed.chunk(0, last)]
    told = [chunk["logprobs"] for chunk in chunks if chunk is not None]
    assert made["text"] == ("abcdefg" if echo else "defg")
    assert made["logprobs"] == {name: [value for each in told for value in each[name]] for name in told[0]}
    assert made["logprobs"]["text_offset"] == list(range(len(made["text"])))
