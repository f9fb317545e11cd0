"""What speculation did, and what it was worth."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class SpeculativeCounters:
    """Counts since they were last reset. A turn is one sequence that decodes in one step.

    Attributes:
        drafted: draft tokens that the target computed.
        accepted: those of them that became output.
        turns: turns of the target, those without drafts included.
        drafted_turns: turns with drafts.
        tokens: output tokens of all turns.
        steps: steps in which a sequence decoded, by the longest draft that the target computed in them; 0 without any,
            be it that none was asked for or that none was found.
    """

    drafted: int = 0
    accepted: int = 0
    turns: int = 0
    drafted_turns: int = 0
    tokens: int = 0
    steps: Counter[int] = field(default_factory=Counter)

    def note(self, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        """Count a turn: its drafts, how many of them the target chose too, and the tokens that the output gained.

        A sequence that ends inside its accepted drafts gains fewer tokens than they are.
        """
        self.turns += 1
        self.tokens += num_tokens
        self.drafted += num_drafts
        self.drafted_turns += num_drafts > 0
        self.accepted += min(num_accepted, num_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures in the form of metrics.json."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.accepted / self.drafted if self.drafted else 0.0,
            "mean_accepted_len": self.accepted / self.drafted_turns if self.drafted_turns else 0.0,
            "tokens_per_target_step": self.tokens / self.turns if self.turns else 0.0,
            "steps_per_draft_len": {str(length): self.steps[length] for length in sorted(self.steps)},
        }
