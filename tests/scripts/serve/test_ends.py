"""What ends a server, and what becomes of its clients then; long walks."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from helix import LLM
from helix.serving.config import ServingConfig
from scripts.serve import ServeConfig, prepared
from tests.scripts.serve.served import Served, end, head_of, launch, pid_of, start, walk


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_operations_with_drafts_few_pages_and_a_host_tier(
    model: Path, llm: LLM, tmp_path: Path, seed: int
) -> None:
    settings = ["speculative=ngram", "cache.host_pages=40", "scheduler.prefill_chunk=64"]
    served = start(model, tmp_path, *settings, num_pages=24)
    try:
        walk(served, llm, 2500, seed)
        print(served.counter("num_preemptions_total"), "preemptions,", served.counter("num_steps_total"), "steps")
    finally:
        end(served)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_walk_before_two_groups(model: Path, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, served = two_groups(model, tmp_path, monkeypatch)
    try:
        walk(served, llm, 1000, seed=9)
    finally:
        end(served)
    assert prefill.process.wait(60) == 0


def long_streams(served: Served, number: int, num_tokens: int) -> list[socket.socket]:
    """Return connections whose streams have begun."""
    body = json.dumps({"prompt": "go on", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}).encode()
    clients = [served.connect() for _ in range(number)]
    for client in clients:
        client.sendall(head_of(body, close=True) + body)
    for client in clients:
        while b"data: " not in client.recv(4096):
            pass
    return clients


def rest_of(client: socket.socket) -> bytes:
    received = b""
    while piece := client.recv(1 << 16):
        received += piece
    client.close()
    return received


def require_free(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))


def test_a_signal_under_load_drains(served: Served) -> None:
    """The last test of the module: it ends the server."""
    clients = long_streams(served, 3, 120)
    served.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (status := served.ask("/v1/completions", {"prompt": "a"})[0]) == 200 and time.monotonic() < deadline:
        pass
    assert status == 503
    for client in clients:
        received = rest_of(client)
        assert b'"finish_reason":"length"' in received and b"[DONE]" in received
    served.process.wait(60)
    require_free(served.port)
    log = served.log.read_text()
    assert "taking no more requests" in log and "rank 0 failed" not in log and "rank 1 failed" not in log


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_world_and_every_client_hears_of_it(model: Path, tmp_path: Path, rank: int) -> None:
    served = start(model, tmp_path)
    clients = long_streams(served, 3, 3000)
    os.kill(pid_of(served, rank), signal.SIGKILL)
    for client in clients:  # long before ``runtime.timeout_s``
        assert b"world_lost" in rest_of(client)
    assert served.process.wait(60) != 0
    require_free(served.port)
    assert rank == 0 or "error: another rank has ended" in served.log.read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_ends_streams_with_an_error_until_it_goes_on(model: Path, tmp_path: Path) -> None:
    served = start(model, tmp_path, "serve.stall_timeout_s=3")
    [client] = long_streams(served, 1, 3000)
    os.kill(pid_of(served, 1), signal.SIGSTOP)
    assert b'"code":"stalled"' in rest_of(client)
    assert served.ask("/health")[0] == 503
    os.kill(pid_of(served, 1), signal.SIGCONT)
    deadline = time.monotonic() + 30
    while served.ask("/health")[0] != 200:
        assert time.monotonic() < deadline
    served.settle("num_requests_running", 0)
    assert served.ask("/v1/completions", {"prompt": "again", "max_tokens": 2})[0] == 200
    end(served)


def two_groups(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Served, Served]:
    """Return a world that prefills, and the server that decodes."""
    monkeypatch.setenv("HELIX_TRANSFER_SECRET", "s" * 40)
    (folder / "prefill").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"transfer.address=127.0.0.1:{probe.getsockname()[1]}"
    prefill = launch(model, folder / "prefill", address, "transfer.role=prefill", num_ranks=1)
    return prefill, start(model, folder, address, "transfer.role=decode", num_ranks=1)


@pytest.mark.slow
def test_a_killed_prefill_group_is_named_and_answers_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, served = two_groups(model, tmp_path, monkeypatch)
    assert served.ask("/health")[1] == {"status": "ok"}
    clients = long_streams(served, 2, 400)
    os.kill(pid_of(prefill, 0), signal.SIGKILL)
    assert served.ask("/v1/completions", {"prompt": "on and on" * 20, "max_tokens": 3})[0] == 200
    assert all(b'"finish_reason":"length"' in rest_of(client) for client in clients)
    time.sleep(1.5)
    status, health, _ = served.ask("/health")
    assert (status, health["status"]) == (200, "degraded") and "prefill group is gone" in health["trouble"]
    end(served)
    assert prefill.process.wait(60) != 0


@pytest.mark.slow
def test_without_its_http_process_the_world_ends_in_one_line(model: Path, tmp_path: Path) -> None:
    served = start(model, tmp_path)
    [http] = [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and _is_http_of(folder, served.process.pid)
    ]
    os.kill(http, signal.SIGKILL)
    assert served.process.wait(60) != 0
    log = served.log.read_text()
    assert "error: the HTTP process has ended" in log and "rank 0 failed" not in log and "rank 1 failed" not in log


def _is_http_of(folder: Path, agent: int) -> bool:
    """Return whether a process is the HTTP process of a rank that an agent started."""
    try:
        if b"scripts.http_process" not in (folder / "cmdline").read_bytes():
            return False
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        return Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1] == str(agent)
    except OSError:
        return False


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(model: Path, tmp_path: Path) -> None:
    served = start(model, tmp_path)
    [client] = long_streams(served, 1, 3000)
    for _ in range(2):
        os.kill(pid_of(served, 0), signal.SIGTERM)
        time.sleep(0.5)
    assert b"world_lost" in rest_of(client)  # and not its 3000 tokens
    served.process.wait(60)
    assert "error: ended by SIGTERM" in served.log.read_text()


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"host": "0.0.0.0"}, None, "host = 0.0.0.0 serves other machines without a key"),
        ({"serve": ServingConfig(api_key_file="none")}, None, "serve.api_key_file = none cannot be read"),
        (
            {"serve": ServingConfig(api_key_file="none")},
            "k",
            "serve.api_key_file = none and HELIX_API_KEY are both set",
        ),
        ({}, "two words", "HELIX_API_KEY holds no key"),
        ({"serve": ServingConfig(response_template="none")}, None, "serve.response_template = none is no response"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    settings: dict[str, Any], key: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HELIX_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("HELIX_API_KEY", key)
    with pytest.raises(ValueError, match=f"^{message}"):
        prepared(ServeConfig(**{"port": 0} | settings))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"^host = 127.0.0.1, port = {port} cannot be listened on"):
            prepared(ServeConfig(port=port))
