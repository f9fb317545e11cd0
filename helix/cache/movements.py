"""What the control plane asks of the data plane, as values: every rank makes the same list and executes its own part.

A list is executed in its order, as if one movement ended before the next began, after the steps before it and before
the step that it was made for. The data plane may overlap what does not touch the same page.
``rank`` is a KVP rank; pages and host pages are that rank's, alike over TPA.
"""

from __future__ import annotations

from typing import NamedTuple


class CopyTokens(NamedTuple):
    """Copy the first ``num_tokens`` tokens of a page, all layers, to another page of the same rank."""

    rank: int
    source: int
    target: int
    num_tokens: int


class Offload(NamedTuple):
    """Copy a page to a host page; the page is free from here on."""

    rank: int
    page: int
    host_page: int


class Onboard(NamedTuple):
    """Copy a host page to a page."""

    rank: int
    host_page: int
    page: int


class Handover(NamedTuple):
    """Give a page that was offloaded to a sequence: from this step on, computing may write it."""

    rank: int
    page: int


class CopyState(NamedTuple):
    """Copy what state layers keep of the sequence in a batch slot to a checkpoint, or back from any; on every rank.

    It comes after all that was computed before, and before what is computed next.
    """

    rank: int
    slot: int
    checkpoint: int
    keeps: bool


class MoveState(NamedTuple):
    """Copy a checkpoint of states to a slot of the host, whose numbers follow those of the device; on every rank."""

    rank: int
    source: int
    target: int


EVERY_RANK = -1
Movement = CopyTokens | Offload | Onboard | Handover | CopyState | MoveState
KINDS = (CopyTokens, Offload, Onboard, Handover, CopyState, MoveState)


def as_ints(movement: Movement) -> list[int]:
    """Return a movement as numbers, for digests of decisions."""
    return [KINDS.index(type(movement)), *movement]
