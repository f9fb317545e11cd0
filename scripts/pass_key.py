"""Hide a number in a text, ask for it, and tell which KVP ranks hold the tokens that say it.

The task is the field's simplest proof that attention reaches every shard: an answer is right only if the rank that owns
the number's tokens took part.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from helix.cache.events import CacheEvent, block_hash, root_hash
from helix.cache.keys import token_bytes
from parallel.placement import BlockCyclic

SENTENCE = "The pass key is {key}. Remember it: {key} is the pass key."
QUESTION = "\n\nWhat is the pass key in the text above?"
ANSWER = "The pass key is"  # how the answer begins, so that the number is what is left to say


@dataclass(frozen=True)
class HiddenKey:
    """A prompt with a number in it.

    Attributes:
        key: the number, five digits.
        depth: how far into the text it stands, from 0 to 1.
        token_ids: the prompt, in the model's chat template.
        tokens: the positions of the tokens that say it, both times.
    """

    key: str
    depth: float
    token_ids: list[int]
    tokens: list[int]


def hide(text: str, depth: float, tokenizer: Any) -> HiddenKey:
    """Put a number between two words of a text, and ask for it in a chat's turn."""
    words = text.split()
    cut = round(depth * len(words))
    key = str(Random(f"pass key at {depth}").randrange(10000, 100000))
    content = " ".join([*words[:cut], SENTENCE.format(key=key), *words[cut:]]) + QUESTION
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]
    prompt = tokenizer.apply_chat_template(turns, continue_final_message=True, tokenize=False)
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    starts = [prompt.index(key), prompt.rindex(key)]
    tokens = [
        position
        for position, (begin, end) in enumerate(encoded["offset_mapping"])
        if any(begin < start + len(key) and end > start for start in starts)
    ]
    return HiddenKey(key, depth, list(encoded["input_ids"]), tokens)


class FirstOwners:
    """Learns from the cache's events which rank holds a first block, the one thing that a position does not tell."""

    def __init__(self, placement: BlockCyclic) -> None:
        self._placement = placement
        self._rank_of: dict[str, int] = {}

    def __call__(self, event: CacheEvent) -> None:
        """Note where a block is."""
        self._rank_of[event.hash] = event.rank

    def owners(self, token_ids: list[int], positions: list[int]) -> list[int]:
        """Return the KVP ranks that hold positions of a prompt, of at least one block, that has run."""
        first = block_hash(root_hash(b""), token_bytes(token_ids[: self._placement.block_size])).hex()
        return sorted({self._placement.owner(position, self._rank_of[first]) for position in positions})
