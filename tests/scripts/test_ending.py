"""How a run ends early: in one line, with what was computed kept, and how it goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import ending
from scripts.make_checkpoint import make_checkpoint

ROOT = Path(__file__).parents[2]
SHORT, LONG = {"prompt": "short", "id": "b", "sampling": {"max_tokens": 3}}, {"prompt": "long", "id": "a"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ending") / "model")


@pytest.fixture
def running(model: Path, tmp_path: Path) -> Iterator[Any]:
    """Start the command on so many ranks; its second prompt ends at once and its first one does not."""
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(LONG)}\n{json.dumps(SHORT)}\n")
    started: list[subprocess.Popen[str]] = []

    def start(num_ranks: int, *arguments: str) -> subprocess.Popen[str]:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m"]
        command = [sys.executable, "-m", *torchrun * (num_ranks > 1), "scripts.generate", f"model.path={model}"]
        command += ["prompts=in.jsonl", "cache.num_pages=64", "runtime.device=cpu", "sampling.ignore_eos=true"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
        started.append(
            subprocess.Popen(
                [*command, *arguments],
                cwd=tmp_path,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_lines(file: Path, number: int) -> None:
    for _ in range(600):
        if file.exists() and file.read_text().count("\n") == number:
            return
        time.sleep(0.1)
    raise AssertionError(f"{file} never had {number} lines")


def ranks_of(torchrun: int) -> dict[int, int]:
    """The process of each rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
            env = dict(pair.partition("=")[::2] for pair in (folder / "environ").read_text().split("\0"))
        except OSError:
            continue
        if parent == torchrun and "RANK" in env:
            found[int(env["RANK"])] = int(folder.name)
    return found


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error") or "Traceback" in line]


KEPT = "1 of 2 lines are in out.jsonl; resume=true goes on with the others"


def test_ctrl_c_on_two_ranks_is_one_line_and_the_run_goes_on_where_it_was(running: Any, tmp_path: Path) -> None:
    first = running(2, "output=out.jsonl", "sampling.max_tokens=600", "parallel.kvp=2")
    wait_for_lines(tmp_path / "out.jsonl", 1)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: torchrun and all its ranks
    _, err = first.communicate(timeout=60)
    assert [line for line in said(err) if line.startswith("error")] == [f"error: ended by SIGINT; {KEPT}"]
    assert err.count("Traceback") == 1, "torchrun's own"
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "b"

    again = running(1, "output=out.jsonl", "sampling.max_tokens=600", "resume=true")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(each)["id"] for each in lines] == ["a", "b"]
    assert lines[1] == line


def test_a_rank_that_is_lost_is_told_in_one_line_and_loses_nothing(running: Any, tmp_path: Path) -> None:
    process = running(2, "output=out.jsonl", "sampling.max_tokens=4000", "parallel.kvp=2")
    wait_for_lines(tmp_path / "out.jsonl", 1)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    (ours,) = [line for line in said(err) if line.startswith("error")]
    assert ours.endswith(f"; {KEPT}")
    assert err.count("Traceback") == 1, "torchrun's own"
    assert "exitcode  : -9 " in err.split("Root Cause (first observed failure)")[1]
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_rank_with_its_code_and_prints_what_waited_for_its_turn(
    running: Any, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = running(1, "sampling.max_tokens=4000", "cache.events=events.jsonl")
    while not (tmp_path / "events.jsonl").exists() or (tmp_path / "events.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.1)  # by then the short one has ended, and stands behind the long one
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert said(err) == [f"error: ended by {number.name}; 1 of 2 lines are printed"]
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["b"]


def test_a_lost_rank_and_a_lack_of_memory_are_told_in_one_line_and_no_defect_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234",
        "Read error [127.0.0.1]:1: Connection reset by peer",
        "NCCL error: remote process exited or there was a network error",
    ]
    for text in texts:
        with (
            ending.ending_on_signals(),
            ending.last_words(lambda: "2 lines are kept"),
            pytest.raises(SystemExit) as end,
        ):
            ending.crash(RuntimeError(text))
        assert end.value.code == 1
        assert capsys.readouterr().err == f"error: another rank has ended ({text}); 2 lines are kept\n"
    for lack in (torch.OutOfMemoryError("tried 2 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")):
        with ending.ending_on_signals(), pytest.raises(SystemExit) as end:
            ending.crash(lack)
        assert end.value.code == 1
        assert capsys.readouterr().err == (
            f"error: out of memory ({lack}); lower scheduler.prefill_chunk, scheduler.max_batch or cache.num_pages, or "
            "use more ranks\n"
        )
    with ending.ending_on_signals(), pytest.raises(SystemExit):
        ending.crash(RuntimeError("shapes differ"))
    assert capsys.readouterr().err == "RuntimeError: shapes differ\n"


def test_handlers_are_as_they_were_afterwards_and_nohup_is_heeded() -> None:
    before = [signal.getsignal(number) for number in ending.SIGNALS]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending.ending_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[2])
    assert [signal.getsignal(number) for number in ending.SIGNALS] == before


def test_ctrl_c_while_a_command_is_still_imported_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.generate", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    while not (tmp_path / "importing").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


def test_a_terminal_gets_no_line_for_machines(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ending.say_json({"rows": [1, 2]})
    assert capsys.readouterr().out == '{"rows": [1, 2]}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    ending.say_json({"rows": [1, 2]})
    assert capsys.readouterr().out == ""
