"""A step between the host and the device: launched, and read once the device has ended it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .graphs import PendingTokens
from .logprobs import SampledTokens
from .request import Sequence
from .runner import Runner
from .scheduler import Step


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was given to the device.

    Attributes:
        choice: the tokens that the device chose, on their way here, or still there; None where no row chooses.
    """

    step: Step
    choice: PendingTokens | SampledTokens | None

    @classmethod
    def launch(cls, runner: Runner, step: Step, *, waits: bool) -> Flight:
        """Give a step to the device. ``waits``: the host waits for what it scores, which ``is_pending`` tells."""
        return cls(step, (runner.sample if waits else runner.launch)(step.chunks))

    @property
    def is_pending(self) -> bool:
        """Return whether its tokens come to the host while the device goes on."""
        return isinstance(self.choice, PendingTokens)

    def holds(self, seq: Sequence) -> bool:
        """Return whether the step computes rows of a sequence."""
        return any(chunk.seq is seq for chunk in self.step.chunks)

    def read(self, runner: Runner) -> SampledTokens | None:
        """Wait for the step and return the tokens of its rows that choose; None where none does.

        Raises:
            RankLost: when a kernel gave up waiting for a rank.
        """
        if isinstance(self.choice, PendingTokens):
            ids, fault = self.choice.wait()
            runner.check_faults(fault)
            return self.choice.sampled or SampledTokens(token_ids=torch.tensor(ids, dtype=torch.int64))
        runner.check_faults()
        return self.choice
