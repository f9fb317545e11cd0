"""Copies of what state layers keep of a sequence, to go on from there later; the control plane says which and when."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ..cache.checkpoints import Checkpoints, interval_of, unit_of
from ..cache.movements import CopyState, MoveState
from ..config import CacheConfig
from ..plan.footprint import CHECKPOINT_SHARE, Footprint
from .cache import StateCache

_log = logging.getLogger(__name__)


class StateCheckpoints:
    """Room for copies of sequences' slots of a ``StateCache``, on the device and in pinned memory of the host.

    Raises:
        ValueError: when the host's cannot be had; local to the rank, so agree on it.
    """

    def __init__(self, states: StateCache, control: Checkpoints) -> None:
        self._states, self._num_slots = states, control.num_slots
        shapes = [(each, (each.shape[0], *each.shape[2:])) for each in states.tensors]
        matrices, positions, inputs = [each.new_empty((control.num_slots, *shape)) for each, shape in shapes]
        states.kept = self._kept = matrices, positions, inputs
        try:
            self._on_host = [
                torch.empty(
                    (control.host_slots, *shape), dtype=each.dtype, pin_memory=each.is_cuda and control.host_slots > 0
                )
                for each, shape in shapes
            ]
        except RuntimeError as error:
            raise ValueError(
                f"cache.host_pages asks for {control.host_slots} checkpoints of {states.slot_bytes} bytes on the host, "
                f"which cannot be had; lower it ({error})"
            ) from error

    @classmethod
    def of(cls, states: StateCache | None, control: Checkpoints | None) -> StateCheckpoints | None:
        """Return room for a control plane's checkpoints; None where there are none."""
        return None if states is None or control is None else cls(states, control)

    def move(self, move: CopyState | MoveState) -> None:
        """Copy all layers of a slot to a checkpoint, or back, or those of a checkpoint to the host.

        It runs on the current stream, which waits for the host's memory as well.
        """
        if isinstance(move, MoveState):
            for kept, host in zip(self._kept, self._on_host, strict=True):
                host[move.target - self._num_slots].copy_(kept[move.source], non_blocking=True)
            return
        for state, kept, host in zip(self._states.tensors, self._kept, self._on_host, strict=True):
            if move.keeps:
                kept[move.checkpoint].copy_(state[:, move.slot])
            elif move.checkpoint < self._num_slots:
                state[:, move.slot].copy_(kept[move.checkpoint])
            else:
                staged = host[move.checkpoint - self._num_slots].to(state.device, non_blocking=True)
                state[:, move.slot].copy_(staged)


@dataclass(frozen=True)
class CheckpointPlan:
    """How many checkpoints there are, and where; equal on all ranks.

    every: tokens between two of a prompt; 0 where there are none. footprint: of the fullest rank.
    max_run: as of the ``StateCache``. config: of the cache.
    """

    every: int
    footprint: Footprint
    max_run: int
    config: CacheConfig

    @classmethod
    def of(cls, config: CacheConfig, footprint: Footprint, max_run: int) -> CheckpointPlan:
        """Plan for a run's settings: without one checkpoints take at most a quarter of the bytes of keys and values."""
        if not config.reuse or footprint.spec.states is None:
            return cls(0, footprint, max_run, config)
        every = config.checkpoint_every
        if every is None:
            token_bytes = footprint.token_bytes / footprint.layout.kvp  # on a rank, of any token
            every = int(CHECKPOINT_SHARE * footprint.state_bytes(max_run) / token_bytes)
        return cls(interval_of(every, config.block_size), footprint, max_run, config)

    @property
    def page_bytes(self) -> int:
        """What checkpoints take beside each page of a rank, in bytes."""
        tokens = self.footprint.block_size * self.footprint.layout.kvp
        return -(-tokens * self.footprint.state_bytes(self.max_run) // self.every) if self.every else 0

    def control(self, num_pages: int) -> Checkpoints | None:
        """Return the control plane of as many as so many pages a rank hold tokens for; None for none.

        The host has as many as its pages hold tokens for, one at least.
        """
        if not self.every:
            return None
        num_slots = max(1, self.footprint.max_tokens(num_pages) // self.every)
        host_slots = -(-self.footprint.max_tokens(self.config.host_pages) // self.every)
        _log.info(
            "cache.checkpoint_every: %d tokens, %d checkpoints of states, and %d on the host",
            self.every, num_slots, host_slots,
        )  # fmt: skip
        return Checkpoints(
            num_slots,
            self.every,
            self.footprint.block_size,
            host_slots=host_slots,
            offload_min_priority=self.config.offload_min_priority,
            passes=self.max_run < unit_of(self.footprint.block_size),
        )
