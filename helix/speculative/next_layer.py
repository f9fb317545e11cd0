"""Drafts by the checkpoint's own layer that predicts one token further (DeepSeek-V3, arXiv 2412.19437, section 2.2).

The layer's row at position p takes the token there and the model's final hidden state of p - 1, and tells the token of
p + 1. Further drafts take the draft before them, and the layer's own state instead of the model's. Its keys stand in
one more layer of the sequence's pages, in the slot of p, and are reused, moved and shared with everything else.

It follows every step, whether drafts are due or not: the hidden states of a step are gone after the next one. So the
rows of guesses are overwritten by those of known states before the step after, and no step is launched ahead. A
sequence that begins in the middle of what is cached has no state of the token before: that one row takes zeros. It
never drafts itself, as the prompt's last token is always computed.

The most likely token is taken always, so proposals are certain (see ``verify.py``), and equal on all ranks, as the
model's own greedy tokens are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..cache.movements import Movement
from ..request import Chunk, Sequence
from ..runner import Runner
from ..scheduler import Scheduler, Step
from .schedule import DraftLenSchedule
from .speculator import Speculator


class NextLayerSpeculator(Speculator):
    """Drafts for an engine's steps by the model's layer that predicts one token further.

    Args:
        schedule: draft lengths by batch size.
        runner: the model's own, with that layer.
    """

    def __init__(self, schedule: DraftLenSchedule, runner: Runner) -> None:
        super().__init__(schedule, None)
        self._runner = runner
        self._begun: set[Sequence] = set()

    def propose(self, step: Step, scheduler: Scheduler, move: Callable[[list[Movement]], None]) -> None:
        """Compute the layer's rows of the last step, and put drafts into this step's chunks.

        Collective over the world. The step's movements are made by it: it writes the pages that they make room in.
        """
        decoding = [number for number, chunk in enumerate(step.chunks) if chunk.is_decode]
        length = self.schedule.draft_len(len(decoding)) if decoding else 0
        rooms: dict[Sequence, int] = {}
        for number in decoding:
            seq = step.chunks[number].seq
            limit = min(length, seq.max_len - len(seq.token_ids) - 1) if seq in self._runner.hidden else 0
            rooms[seq] = scheduler.extend_for_drafts(seq, limit) if limit > 0 else 0
        move([*step.movements, *scheduler.cache.take_movements()])
        step.movements = []
        drafts = self._guess(self._catch_up(), rooms)
        for number in decoding:
            chunk = step.chunks[number]
            step.chunks[number] = Chunk(chunk.seq, chunk.start, chunk.stop, tuple(drafts.get(chunk.seq, ())))
        if decoding:
            self.counters.steps[max(len(step.chunks[number].drafts) for number in decoding)] += 1

    def is_due(self, num_decoding: int) -> bool:
        """Return True: it has to see every step before the next one."""
        return True

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence that ended or was preempted."""
        self._begun.discard(seq)
        self._runner.hidden.pop(seq, None)

    def _catch_up(self) -> dict[Sequence, torch.Tensor]:
        """Compute the rows whose hidden states the last step left; return each sequence's last state, [h]."""
        chunks, tokens, states = list[Chunk](), list[int](), list[torch.Tensor]()
        for seq, (start, hidden) in self._runner.hidden.items():
            stop = min(seq.num_computed, len(seq.token_ids) - 1) + 1
            rows = hidden[: stop - start - 1]
            if seq not in self._begun:
                rows = torch.cat((torch.zeros_like(hidden[:1]), rows))
                self._begun.add(seq)
            chunks.append(Chunk(seq, stop - len(rows), stop))
            tokens += seq.token_ids[stop - len(rows) : stop]
            states.append(rows)
        self._runner.hidden.clear()
        if not chunks:
            return {}
        out = self._runner.predict_next(chunks, np.array(tokens), torch.cat(states))
        stops = np.cumsum([chunk.stop - chunk.start for chunk in chunks]).tolist()
        return {chunk.seq: out[stop - 1] for chunk, stop in zip(chunks, stops, strict=True)}

    def _guess(self, last: dict[Sequence, torch.Tensor], rooms: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Take the most likely next token of every sequence, again and again; the host reads them all at the end."""
        live = [seq for seq, room in rooms.items() if room]
        drafts: dict[Sequence, list[int]] = {seq: [] for seq in live}
        made: list[tuple[list[Sequence], torch.Tensor]] = []
        decoder = self._runner.decoder
        if live:
            hidden = torch.stack([last[seq] for seq in live])
            made.append((live, decoder.greedy(decoder.local_logits(hidden))))
        for ahead in range(1, max(rooms.values(), default=0)):
            before, tokens = made[-1]
            keep = [at for at, seq in enumerate(before) if rooms[seq] > ahead]
            if len(keep) < len(before):
                tokens, hidden = tokens[keep], hidden[keep]
            live = [before[at] for at in keep]
            chunks = [Chunk(seq, len(seq.token_ids) - 1 + ahead, len(seq.token_ids) + ahead) for seq in live]
            hidden = self._runner.predict_next(chunks, tokens, hidden)
            made.append((live, decoder.greedy(decoder.local_logits(hidden))))
        for seqs, tokens in made:
            for seq, token in zip(seqs, tokens.tolist(), strict=True):
                drafts[seq].append(token)
        return drafts
