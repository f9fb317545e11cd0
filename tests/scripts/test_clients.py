"""aiperf and guidellm, each in an environment of its own (scripts/test_clients.sh), against four ranks: no error."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.make_checkpoint import make_checkpoint
from tests.scripts.serve.served import KEY, Served, end, start

NUM_REQUESTS = 500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("clients") / "tiny", layers=1, max_position=4096)


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = start(model, tmp_path_factory.mktemp("log"), "scheduler.prefill_chunk=256", num_ranks=4)
    yield served
    end(served)


def call(name: str, *arguments: str, folder: Path) -> str:
    """Run a client and return what it says."""
    command = Path(os.environ.get("HELIX_CLIENTS", "none")) / name / "bin" / name
    if not command.is_file():
        pytest.skip(f"HELIX_CLIENTS names no folder with {name}; bash scripts/test_clients.sh makes one")
    env = {**os.environ, "HOME": str(folder)}
    ran = subprocess.run(
        [str(command), *arguments], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(ran.stdout[-4000:])
    assert ran.returncode == 0, ran.stdout[-4000:]
    return ran.stdout


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_aiperf_has_no_error(served: Served, model: Path, tmp_path: Path, endpoint: str) -> None:
    call(
        "aiperf", "profile", "--model", "tiny", "--url", f"http://127.0.0.1:{served.port}", "--api-key", KEY,
        "--endpoint-type", endpoint, "--streaming", "--tokenizer", str(model), "--request-count", str(NUM_REQUESTS),
        "--concurrency", "16", "--isl", "120", "--isl-stddev", "80", "--osl", "12", "--osl-stddev", "8",
        "--extra-inputs", "ignore_eos:true", "--random-seed", "1", "--ui", "none", "--artifact-dir", str(tmp_path),
        folder=tmp_path,
    )  # fmt: skip
    said: dict[str, Any] = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    print({name: said.get(name) for name in ("request_count", "error_request_count", "error_summary")})
    assert said["request_count"]["avg"] == NUM_REQUESTS and not said.get("error_summary")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_has_no_error(served: Served, model: Path, tmp_path: Path, path: str) -> None:
    backend = {
        "kind": "openai_http", "target": f"http://127.0.0.1:{served.port}", "model": "tiny", "api_key": KEY,
        "request_format": path,
    }  # fmt: skip
    data = {
        "kind": "synthetic_text", "prompt_tokens": 120, "prompt_tokens_stdev": 80, "prompt_tokens_min": 8,
        "output_tokens": 12, "output_tokens_stdev": 8, "output_tokens_min": 2,
    }  # fmt: skip
    call(
        "guidellm", "run", "--backend", json.dumps(backend), "--data", json.dumps(data),
        "--tokenizer", json.dumps({"kind": "hf_auto", "model": str(model)}),
        "--profile", "kind=concurrent,streams=16", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--output", json.dumps({"kind": "json", "path": str(tmp_path / "report.json")}), "--disable-progress",
        folder=tmp_path,
    )  # fmt: skip
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    print(totals)
    assert totals["successful"] >= NUM_REQUESTS and totals["errored"] == 0
