"""Copies of what state layers keep of a sequence, to go on from there later; the control plane says which and when."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..cache.checkpoints import UNIT, Checkpoints
from ..cache.movements import CopyState
from ..config import CacheConfig
from ..plan.footprint import CHECKPOINT_SHARE, Footprint
from .cache import StateCache

_log = logging.getLogger(__name__)


class StateCheckpoints:
    """Room for copies of sequences' slots of a ``StateCache``."""

    def __init__(self, states: StateCache, control: Checkpoints) -> None:
        self._states, num_slots = states, control.num_slots
        self._kept = [each.new_empty((each.shape[0], num_slots, *each.shape[2:])) for each in states.tensors]

    @classmethod
    def of(cls, states: StateCache | None, control: Checkpoints | None) -> StateCheckpoints | None:
        """Return room for a control plane's checkpoints; None where there are none."""
        return None if states is None or control is None else cls(states, control)

    def copy(self, move: CopyState) -> None:
        """Copy all layers of a slot to a checkpoint, or back, on the current stream."""
        for state, kept in zip(self._states.tensors, self._kept, strict=True):
            if move.keeps:
                kept[:, move.checkpoint].copy_(state[:, move.slot])
            else:
                state[:, move.slot].copy_(kept[:, move.checkpoint])


@dataclass(frozen=True)
class CheckpointPlan:
    """How many checkpoints there are, and where; equal on all ranks.

    every: tokens between two of a prompt; 0 where there are none. footprint: of the fullest rank.
    max_run: as of the ``StateCache``.
    """

    every: int
    footprint: Footprint
    max_run: int

    @classmethod
    def of(cls, config: CacheConfig, footprint: Footprint, max_run: int) -> CheckpointPlan:
        """Plan for a run's settings: without one checkpoints take at most a quarter of the bytes of keys and values."""
        if not config.reuse or footprint.spec.states is None:
            return cls(0, footprint, max_run)
        every = config.checkpoint_every
        if every is None:
            token_bytes = footprint.token_bytes / footprint.layout.kvp  # on a rank, of any token
            every = int(CHECKPOINT_SHARE * footprint.state_bytes(max_run) / token_bytes)
        unit = max(UNIT, config.block_size)
        return cls(-(-every // unit) * unit, footprint, max_run)

    @property
    def page_bytes(self) -> int:
        """What checkpoints take beside each page of a rank, in bytes."""
        tokens = self.footprint.block_size * self.footprint.layout.kvp
        return -(-tokens * self.footprint.state_bytes(self.max_run) // self.every) if self.every else 0

    def control(self, num_pages: int) -> Checkpoints | None:
        """Return the control plane of as many as so many pages a rank hold tokens for; None for none."""
        if not self.every:
            return None
        num_slots = max(1, self.footprint.max_tokens(num_pages) // self.every)
        _log.info("cache.checkpoint_every: %d tokens, %d checkpoints of states", self.every, num_slots)
        return Checkpoints(num_slots, self.every, self.footprint.block_size)
