"""The prompts of a call, as what rank 0 puts in at the door: settled a little ahead of the steps, never all at once."""

from __future__ import annotations

from collections.abc import Iterable

from .commands import Close, encode
from .front import Front
from .prompts import Preparer, Prompt
from .sampling import SamplingParams

PREPARED_TOKENS = 1 << 16  # prompts that wait are prepared up to so many tokens ahead


class PromptFeed:
    """Takes the place of an inbox on rank 0, and closes the door behind the last prompt.

    Args:
        prompts: in their order; their places are the indexes.
        sampling: of those that have none.
        preparer: settles them.
        front: where they go.
        num_waiting: no more are settled while so many wait: they could fill every batch slot.
    """

    def __init__(
        self, prompts: Iterable[Prompt], sampling: SamplingParams, preparer: Preparer, front: Front, num_waiting: int
    ) -> None:
        self._upcoming, self._sampling = enumerate(prompts), sampling
        self._preparer, self._front, self._num_waiting = preparer, front, num_waiting
        self._queued: list[int] = []
        self._next: tuple[int, Prompt] | None = None  # one whose grammar is being compiled

    def take(self, wait_s: float) -> list[bytes]:
        """Return the commands that are due; it waits for nothing but a grammar's compiler, where nothing else runs."""
        commands: list[bytes] = []
        waiting = [seq for index in self._queued if (seq := self._front.find(index)) is not None and seq.is_new]
        self._queued = [seq.index for seq in waiting]
        num_tokens = sum(seq.prompt_len for seq in waiting)
        while len(self._queued) < self._num_waiting and num_tokens < PREPARED_TOKENS:
            upcoming = self._next or next(self._upcoming, None)
            if upcoming is None:
                return [*commands, encode(Close())]
            is_quick = self._preparer.is_quick(upcoming[1], self._sampling)
            self._next = None if is_quick or not (commands or self._front.has_work) else upcoming
            if self._next is not None:
                break
            settled = self._preparer.settle(*upcoming, self._sampling)
            commands.append(settled.data)
            if settled.prompt_len:
                self._queued.append(upcoming[0])
                num_tokens += settled.prompt_len
        return commands
