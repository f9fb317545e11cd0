"""The files that a run writes: proven to be writable before it begins, whole or not at all, and never lost in silence.

A disk may still fill up while the run goes on. What was computed is then printed, and the run says so in the end.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from helix.cache.events import CacheEvent

_log = logging.getLogger(__name__)


def check_writable(*paths: str | None, read: Iterable[str | None] = ()) -> None:
    """Raise ValueError now for a file that could not be written in the end, or over another file."""
    files = [str(Path(path).resolve()) for path in filter(None, (*paths, *read)) if not _is_special(path)]
    for file in files:
        if files.count(file) > 1:
            raise ValueError(f"{file} is named twice among prompts, output, metrics and cache.events; name it once")
    for path in filter(None, paths):
        folder = Path(path).resolve().parent
        if not folder.is_dir():
            raise ValueError(f"{path} cannot be written: {folder} is not a folder")
        if Path(path).is_dir() or (Path(path).exists() and not os.access(path, os.W_OK)):
            raise ValueError(f"{path} cannot be written")
        if not _is_special(path):
            _require_room(path)


def write_text(path: str, text: str) -> None:
    """Write a file whole or not at all; what is no regular file (a pipe, /dev/null) is written to as it stands."""
    if _is_special(path):
        Path(path).write_text(text, "utf-8")
        return
    with _beside(path) as partial:
        partial.write_text(text, "utf-8")
        partial.replace(Path(path).resolve())  # the file that a link names, not the link


def save(name: str, path: str | None, text: str, instead: TextIO) -> str | None:
    """Write the file that a setting names; print the text where there is none, or where it cannot be written.

    Returns:
        What went wrong, in one line, or None.
    """
    if path is None:
        return _print(name, text, instead)
    try:
        write_text(path, text)
    except OSError as error:
        problem = f"{name} = {path} cannot be written ({error.strerror})"
        where = "output" if instead is sys.stdout else "error"
        return f"{problem}; {_print(name, text, instead) or f'what it was to hold is on standard {where}'}"
    return None


class EventFile:
    """The JSON lines of ``cache.events``. A file that takes no more ends the events, not the run.

    Attributes:
        problem: why it lacks events, in one line; None while it has them all.
    """

    def __init__(self, path: str) -> None:
        self.problem: str | None = None
        self._path = path
        self._file: TextIO | None = None
        with self._noting():
            self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, event: CacheEvent) -> None:
        """Add an event."""
        if self._file is not None and self.problem is None:
            with self._noting():
                self._file.write(json.dumps(event.as_dict()) + "\n")

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._file is not None:
            with self._noting():
                self._file.close()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep the first problem, and tell it at once."""
        try:
            yield
        except OSError as error:
            if self.problem is None:
                self.problem = f"cache.events = {self._path} cannot be written ({error.strerror}); it lacks events"
                _log.warning("%s from now on", self.problem)


@contextmanager
def _beside(path: str) -> Iterator[Path]:
    """Give a file of this process's own in the folder of another; none is left there."""
    target = Path(path).resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield partial
    finally:
        with suppress(OSError):
            partial.unlink()


def _require_room(path: str) -> None:
    """Raise ValueError where the folder of a file takes no file of one byte."""
    try:
        with _beside(path) as probe:
            probe.write_text("\n", "utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def _print(name: str, text: str, stream: TextIO) -> str | None:
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as error:
        return f"the lines of {name} cannot be printed ({error.strerror})"
    return None


def _is_special(path: str) -> bool:
    return Path(path).exists() and not Path(path).is_file()
