"""The files that a run writes: proven to be writable before it begins, and never lost in silence.

Lines of output are kept as they come; all else is written in the end, whole or not at all. A disk may still fill up
while the run goes on. What was computed is then printed, and the run says so in the end.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
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
        if Path(path).is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder; name a file")
        if Path(path).exists() and not os.access(path, os.W_OK):
            raise ValueError(f"{path} cannot be written: {os.strerror(errno.EACCES)}")
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


def output_lines(path: str | None, num_lines: int, kept: Mapping[int, str]) -> PrintedLines | GrowingFile:
    """Return where the lines of a run's output go, on rank 0: a file, or standard output where there is none.

    ``kept`` are the lines that the file holds already, by index; the run goes on with it.
    """
    return PrintedLines(path, num_lines) if path is None or _is_special(path) else GrowingFile(path, num_lines, kept)


class GrowingFile:
    """A file that grows by a line when a request ends, and is put in the order of the input in the end."""

    def __init__(self, path: str, num_lines: int, kept: Mapping[int, str]) -> None:
        self._path, self._num_lines = path, num_lines
        self._lines = dict(kept)
        self._file: TextIO | None = None
        self._problem: OSError | None = None
        self._lock = threading.Lock()  # a signal ends the run from another thread

    def add(self, index: int, line: str) -> None:
        """Keep a line, without its end. What goes wrong is told by ``finish``: the run goes on."""
        with self._lock:
            self._lines[index] = line
            if self._problem is not None:
                return
            try:
                if self._file is None:
                    write_text(self._path, self._text(self._lines))
                    self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
                else:
                    self._file.write(line + "\n")
                    self._file.flush()
            except OSError as error:
                self._problem = error
                _log.warning("output = %s cannot be written (%s); its lines come in the end", self._path, _why(error))

    def finish(self) -> str | None:
        """Put the lines in order, and return in one line what went wrong, or None."""
        with self._lock:
            self._close()
            ordered = self._text(sorted(self._lines))
            if self._problem is not None:
                return save("output", self._path, ordered, sys.stdout)
            try:
                write_text(self._path, ordered)
            except OSError as error:
                return f"output = {self._path} has all lines, but they cannot be put in order ({_why(error)})"
            return None

    def keep(self) -> str:
        """Keep what is there, since the run ends early; return in a line where that is."""
        with self._lock:
            if not self._lines:
                return ""
            self._close()
            of = f"{len(self._lines)} of {self._num_lines} lines"
            if self._problem is None:
                return f"{of} are in {self._path}; resume=true goes on with the others"
            return f"{of}: {save('output', self._path, self._text(sorted(self._lines)), sys.stdout) or self._path}"

    def _text(self, indices: Iterable[int]) -> str:
        return "".join(f"{self._lines[index]}\n" for index in indices)

    def _close(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._problem = self._problem or error


class PrintedLines:
    """Lines that go to standard output, a pipe or a device: in the order of the input, each when its turn has come."""

    def __init__(self, path: str | None, num_lines: int) -> None:
        self._path, self._num_lines = path, num_lines
        self._lines: dict[int, str] = {}
        self._stream: TextIO | None = None if path is not None else sys.stdout
        self._num_sent = 0
        self._problem: OSError | None = None
        self._lock = threading.Lock()

    def add(self, index: int, line: str) -> None:
        """Keep a line, without its end. What goes wrong is told by ``finish``: the run goes on."""
        with self._lock:
            self._lines[index] = line
            while self._num_sent in self._lines and self._problem is None:
                self._send(self._num_sent)

    def finish(self) -> str | None:
        """Return in one line what went wrong, or None."""
        with self._lock:
            self._close()
            if self._problem is None or self._path is None:
                return f"the lines of output cannot be printed ({_why(self._problem)})" if self._problem else None
            return save("output", self._path, self._text(), sys.stdout)

    def keep(self) -> str:
        """Print what is there, since the run ends early; return in a line how much that is."""
        with self._lock:
            for index in sorted(self._lines)[self._num_sent :]:
                if self._problem is None:
                    self._send(index)
            self._close()
            problem = None
            if self._problem is not None and self._path is not None:
                problem = save("output", self._path, self._text(), sys.stdout)
            return problem or f"{self._num_sent} of {self._num_lines} lines are printed"

    def _text(self) -> str:
        return "".join(f"{self._lines[index]}\n" for index in sorted(self._lines))

    def _send(self, index: int) -> None:
        try:
            if self._stream is None:
                assert self._path is not None
                self._stream = open(self._path, "w", encoding="utf-8")  # noqa: SIM115
            self._stream.write(in_encoding(self._lines[index], self._stream.encoding) + "\n")
            self._stream.flush()
            self._num_sent += 1
        except OSError as error:
            self._problem = error

    def _close(self) -> None:
        try:
            if self._stream is not None and self._path is not None:
                self._stream.close()
        except OSError as error:
            self._problem = self._problem or error


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


def in_encoding(line: str, encoding: str | None) -> str:
    """Return a line of JSON with the characters that an encoding lacks in JSON's own escapes."""
    try:
        line.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(json.loads(line))
    return line


def _print(name: str, text: str, stream: TextIO) -> str | None:
    try:
        for line in text.split("\n")[:-1]:
            print(in_encoding(line, stream.encoding), file=stream)
        stream.flush()
    except OSError as error:
        return f"the lines of {name} cannot be printed ({_why(error)})"
    return None


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _is_special(path: str) -> bool:
    return Path(path).exists() and not Path(path).is_file()
