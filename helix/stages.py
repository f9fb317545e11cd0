"""Says how far a start is, which takes seconds to minutes: a line where a stage begins, and now and then within one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

_log = logging.getLogger(__name__)
LINE_EVERY_S = 10.0
Item = TypeVar("Item")


def begin(stage: str) -> None:
    """Say that a stage begins."""
    _log.info("start: %s", stage)


def through(items: Sequence[Item], stage: str) -> Iterator[Item]:
    """Yield a stage's items, saying that it begins, and every ``LINE_EVERY_S`` how many are done after how long."""
    begin(stage)
    began = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= LINE_EVERY_S:
            _log.info("start: %s, %d of %d after %.0f s", stage, done, len(items), now - began)
            said = now
        yield item
