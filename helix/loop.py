"""The loop of a running world: share what rank 0 sees, apply it, compute a step. ``generate`` and a server run it.

1. The turn comes through the door: on rank 0 it holds where the last step's text met a stop string.
2. The last step's events are cut there, the commands are applied in order, and the events go out.
3. The front computes a step. Rank 0 reads its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from .commands import Abort, Add, Command, Cut, Refuse, decode
from .door import Door
from .front import Front
from .request import ERROR, STOP, RequestOutput, StreamEvent
from .text import TextReader


class StepLoop:
    """Runs what comes through a door. Every rank iterates it alike, over equal fronts.

    Args:
        front: runs the sequences.
        door: what comes in.
        text: reads tokens on rank 0; None on the others.
    """

    def __init__(self, front: Front, door: Door, text: TextReader | None) -> None:
        self._front, self._door, self._text = front, door, text
        self._closing = False

    def turns(self) -> Iterator[list[StreamEvent]]:
        """Yield what is new, after every step and whenever the world has waited, until it is closed and done.

        Text is set on rank 0; everything else is equal on all ranks.
        """
        events: list[StreamEvent] = []
        cuts: list[Cut] = []
        while True:
            idle = not (events or self._front.has_work or self._closing)
            turn = self._door.share(cuts, self._front.listen, idle=idle)
            self._front.advance(turn.now)
            for data in turn.commands:
                events = self._apply(decode(data), events)
            if self._text is not None:
                for event in events:
                    if event.output is not None:
                        self._text.end(event)
            heard = self._front.hear(turn.news)  # before the caller may leave: what was taken from a socket is acted on
            yield events
            if self._closing and not (heard or self._front.has_work):
                return
            events = heard + (self._front.step() if self._front.has_work else [])
            cuts = [] if self._text is None else self._text.read(events)

    def _apply(self, command: Command, events: list[StreamEvent]) -> list[StreamEvent]:
        """Apply a command and return the turn's events with what comes of it."""
        if isinstance(command, Add):
            if self._text is not None:
                self._text.begin(command)
            self._front.add(command.sequence())
        elif isinstance(command, Refuse):
            output = RequestOutput(command.name, finish_reason=ERROR, error=command.error)
            self._front.metrics.note_refusal()
            return [*events, StreamEvent(command.index, [], "", output)]
        elif isinstance(command, Abort):
            return events + self._front.abort(command.index)
        elif isinstance(command, Cut):
            return self._cut(command, events)
        else:
            self._closing = True
            if command.abort:
                self._front.abort_all()
        return events

    def _cut(self, cut: Cut, events: list[StreamEvent]) -> list[StreamEvent]:
        """End a request after some of its tokens; those of the last step that come after them are taken back.

        Only drafts that were accepted together with the stopping token can come after it, and what these ended in.
        """
        mine = [event for event in events if event.index == cut.index]
        output = next((event.output for event in mine if event.output is not None), None)
        if output is None:
            [end] = self._front.abort(cut.index)
            output = end.output
        assert output is not None
        num_late = len(output.token_ids) - cut.num_tokens
        kept = sum(len(event.token_ids) for event in mine) - num_late  # a token an event; one that failed has none
        late = {id(event) for event in mine[kept:]}
        mine[kept - 1].output = output
        del output.token_ids[cut.num_tokens :]
        if output.logprobs is not None:
            del output.logprobs[cut.num_tokens :]
        self._front.metrics.note_cut(output.finish_reason, num_late)
        output.finish_reason, output.stop_reason, output.error = STOP, cut.stop, None
        return [event for event in events if id(event) not in late]
