"""The plan command: its lists, its JSON line, its picture, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helix.config import ModelConfig
from helix.models.quantization import Quantization
from helix.plan.footprint import Storage
from helix.plan.hardware import named_hardware
from helix.plan.planner import Fleet, Setup
from helix.plan.sizes import parse_size, parse_sizes, short
from scripts.make_checkpoint import make_checkpoint
from scripts.pareto import Point, check_picture, frontier, require_matplotlib
from scripts.plan import PlanCache, PlanConfig, PlanHardware, naming, run, setup_of, storage_of
from tests.helix.plan.presets import CONF, preset

LAYOUT_KEYS = [
    *"kvp tpa tpf ep context batch weights_bytes cache_bytes_per_token".split(),
    *"max_tokens max_sequences ttl_ms ttft_s bound_by best".split(),
]


def test_a_config_is_planned_without_weights(tmp_path) -> None:
    folder = make_checkpoint(tmp_path / "model", family="qwen3_moe", experts=8)
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    picture = tmp_path / "plan.png"
    cases = ["gpus=4", "context=64K,1M", "batch=1,8"]
    line = [sys.executable, "-m", "scripts.plan", f"model.path={folder}", *cases, "hardware=h100", f"plot={picture}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    layouts, refused = result["layouts"], result["refused"]
    assert all(list(each) == LAYOUT_KEYS for each in layouts)
    assert {(each["kvp"], each["tpa"]) for each in layouts} | {(each["kvp"], each["tpa"]) for each in refused} == {
        (1, 4), (2, 2), (4, 1),
    }  # fmt: skip
    assert {each["ep"] for each in layouts} == {1, 2, 4}
    cases = {(each["context"], each["batch"]) for each in layouts}
    assert cases == {(65536, 1), (65536, 8), (1 << 20, 1), (1 << 20, 8)}
    assert sum(each["best"] for each in layouts) == len(cases)
    assert "torchrun --standalone --nproc-per-node 4 -m scripts.generate" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_runs_what_was_planned(tmp_path, capsys) -> None:
    folder = make_checkpoint(tmp_path / "model")
    given = [f"model.path={folder}", "cache.dtype=fp8_e4m3", "cache.block_size=128"]
    plan = PlanConfig(
        model=ModelConfig(path=str(folder)),
        cache=PlanCache(dtype="fp8_e4m3", block_size=128),
        gpus="2", context="8K", batch="1", weights="fp8", prefill_chunk="1K",
    )  # fmt: skip
    assert setup_of(plan).storage == Storage("fp8", "fp8")
    run(plan, naming(["gpus=2", *given, "prefill_chunk=1K"]))
    said = capsys.readouterr().out
    [line] = [each for each in said.splitlines() if each.startswith("run 8,192 x 1: ")]
    assert all(key in line.split() for key in [*given, "scheduler.prefill_chunk=1024"])
    assert "scripts.quantize writes a folder" in said
    with pytest.raises(ValueError, match="cache.dtype = fp8 must be one of auto, float32, .*, fp8_e4m3, fp4"):
        setup_of(replace(plan, cache=PlanCache(dtype="fp8")))


@pytest.mark.parametrize(
    ("quantization", "dtype", "cache", "weights", "counted"),
    [
        (None, torch.bfloat16, "auto", "auto", ("bf16", "bf16")),
        (None, torch.float32, "auto", "auto", ("fp32", "fp32")),
        (None, torch.bfloat16, "fp8_e4m3", "fp4", ("fp4", "fp8")),
        (Quantization(), torch.float32, "auto", "auto", ("fp8", "fp32")),
        (Quantization(caches_in_8_bits=True), torch.bfloat16, "auto", "auto", ("fp8", "fp8")),
        (Quantization(caches_in_8_bits=True), torch.bfloat16, "bfloat16", "auto", ("fp8", "bf16")),
    ],
)
def test_bytes_are_counted_as_a_run_has_them(quantization, dtype, cache, weights, counted) -> None:
    spec = replace(preset("glm4_9b_1m"), quantization=quantization)
    assert storage_of(spec, dtype, cache, weights) == Storage(*counted)


def test_auto_finds_the_largest_batch_in_smaller_worlds_too() -> None:
    rows = Fleet(Setup(preset("glm4_9b_1m"), named_hardware("h200")), 8).rows([131072], 20.0)
    assert {row.layout.world_size for row in rows} == {1, 2, 4, 8}
    assert all(row.ttl.us <= 20e3 and row.fits for row in rows)
    [best] = [row for row in rows if row.best]
    assert best.tokens_per_s_gpu == max(row.tokens_per_s_gpu for row in rows)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"context": "1Q"}, "context = 1Q must be a whole number"),
        ({"hardware": PlanHardware(name="a1")}, "hardware = a1 is not one of"),
        ({"batch": "auto"}, "batch = auto and ttl_ms = None: a limit goes with batch=auto"),
        ({"weights": "int4"}, "weights = int4 must be one of auto, fp32, bf16, fp8, fp4"),
    ],
)
def test_bad_input_is_named(settings, line: str) -> None:
    model = ModelConfig(path=str(CONF / "model" / "none"))
    with pytest.raises(ValueError, match=line):
        run(PlanConfig(**{"model": model, "context": "1M"} | settings), [])


def test_a_picture_names_what_it_is_drawn_with_where_that_is_missing(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"plot = out.png needs matplotlib: pip install 'helix-runtime\[plot\]'"):
        require_matplotlib("plot", "out.png")


def test_a_picture_that_cannot_be_drawn_in_the_end_is_refused_at_once(tmp_path: Path) -> None:
    check_picture("plot", str(tmp_path / "out.SVG"))
    with pytest.raises(ValueError, match="out.png cannot be written: .*/missing is not a folder"):
        check_picture("plot", str(tmp_path / "missing" / "out.png"))
    for name in ("out.bmpx", "out"):
        with pytest.raises(ValueError, match=rf"plot = .*/{name} must end in one of \..*, \.png, "):
            check_picture("plot", str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    assert [parse_size("x", text) for text in ("8", "128K", "1m", "1.5K")] == [8, 131072, 1 << 20, 1536]
    assert parse_sizes("x", "1,8,8") == [1, 8]
    assert [short(size) for size in (64, 131072, 1 << 20, 25281792)] == ["64", "128K", "1M", "24.1M"]


def test_the_frontier_holds_what_nothing_beats() -> None:
    def point(per_user: float, per_gpu: float) -> Point:
        return Point("", 1, 1, per_user, per_gpu, False)

    best = [point(1, 9), point(5, 5), point(9, 1)]
    assert frontier([point(4, 4), *best, point(5, 1), point(1, 8)]) == best
