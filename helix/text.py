"""The text of what is made, on rank 0 alone: it reads each step's tokens and finds where a stop string ended them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .commands import Add, Cut
from .detokenize import Detokenizer
from .request import STOP, StreamEvent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextReader:
    """Turns the tokens of all that runs into text.

    Args:
        tokenizer: the model's; None makes no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._live: dict[int, Detokenizer] = {}
        self._num_read: dict[int, int] = {}

    def begin(self, add: Add) -> None:
        """Expect the tokens of a request."""
        params = add.sampling
        self._live[add.index] = Detokenizer(
            self._tokenizer,
            params.stop,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            prompt=add.prompt,
        )
        self._num_read[add.index] = 0

    def read(self, events: Sequence[StreamEvent]) -> list[Cut]:
        """Give a step's events their text, and return which requests a stop string ended, after how many tokens."""
        cuts: list[Cut] = []
        for event in events:
            detokenizer = self._live.get(event.index)
            if detokenizer is None or detokenizer.stopped is not None:
                continue
            ends = event.output is not None
            ended = event.output is not None and event.output.finish_reason == STOP  # by its last token
            silent = ended and not detokenizer.includes_stop
            for token in event.token_ids[: -1 if silent else None]:
                event.text += detokenizer.push(token)
                self._num_read[event.index] += 1
                if detokenizer.stopped is not None:
                    cuts.append(Cut(event.index, self._num_read[event.index], detokenizer.stopped))
                    break
            if ends and detokenizer.stopped is None:
                event.text += detokenizer.finish()
        return cuts

    def end(self, event: StreamEvent) -> None:
        """Give the output of a request's last event its text, and forget the request."""
        detokenizer = self._live.pop(event.index, None)
        self._num_read.pop(event.index, None)
        if detokenizer is not None and event.output is not None:
            if not event.token_ids:  # it was ended between two tokens
                event.text += detokenizer.finish()
            event.output.text = detokenizer.text
