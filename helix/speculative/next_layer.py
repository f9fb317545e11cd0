"""Drafts by the checkpoint's own layer that predicts one token further (DeepSeek-V3, arXiv 2412.19437, section 2.2).

The layer's row at position p takes the token there and the model's final hidden state of p - 1, and tells the token of
p + 1. Further drafts take the draft before them, and the layer's own state instead of the model's. Its keys stand in
one more layer of the sequence's pages, in the slot of p, and are reused, moved and shared with everything else; every
step appends those of its rows (``next_states.py``), which overwrite what drafts left.

The most likely token is taken always, so proposals are certain (see ``verify.py``), and equal on all ranks, as the
model's own greedy tokens are. Where all of a step's rows choose so and a graph holds them, the step is launched before
anybody has read its drafts: its rows find them on the device, and the host reads both together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..cache.movements import Movement
from ..graphs import PendingTokens
from ..request import Chunk, Sequence
from ..runner import Runner
from ..scheduler import Scheduler, Step
from .schedule import DraftLenSchedule
from .speculator import Speculator


@dataclass(frozen=True, slots=True)
class Launched:
    """Drafts that the device makes: of so many sequences a step one token each."""

    seqs: list[Sequence]
    pending: PendingTokens


class NextLayerSpeculator(Speculator):
    """Drafts for an engine's steps by the model's layer that predicts one token further.

    Args:
        schedule: draft lengths by batch size and context.
        runner: the model's own, with that layer; its drafts are prepared.
    """

    def __init__(self, schedule: DraftLenSchedule, runner: Runner) -> None:
        super().__init__(schedule, None)
        self._runner = runner
        self._unread: list[Launched] = []

    def reset(self) -> None:
        """Forget drafts that nobody will read."""
        self._unread = []

    def settle(self, step: Step) -> None:
        """Read the drafts of a step that was launched without."""
        if self._unread:
            drafts = self._read()
            step.chunks = [_with(chunk, drafts.get(chunk.seq, [])) for chunk in step.chunks]

    def _draft(
        self,
        step: Step,
        scheduler: Scheduler,
        decoding: list[int],
        length: int,
        move: Callable[[list[Movement]], None],
    ) -> None:
        """Put at most ``length`` drafts into chunks; movements are made first, as drafting writes pages."""
        rooms: dict[Sequence, int] = {}
        for number in decoding:
            seq = step.chunks[number].seq
            limit = min(length, seq.max_len - len(seq.token_ids) - 1)
            if len(seq.token_ids) == 1:  # at position 0 the layer has no input
                limit = 0
            rooms[seq] = scheduler.extend_for_drafts(seq, limit) if limit > 0 else 0
        move([*step.movements, *scheduler.cache.take_movements()])
        step.movements = []
        self._unread = self._launch(rooms)
        named = {seq: [-2 - ahead for ahead in range(room)] for seq, room in rooms.items()}
        chunks = [_with(chunk, named.get(chunk.seq, [])) for chunk in step.chunks]
        if self._runner.finds_drafts(chunks):
            step.chunks = chunks
        else:
            drafts = self._read()
            step.chunks = [_with(chunk, drafts.get(chunk.seq, [])) for chunk in step.chunks]

    def _launch(self, rooms: dict[Sequence, int]) -> list[Launched]:
        """Take the most likely next token of every sequence, again and again."""
        live = sorted((seq for seq, room in rooms.items() if room), key=lambda seq: -rooms[seq])
        launched: list[Launched] = []
        for ahead in range(max(rooms.values())):
            live = [seq for seq in live if rooms[seq] > ahead]
            chunks = [Chunk(seq, len(seq.token_ids) - 1 + ahead, len(seq.token_ids) + ahead) for seq in live]
            launched.append(Launched(live, self._runner.draft(chunks, ahead)))
        return launched

    def _read(self) -> dict[Sequence, list[int]]:
        """Wait for what was launched."""
        launched, self._unread = self._unread, []
        drafts: dict[Sequence, list[int]] = {}
        for each in launched:
            tokens, fault = each.pending.wait()
            self._runner.check_faults(fault)
            for seq, token in zip(each.seqs, tokens, strict=True):
                drafts.setdefault(seq, []).append(token)
        return drafts


def _with(chunk: Chunk, drafts: list[int]) -> Chunk:
    return replace(chunk, drafts=tuple(drafts)) if drafts else chunk
