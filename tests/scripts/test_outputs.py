"""The files that a run writes: whole or not at all, and printed where the disk takes them no more."""

import errno
import io
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.outputs import check_writable, output_lines, save, write_text


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


def test_a_file_grows_line_by_line_and_is_put_in_order_in_the_end(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    lines = output_lines(str(file), 4, {2: "two"})
    assert file.read_text() == "old", "until there is something to replace it"
    seen = []
    for index, line in ((3, "three ä\u2028"), (0, "zero"), (1, "one")):
        lines.add(index, line)
        seen.append(file.read_text("utf-8"))
    assert seen == [
        "two\nthree ä\u2028\n",
        "two\nthree ä\u2028\nzero\n",
        "two\nthree ä\u2028\nzero\none\n",
    ]
    assert lines.keep() == f"4 of 4 lines are in {file}; resume=true goes on with the others"
    assert lines.finish() is None
    assert file.read_text("utf-8") == "zero\none\ntwo\nthree ä\u2028\n"


def test_printed_lines_have_the_order_of_the_input_and_early_ends_print_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = output_lines(None, 4, {})
    printed = []
    for index in (1, 0, 3):
        lines.add(index, str(index))
        printed.append(capsys.readouterr().out)
    assert printed == ["", "0\n1\n", ""]
    assert lines.keep() == "3 of 4 lines are printed"
    assert capsys.readouterr().out == "3\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252", "utf-16"])
def test_a_terminal_of_any_encoding_gets_lines_that_read_back(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_written, encoding))
    item = {"text": "naïve 模型 😀 \u2028 €", "id": 0.1}
    lines = output_lines(None, 1, {})
    lines.add(0, json.dumps(item, ensure_ascii=False))
    assert lines.finish() is None
    assert json.loads(bytes_written.getvalue().decode(encoding)) == item


def test_lines_that_a_file_takes_no_more_come_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = output_lines(str(tmp_path / "gone" / "out.jsonl"), 2, {})
    lines.add(1, "one")
    lines.add(0, "zero")
    assert "cannot be written (No such file or directory); what it was to hold is on" in (lines.finish() or "")
    assert capsys.readouterr().out == "zero\none\n"
