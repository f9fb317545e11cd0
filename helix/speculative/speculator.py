"""Gives the decoding sequences of a step their drafts: how many, from whom, and pages for them.

Nothing here depends on what one rank alone can see: the draft length is looked up from the step, drafts are equal on
all ranks by the drafter's contract, and pages are the control plane's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..cache.movements import Movement
from ..request import Chunk, Sequence
from ..scheduler import Scheduler, Step
from .counters import SpeculativeCounters
from .drafter import Drafter
from .schedule import DraftLenSchedule


class Speculator:
    """Drafts for an engine's steps.

    Args:
        schedule: draft lengths by batch size and context.
        drafter: what drafts; None where a subclass does.

    Attributes:
        counters: what was done since they were last replaced.
    """

    def __init__(self, schedule: DraftLenSchedule, drafter: Drafter | None) -> None:
        self.schedule, self.drafter = schedule, drafter
        self.counters = SpeculativeCounters()

    def propose(self, step: Step, scheduler: Scheduler, move: Callable[[list[Movement]], None]) -> None:
        """Put drafts into a step's chunks, and into its movements what makes room for them.

        Collective over the world where the drafter is. The host must know every token of the sequences that decode.
        A sequence drafts no further than to its end: its last token is never computed. ``move`` makes movements at
        once, for those who write the pages that they make room in; they are then none of the step's.
        """
        decoding = [number for number, chunk in enumerate(step.chunks) if chunk.is_decode]
        if not decoding:
            return
        length = self._draft_len([step.chunks[number] for number in decoding])
        if length:
            self._draft(step, scheduler, decoding, length, move)
        self.counters.steps[max(len(step.chunks[number].drafts) for number in decoding)] += 1

    def _draft(
        self,
        step: Step,
        scheduler: Scheduler,
        decoding: list[int],
        length: int,
        move: Callable[[list[Movement]], None],
    ) -> None:
        """Put at most ``length`` drafts into each of the chunks ``decoding``."""
        assert self.drafter is not None
        seqs = [step.chunks[number].seq for number in decoding]
        limits = [min(length, seq.max_len - len(seq.token_ids) - 1) for seq in seqs]
        for number, seq, drafts in zip(decoding, seqs, self.drafter.draft(seqs, limits), strict=True):
            room = scheduler.extend_for_drafts(seq, len(drafts)) if drafts else 0
            if room:
                chunk = step.chunks[number]
                step.chunks[number] = replace(chunk, drafts=tuple(drafts[:room]))
        step.movements += scheduler.cache.take_movements()

    def is_due(self, step: Step) -> bool:
        """Return whether a step of decode rows alone, or one behind it, asks for drafts."""
        return self._draft_len(step.chunks) > 0

    def _draft_len(self, decoding: list[Chunk]) -> int:
        return self.schedule.draft_len(len(decoding), sum(chunk.stop for chunk in decoding))

    def settle(self, step: Step) -> None:
        """Make a launched step's drafts known, where they are not, before its tokens are looked at."""

    def reset(self) -> None:
        """Forget what is launched and not read; here nothing ever is."""

    def skip(self, step: Step) -> bool:
        """Count a step of decode rows alone as one without drafts; False, and uncounted, where it asks for some."""
        if self.is_due(step):
            return False
        self.counters.steps[0] += 1
        return True

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence that ended or was preempted."""
        if self.drafter is not None:
            self.drafter.drop(seq)
