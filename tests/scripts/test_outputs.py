"""The files that a run writes: whole or not at all, and printed where the disk takes them no more."""

import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.outputs import check_writable, save, write_text


def test_a_disk_that_is_full_in_the_end_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("old")

    def half(path: Path, text: str, *_: Any) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half)
    problem = save("output", str(file), "new lines\n", sys.stdout)
    assert (
        problem
        == f"output = {file} cannot be written (No space left on device); what it was to hold is on standard output"
    )
    assert capsys.readouterr().out == "new lines\n"
    with pytest.raises(ValueError, match="out.jsonl cannot be written: No space left on device"):
        check_writable(str(file))
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"out.jsonl": "old"}


def test_output_replaces_a_file_whole_follows_links_and_never_replaces_a_device(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    file.write_text("something longer than what comes")
    link.symlink_to(file)
    write_text(str(link), "new")
    assert (file.read_text(), link.is_symlink()) == ("new", True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(str(pipe), "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link", "pipe"]
