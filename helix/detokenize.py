"""Turn one sequence's tokens into text as they come, and stop at a stop string.

A token's text depends on its neighbours: a character may be spread over several tokens, and many tokenizers drop the
space of whichever token comes first. So a token is decoded together with a short window of tokens before it, and only
what it adds to the window's text is new. The window holds at most 2 x 16 tokens, whatever the sequence's length.

It runs on rank 0 alone: where a stop string ends a text the others hear through the door (``text.py``, ``loop.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_MAX_PENDING = 16  # tokens; a character takes at most 4 bytes, so a longer wait cannot complete one
_MAX_SEED = 5  # tokens of the prompt that the window begins with
_FIRST_MARK = 0xD800  # lone surrogates, which no decoded text holds, stand for special tokens that are not shown


class Detokenizer:
    """Decode the output of one sequence.

    The pieces returned by `push` and `finish`, joined, are `text`: up to a stop string, the tokenizer's own
    decode(all ids, skip_special_tokens, clean_up_tokenization_spaces=False). One exception: bytes that stay invalid
    UTF-8 for 16 tokens are released as they stand, and a tokenizer with byte fallback rewrites characters next to
    invalid bytes, which cannot be taken back.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
    ) -> None:
        """Start at the first output token; without a tokenizer text stays "" and `stop` must be empty (ValueError).

        With ``include_stop`` the stop string belongs to the text. One that ends within the first ``min_tokens`` tokens
        is text as any other. A special token that a stop string holds is found though it is not shown. With the end of
        the `prompt` the text is what follows the prompt's own: its first word keeps its space, and a character that
        began there is whole.
        """
        if stop and tokenizer is None:
            raise ValueError(f"sampling.stop = {list(stop)!r} needs a tokenizer; valid without one: stop_token_ids")
        if not all(stop):
            raise ValueError(f"sampling.stop = {list(stop)!r} must not contain an empty string")
        self._tokenizer = tokenizer
        self._decode = _decode_with(tokenizer, skip_special_tokens)
        self.includes_stop = include_stop
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._stop = {s: s for s in stop}  # what is looked for -> the string that it stands for
        self._marks = self._mark_special(stop) if skip_special_tokens else {}
        self._longest_stop = max((len(s) for s in self._stop), default=0)
        self._window: list[int] = []  # token ids: the context, then the pending tokens
        self._num_context = 0
        self._num_read = 0  # characters of the window's text that were passed on to the search for stop strings
        self._prompt_text = ""  # of the window, while it holds the prompt's end
        self._held = ""  # text that may be the beginning of a stop string
        self._pieces: list[str] = []
        self._stopped: str | None = None
        if tokenizer is not None:
            self._begin_after(prompt[-_MAX_SEED:])

    @property
    def text(self) -> str:
        """All text released so far; it never changes afterwards, only grows."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def stopped(self) -> str | None:
        """The stop string that was found, or None; `text` is final then and ends before that string."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Add the next token and return the text that is certain now, "" when it must wait.

        Waiting are incomplete characters and what may be the beginning of a stop string. Check `stopped`
        afterwards; raises RuntimeError when a stop string was found earlier.
        """
        if self._stopped is not None:
            raise RuntimeError(f"token {token_id} was pushed after the stop string {self._stopped!r} ended the text")
        if self._tokenizer is None:
            return ""
        self._window.append(token_id)
        self._num_tokens += 1
        num_pending = len(self._window) - self._num_context
        return self._release(self._read(flush=num_pending >= _MAX_PENDING) + self._marks.get(token_id, ""))

    def finish(self) -> str:
        """Return all text that was still waiting; call it once, after the last token."""
        if self._stopped is not None or self._tokenizer is None:
            return ""
        delta = self._release(self._read(flush=True))
        held, self._held = self._shown(self._held), ""
        self._pieces.append(held)
        return delta + held

    def _begin_after(self, ids: Sequence[int]) -> None:
        """Let the window begin with the end of the prompt, cut at a whole character."""
        for start in range(len(ids)):
            text = self._decode(list(ids[start:]))
            if not text.startswith(_INCOMPLETE) or text == _INCOMPLETE:  # the latter: one that has only begun
                self._window = list(ids[start:])
                self._num_context, self._num_read = len(self._window), len(text.rstrip(_INCOMPLETE))
                self._prompt_text = text
                return

    def _mark_special(self, stop: Sequence[str]) -> dict[int, str]:
        """Return a mark for each special token that a stop string holds, and look for such strings by their marks."""
        tokens = getattr(self._tokenizer, "added_tokens_decoder", {})
        special = {i: token.content for i, token in tokens.items() if token.special}
        held = [i for i, content in special.items() if any(content in s for s in stop)]
        marks = {i: chr(_FIRST_MARK + number) for number, i in enumerate(sorted(held, key=lambda i: -len(special[i])))}
        for s in stop:
            marked = s
            for i, mark in marks.items():
                marked = marked.replace(special[i], mark)
            self._stop.setdefault(marked, s)
        return marks

    def _shown(self, text: str) -> str:
        return text.translate({ord(mark): None for mark in self._marks.values()}) if self._marks else text

    def _read(self, *, flush: bool) -> str:
        """Return what the pending tokens add to the window's text, up to an incomplete end unless flushed."""
        text = self._decode(self._window)
        complete = text if flush else text.rstrip(_INCOMPLETE)
        if len(complete) > len(self._prompt_text) and complete.startswith(self._prompt_text):
            self._num_read = max(self._num_read, len(self._prompt_text))  # no character that the prompt began ended
        delta = complete[self._num_read :]
        if len(complete) < len(text):
            self._num_read = max(self._num_read, len(complete))
        elif delta:  # the pending tokens become the context of the next ones
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._num_read, self._prompt_text = len(self._decode(self._window)), ""
        elif flush:  # special tokens, say: they will not become text
            del self._window[self._num_context :]
        return delta

    def _release(self, delta: str) -> str:
        """Pass text on, up to a stop string or to what may be the beginning of one.

        The string whose end comes first wins, then the one that begins first: the choice that reading character by
        character would make, however the text is split into tokens.
        """
        if not self._stop:
            self._pieces.append(delta)
            return delta
        text = self._held + delta
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found and self._num_tokens > self._min_tokens:
            end, at, pattern = min(found)
            self._stopped = self._stop[pattern]
            released, self._held = text[: end if self.includes_stop else at], ""
        else:
            held_len = self._partial_stop_len(text)
            released, self._held = text[: len(text) - held_len], text[len(text) - held_len :]
        released = self._shown(released)
        self._pieces.append(released)
        return released

    def _partial_stop_len(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = min(self._longest_stop - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)


def _decode_with(tokenizer: PreTrainedTokenizerBase | None, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """Return what turns ids into text: where transformers adds nothing, its Rust tokenizer: a sixth of the time."""
    if tokenizer is None:
        return lambda _: ""
    from transformers import PreTrainedTokenizerFast as Fast

    kind: Any = type(tokenizer)
    if issubclass(kind, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    return partial(tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
