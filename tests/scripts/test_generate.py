"""The main job from its command line: input lines, output lines, metrics.json, and what bad input gets."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import helix.building
import helix.llm
import scripts.progress
from helix.metrics import RunMetrics
from helix.request import RequestOutput, TokenLogprobs
from helix.runner import Runner
from helix.sampling import SamplingParams
from parallel.launch import Launch
from scripts import cli
from scripts.generate import GenerateConfig, output_line, plan, run
from scripts.make_checkpoint import make_checkpoint
from scripts.outputs import write_text
from scripts.prompt_file import parse_item

ROOT = Path(__file__).parents[2]
SMALL = ("runtime.device=cpu", "cache.block_size=16", "cache.num_pages=16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to break."""
    return shutil.copytree(model, tmp_path / "broken")


def torchrun(num_ranks: int, *arguments: str, folder: Path, gpus: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, on CPUs unless ``gpus``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    return subprocess.run(
        [*command, "-m", "scripts.generate", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


@dataclass(frozen=True)
class Ended:
    """How a command ended (code None: it returned) and what it printed."""

    code: int | None
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """Give the command in this process, a world of one, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        code = None
        try:
            cli.main("generate", GenerateConfig, run, plan=plan)
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr())

    yield call
    root.handlers, root.level = handlers, level


def refusal(ended: Ended) -> str:
    """The message of a command that was refused as it should be; log lines may stand before it."""
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if " INFO " not in line]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def outputs_in(text: str) -> list[dict[str, Any]]:
    """The output lines of a text; one may hold U+2028, where splitlines() would cut it."""
    *lines, end = text.split("\n")
    assert end == ""
    return [json.loads(line) for line in lines]


def write_lines(file: Path, *items: Any) -> Path:
    file.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items), "utf-8")
    return file


# --- the job on four ranks --------------------------------------------------------------------------------------------


def greedy_of_transformers(model: Path, prompt: list[int], number: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=number,
        do_sample=False,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_a_run_whose_graphs_hold_collectives_ends(model: Path, tmp_path: Path) -> None:
    prompt = [i * i % 256 for i in range(70)]
    write_lines(tmp_path / "in.jsonl", {"prompt_token_ids": prompt})
    settings = [f"model.path={model}", "model.dtype=float32", "parallel.kvp=2", "attention.exchange=collective"]
    settings += ["runtime.device=cuda", "sampling.max_tokens=12", "prompts=in.jsonl", "output=out.jsonl"]
    ended = torchrun(2, *settings, folder=tmp_path, gpus=True)
    assert ended.returncode == 0, ended.stderr
    assert "captured decode graphs" in ended.stderr
    [output] = outputs_in((tmp_path / "out.jsonl").read_text("utf-8"))
    assert output["token_ids"] == greedy_of_transformers(model, prompt, 12)


def test_four_ranks_decode_a_file_of_prompts_and_a_bad_line_fails_alone(model: Path, tmp_path: Path) -> None:
    long_prompt, short_prompt = [i * i % 256 for i in range(70)], [72, 105]
    write_lines(
        tmp_path / "in.jsonl",
        {"prompt_token_ids": long_prompt, "id": "long"},
        {"prompt": "Wie heißt du?", "id": 7, "sampling": {"max_tokens": 3, "logprobs": 2}},
        '{"prompt": "no end',
        {"messages": [{"role": "user", "content": "Hi"}], "sampling": {"temperature": 0.9, "seed": 5}},
        {"prompt_token_ids": short_prompt},
    )
    settings = [f"model.path={model}", "parallel.kvp=2", "parallel.tpa=2", "prompts=in.jsonl", "output=out.jsonl"]
    settings += ["metrics=metrics.json", "sampling.max_tokens=12", "cache.block_size=16", "cache.num_pages=32"]
    ended = torchrun(4, *settings, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert "1 of 5 prompts failed: in.jsonl, line 3: not JSON: " in ended.stderr
    assert ended.stderr.count("attention.backend=auto") == 1, "rank 0 speaks alone"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "metrics.json", "out.jsonl"]

    outputs = outputs_in((tmp_path / "out.jsonl").read_text("utf-8"))
    assert [output["id"] for output in outputs] == ["long", "7", "2", "3", "4"]
    keys = ["id", "token_ids", "text", "finish_reason", "prompt_tokens", "cached_tokens"]
    assert [list(output) for output in outputs] == [
        [*keys, "hash"],
        [*keys, "logprobs", "hash"],
        [*keys, "error"],
        [*keys, "hash"],
        [*keys, "hash"],
    ]
    assert [output["prompt_tokens"] for output in outputs] == [70, 14, 0, 6, 2]
    assert {output["cached_tokens"] for output in outputs} == {0}
    check_lines(model, outputs, long_prompt, short_prompt)
    check_metrics(json.loads((tmp_path / "metrics.json").read_text("utf-8")), outputs)


def check_lines(model: Path, outputs: list[dict[str, Any]], long_prompt: list[int], short_prompt: list[int]) -> None:
    long, text, bad, chat, short = outputs
    assert long["token_ids"] == greedy_of_transformers(model, long_prompt, 12)
    assert short["token_ids"] == greedy_of_transformers(model, short_prompt, 12)
    assert [output["finish_reason"] for output in (long, text, chat, short)] == ["length"] * 4
    assert (bad["finish_reason"], bad["token_ids"], bad["text"]) == ("error", [], "")
    assert bad["error"].startswith("in.jsonl, line 3: not JSON: ")
    assert text["token_ids"] == greedy_of_transformers(model, list("Wie heißt du?".encode()), 3)
    assert [each["token_id"] for each in text["logprobs"]] == text["token_ids"]
    for each in text["logprobs"]:
        assert list(each) == ["token_id", "logprob", "top"]
        assert each["top"][str(each["token_id"])] == each["logprob"] == max(each["top"].values()) < 0
        assert len(each["top"]) == 2
    assert len(chat["token_ids"]) == 12

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for output in outputs:
        assert output["text"] == tokenizer.decode(output["token_ids"], skip_special_tokens=True)


def check_metrics(metrics: dict[str, Any], outputs: list[dict[str, Any]]) -> None:
    made = sum(len(output["token_ids"]) for output in outputs)
    prompts = sum(output["prompt_tokens"] for output in outputs)
    timed = ("elapsed_s", "output_tokens_per_s", "ttft_ms", "ttl_ms")
    times = {key: metrics.pop(key) for key in timed}
    held = metrics.pop("tokens_per_kvp_rank")
    cache = metrics.pop("cache")
    assert (cache["tokens_reused"], cache["tokens_missed"]) == (0, prompts)
    assert [sum(pages.values()) for pages in cache["pages_per_kvp_rank"]] == [32, 32]
    bytes_per_rank = metrics.pop("layer_weight_bytes_per_rank")
    assert metrics == {
        "predicted": None,  # there are no constants of CPUs
        "world_size": 4,
        "layout": {"kvp": 2, "tpa": 2, "tpf": 4, "ep": 1},
        "device": "cpu",
        "dtype": "float32",
        "block_size": 16,
        "num_pages_per_rank": 32,
        "tokens_per_rank": [*held, *held],
        "requests": 5,
        "errors": 1,
        "steps": 12,
        "padding_rows": 0,
        "preemptions": 0,
        "prefill_tokens": prompts,
        "output_tokens": made,
        "speculative": None,
    }
    assert sum(held) == prompts + made - 4, "the last token of each is never stored"
    assert len(held) == 2
    assert max(held) - min(held) <= 2 * 16
    assert len(bytes_per_rank) == 4
    assert min(bytes_per_rank) > 0
    assert times["output_tokens_per_s"] == pytest.approx(made / times["elapsed_s"])
    for name in ("ttft_ms", "ttl_ms"):
        assert list(times[name]) == ["mean", "p50", "p90", "p99"]
        assert 0 < times[name]["p50"] <= times[name]["p90"] <= times[name]["p99"] < 1000 * times["elapsed_s"]


# --- the command in one process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculation_changes_no_line_and_is_in_the_metrics(model: Path, command: Command, method: str) -> None:
    plain = command(f"model.path={model}", "prompt=hello hello", "sampling.max_tokens=9", *SMALL)
    drafts = [f"speculative.model.path={model}"] if method == "draft_model" else []
    drafted = command(
        f"model.path={model}", "prompt=hello hello", "sampling.max_tokens=9", *SMALL, f"speculative={method}", *drafts,
        "speculative.max_draft_len=4", "speculative.draft_len_schedule={4:4,8:2,32:1}", "metrics=metrics.json",
    )  # fmt: skip
    assert (drafted.code, drafted.out) == (None, plain.out)
    figures = json.loads(Path("metrics.json").read_text("utf-8"))["speculative"]
    steps = figures["steps_per_draft_len"]
    if method == "draft_model":
        assert (figures["drafted"], figures["accepted"], figures["tokens_per_target_step"]) == (6, 6, 4.0)
        assert steps == {"2": 1, "4": 1}, "the last token is drafted by nobody"
    else:
        assert (figures["drafted"], steps) == (0, {"0": 8}), "these 9 tokens never repeat what stood before"


def test_without_an_output_file_the_lines_are_printed(model: Path, command: Command) -> None:
    ended = command(f"model.path={model}", "prompt=hello", "sampling.max_tokens=2", *SMALL)
    assert ended.code is None
    (output,) = outputs_in(ended.out)
    assert (output["id"], output["prompt_tokens"], len(output["token_ids"])) == ("0", 5, 2)


def test_nothing_but_the_asked_for_files_is_left_behind(model: Path, command: Command) -> None:
    command(f"model.path={model}", "prompt=hello", "output=out.jsonl", "metrics=metrics.json", *SMALL)
    command(f"model.path={model}", "prompt=", *SMALL)
    assert sorted(os.listdir()) == ["metrics.json", "out.jsonl"]


def test_presets_reach_the_run(model: Path, command: Command) -> None:
    write_lines(Path("in.jsonl"), {"prompt": "hi"}, {"prompt": "hi"})
    given = (f"model.path={model}", "prompts=in.jsonl", "sampling.seed=3", "metrics=metrics.json", *SMALL)
    drawn = command(*given, "parallel=tp", "sampling=nucleus")
    first, second = (output["token_ids"] for output in outputs_in(drawn.out))
    assert first == second
    assert json.loads(Path("metrics.json").read_text())["layout"] == {"kvp": 1, "tpa": 1, "tpf": 1, "ep": 1}
    greedy = command(*given, "parallel=tp", "sampling=greedy")
    assert first != outputs_in(greedy.out)[0]["token_ids"]
    assert command(*given, "sampling.temperature=0.8", "sampling.top_p=0.95").out == drawn.out


def test_a_sweep_runs_one_job_after_another(model: Path, command: Command) -> None:
    ended = command("-m", f"model.path={model}", "prompt=hello", *SMALL, "sampling.max_tokens=1,2")
    assert ended.code is None
    assert [len(output["token_ids"]) for output in outputs_in(ended.out)] == [1, 2]
    assert os.listdir() == []


def test_ranks_run_a_sweep_and_leave_each_jobs_output_alone(model: Path, tmp_path: Path) -> None:
    settings = [f"model.path={model}", "prompt=hello", "parallel.kvp=2", "output=${sampling.max_tokens}.jsonl", *SMALL]
    lengths = range(1, 5)
    sweep = "sampling.max_tokens=" + ",".join(map(str, lengths))
    ended = torchrun(2, "--multirun", *settings, sweep, "runtime.timeout_s=60", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{length}.jsonl" for length in lengths]
    for length in lengths:
        [output] = outputs_in((tmp_path / f"{length}.jsonl").read_text("utf-8"))
        assert len(output["token_ids"]) == length


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("parallel.kvp=1,2", "parallel.kvp (2) x parallel.tpa (1) = 2 ranks but 1 started; lower one or start 2"),
        ("model.path={0},gone", "model.path = gone does not exist; give a checkpoint folder or a config.json file"),
        ("output=out.jsonl,gone/out.jsonl", "gone/out.jsonl cannot be written: {1}/gone is not a folder"),
        (
            "sampling.max_tokens=1,2 prompts=in.jsonl prompt=null",
            "prompts = in.jsonl cannot be read: No such file or directory",
        ),
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_a_sweep_with_a_job_that_cannot_run_is_refused_before_the_first(
    model: Path, command: Command, sweep: str, message: str
) -> None:
    given = ("-m", f"model.path={model}", "prompt=hello", *SMALL)
    ended = command(*given, *sweep.format(model).split())
    assert refusal(ended) == message.format(model, Path.cwd())
    assert os.listdir() == []


@pytest.mark.slow
def test_ranks_refuse_a_sweep_with_a_layout_that_does_not_fit_and_run_none_of_it(model: Path, tmp_path: Path) -> None:
    settings = [f"model.path={model}", "prompt=hello", "output=${parallel.kvp}.jsonl", "parallel.tpa=1", *SMALL]
    ended = torchrun(2, "-m", *settings, "parallel.kvp=2,4", folder=tmp_path)
    message = "error: parallel.kvp (4) x parallel.tpa (1) = 4 ranks but 2 started; lower one or start 4"
    assert [line for line in ended.stderr.splitlines() if line.startswith(("error", "job "))] == [message]
    assert "exitcode  : 2 " in ended.stderr.split("Root Cause (first observed failure)")[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_memory")
def test_when_every_prompt_fails_the_code_is_2_before_any_model_memory_is_taken(model: Path, command: Command) -> None:
    write_lines(Path("in.jsonl"), {"prompt_token_ids": [320]}, "{")
    ended = command(f"model.path={model}", "prompts=in.jsonl", "output=out.jsonl", *SMALL)
    assert refusal(ended) == "all 2 prompts failed: token id 320 is outside the vocabulary of 320"
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": ""}, "the prompt is empty; give at least one token"),
        ({"prompt_token_ids": []}, "the prompt is empty; give at least one token"),
        ({"prompt_token_ids": [1] * 30}, "the prompt has 30 tokens; the model takes at most 29"),
        ({"prompt": "x" * 31}, "the prompt has 31 tokens; the model takes at most 29"),
        ({"prompt_token_ids": [5, 320]}, "token id 320 is outside the vocabulary of 320"),
        ({"prompt_token_ids": [-1]}, "token id -1 is outside the vocabulary of 320"),
        ('{"prompt": "a"', "in.jsonl, line 1: not JSON: Expecting ',' delimiter (column 15)"),
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_a_bad_prompt_is_refused_in_one_line(model: Path, command: Command, line: Any, message: str) -> None:
    write_lines(Path("in.jsonl"), line)
    assert refusal(command(f"model.path={model}", "prompts=in.jsonl", "model.max_position=30", *SMALL)) == message


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_out_of_a_step_is_no_bad_input(
    model: Path, command: Command, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def run_chunks(*_: Any) -> None:
        raise error("a defect")

    monkeypatch.setattr(Runner, "launch", run_chunks)
    ended = command(f"model.path={model}", "prompt=hi", *SMALL)
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "in run_chunks" in ended.err
    assert f"{error.__name__}: a defect" in ended.err
    assert "error: " not in ended.err


def test_progress_is_told_on_rank_0_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scripts.progress, "LINE_EVERY_S", 0.0)
    metrics = RunMetrics(tokens_per_rank=[0], prefill_tokens=30, prefill_total=100, decode_tokens=8, elapsed_s=2.0)
    for enabled in (True, False):
        with scripts.progress.RunProgress(enabled, 64) as progress:
            progress.update(metrics)
    assert capsys.readouterr().err == "prefill 30 of 100 tokens, decode 8 tokens, 4.0 tokens/s, 2 s\n"


def test_a_terminal_sees_how_much_is_done_of_how_much(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    metrics = RunMetrics(tokens_per_rank=[0], prefill_tokens=30, prefill_total=100, decode_tokens=8, elapsed_s=2.0)
    with scripts.progress.RunProgress(True, 64) as progress:
        progress.update(metrics)
    shown = capsys.readouterr().err
    assert "30 of 100 tokens" in shown
    assert "8 of 64 tokens" in shown
    assert "4.0 tokens/s" in shown
    assert "None" not in shown


# --- settings that do not fit -----------------------------------------------------------------------------------------


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make taking memory for the model a failure."""

    def decoder(*_: Any, **__: Any) -> None:
        raise AssertionError("memory was taken for the model")

    monkeypatch.setattr(helix.building, "Decoder", decoder)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_index_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    weights = {name: f"model-0000{shard}-of-00002.safetensors" for shard, name in enumerate(("a", "b"), 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (shutil.rmtree, "model.path = {0} does not exist; give a checkpoint folder or a config.json file"),
        (unlink("config.json"), "model.path = {0} has no config.json; give a checkpoint folder or a config.json file"),
        (
            lambda folder: edit_config(folder, model_type="mamba"),
            "model.path = {0} has model_type 'mamba'; supported: deepseek_v2, deepseek_v3, gemma3, ",
        ),
        (
            unlink("model.safetensors"),
            "model.path = {0} has no weights: neither model.safetensors nor model.safetensors.index.json is there",
        ),
        (
            no_index_shard,
            "model.path = {0} lacks 1 of 2 files that model.safetensors.index.json names: model-00001-of",
        ),
        (
            truncate,
            "model.path = {0}/model.safetensors is truncated or not a safetensors file (Error while",
        ),
        (
            to_pickle,
            "model.path = {0} holds only pickle files (pytorch_model.bin), refused: Helix reads safetensors only",
        ),
        (
            lambda folder: edit_config(folder, num_hidden_layers=3),
            "model.path = {0} lacks 9 tensors of a llama model: model.layers.2",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "model.path = {0}: its tokenizer does not load: "),
    ],
    ids=[
        "no folder",
        "no config",
        "family",
        "no weights",
        "missing shard",
        "truncated",
        "pickle",
        "tensors",
        "tokenizer",
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_a_checkpoint_that_cannot_be_used_is_refused_in_one_line(
    broken: Path, command: Command, breaking: Callable[[Path], Any], message: str
) -> None:
    breaking(broken)
    assert refusal(command(f"model.path={broken}", "prompt=hi", *SMALL)).startswith(message.format(broken))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("parallel.kvp=2",), "parallel.kvp (2) x parallel.tpa (1) = 2 ranks but 1 started; lower one or start 2"),
        (("parallel.tpa=4",), "parallel.kvp (1) x parallel.tpa (4) = 4 ranks but 1 started; lower one or start 4"),
        (("parallel.tpf=2",), "parallel.tpf (2) x parallel.ep (1) must equal parallel.tpa (1) x parallel.kvp (1) = 1"),
        (("model.path=",), "model.path is empty: give a Hugging Face checkpoint folder"),
        (("prompts=none.jsonl", "prompt=null"), "prompts = none.jsonl cannot be read: No such file or directory"),
        (("output=nowhere/out.jsonl",), "nowhere/out.jsonl cannot be written: {0}/nowhere is not a folder"),
        (("metrics=nowhere/m.json",), "nowhere/m.json cannot be written: {0}/nowhere is not a folder"),
        (("output=.",), ". cannot be written"),
        (("output=/proc/out.jsonl",), "/proc/out.jsonl cannot be written: No such file or directory"),
        (("cache.events=/proc/events.jsonl",), "/proc/events.jsonl cannot be written: No such file or directory"),
        (("output=a.json", "metrics=./a.json"), "{0}/a.json is named twice among prompts, output, metrics and"),
        (("prompts=in.jsonl", "prompt=null", "output=in.jsonl"), "{0}/in.jsonl is named twice among prompts, output"),
        (("cache.num_pages=2000000000",), "cache.num_pages = 2000000000 needs 32,768.0 GB of the "),
        (("cache.num_pages=100000000000",), "cache.num_pages = 100000000000 must be at most 2147483647"),
        (("runtime.device=cuda",), "runtime.device = cuda, but this node has "),
        (("attention.backend=triton",), "attention.backend = triton needs a CUDA device (or TRITON_INTERPRET=1)"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("no_memory")
def test_settings_that_do_not_fit_are_refused_in_one_line(
    model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = command(f"model.path={model}", "prompt=hi", *SMALL, *settings)
    assert refusal(ended).startswith(message.format(Path.cwd()))
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("world_size", "settings", "message"),
    [
        (
            16,
            ("parallel.kvp=2", "parallel.tpa=8"),
            "parallel.tpa = 8 exceeds the model's 4 KV heads while parallel.kvp = 2 > 1; "
            "lower tpa to at most 4 and give the ranks to kvp",
        ),
        (3, ("parallel.tpa=3",), "parallel.tpa = 3 must divide the model's 4 KV heads or be a multiple of them"),
        (4, ("parallel.kvp=8",), "parallel.kvp (8) x parallel.tpa (1) = 8 ranks but 4 started; lower one or start 8"),
        (4, ("parallel.kvp=2", "parallel.tpa=1"), "= 2 ranks but 4 started; raise one or start 2"),
        (16, ("parallel.kvp=16",), "= 16 ranks exceed the model's 8 query heads; lower one"),
        (4, ("parallel.ep=2",), "parallel.ep = 2, but llama models have no experts; use parallel.ep=1"),
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_a_layout_that_fits_neither_world_nor_model_is_refused_in_one_line(
    model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    settings: tuple[str, ...],
    message: str,
) -> None:
    launch = Launch(world_size - 1, world_size, 0, world_size, torch.device("cpu"))
    monkeypatch.setattr(helix.llm, "start", lambda *_, **__: launch)
    assert message in refusal(command(f"model.path={model}", "prompt=hi", *SMALL, *settings))


def test_ranks_refuse_bad_input_once_and_with_code_2(model: Path, tmp_path: Path) -> None:
    ended = torchrun(2, f"model.path={model}", "prompt=hi", "parallel.kvp=4", folder=tmp_path)
    message = "error: parallel.kvp (4) x parallel.tpa (1) = 4 ranks but 2 started; lower one or start 4"
    assert [line for line in ended.stderr.splitlines() if "parallel.kvp" in line] == [message]
    assert ended.stdout == ""
    assert ended.stderr.count("Traceback") == 1, "torchrun's own, which tells of the exit codes"
    first = ended.stderr.split("Root Cause (first observed failure)")[1]
    assert "rank      : 0 (local_rank: 0)" in first
    assert "exitcode  : 2 " in first
    assert list(tmp_path.iterdir()) == []


# --- lines ------------------------------------------------------------------------------------------------------------


def test_a_line_that_repeats_an_id_fails_alone_and_names_the_first_with_it(model: Path, command: Command) -> None:
    write_lines(
        Path("in.jsonl"),
        {"prompt": "a", "id": "x"},
        {"prompt": "b", "id": "0"},
        {"prompt": "c"},
        "",
        {"prompt": "d", "id": "x"},
        {"prompt": "e", "id": 2},
        {"prompt": "f", "id": "6"},
        {"prompt": "g"},
        {"prompt": "", "id": "x"},
        "{",
    )
    ended = command(f"model.path={model}", "prompts=in.jsonl", "sampling.max_tokens=2", *SMALL)
    assert ended.code is None
    outputs = outputs_in(ended.out)
    own = "give every line an id of its own"
    assert [(output["id"], output.get("error")) for output in outputs] == [
        ("x", None),
        ("0", None),
        ("2", None),
        ("x", f'in.jsonl, line 5: id "x" is that of line 1; {own}'),
        ("2", f'in.jsonl, line 6: id "2" is that of line 3; {own}'),
        ("6", None),
        ("6", f'in.jsonl, line 8: its id, "6" by default, is that of line 7; {own}'),
        ("x", f'in.jsonl, line 9: id "x" is that of line 1; {own}'),
        ("8", "in.jsonl, line 10: not JSON: Expecting property name enclosed in double quotes (column 2)"),
    ]
    assert [output["finish_reason"] for output in outputs] == [
        "error" if "error" in output else "length" for output in outputs
    ]


def test_an_output_line_holds_every_field_and_reads_back() -> None:
    output = RequestOutput(
        None,
        token_ids=[3, 4],
        text="a\n\u2028ä",
        finish_reason="stop",
        prompt_tokens=7,
        cached_tokens=5,
        logprobs=[TokenLogprobs(3, -0.5, {3: -0.5, 9: -2.0}), TokenLogprobs(4, -0.25, {})],
    )
    line = output_line(output, 6, "0123")
    assert "\n" not in line
    assert "ä" in line
    assert json.loads(line) == {
        "id": "6",
        "token_ids": [3, 4],
        "text": "a\n\u2028ä",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "cached_tokens": 5,
        "logprobs": [
            {"token_id": 3, "logprob": -0.5, "top": {"3": -0.5, "9": -2.0}},
            {"token_id": 4, "logprob": -0.25, "top": {}},
        ],
        "hash": "0123",
    }
    failed = json.loads(output_line(RequestOutput("me", finish_reason="error", error="why"), 6, "0123"))
    assert (failed["id"], failed["error"], "logprobs" in failed, "hash" in failed) == ("me", "why", False, False)


def test_an_id_that_is_no_text_comes_back_and_spoils_no_file(tmp_path: Path) -> None:
    request = parse_item({"id": "\ud800", "prompt": "a"}, "here", SamplingParams())
    write_text(str(tmp_path / "out.jsonl"), output_line(RequestOutput(request.id), 0, ""))
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["id"] == "\ud800"


FULL = "cannot be written (No space left on device)"


def failure(ended: Ended) -> str:
    """The message of a run that failed as it should; log lines and what is printed instead may stand before it."""
    assert ended.code == 1
    assert "Traceback" not in ended.err
    return ended.err.splitlines()[-1]


def test_lines_that_cannot_be_written_are_printed_and_the_run_says_that_it_failed(
    model: Path, command: Command
) -> None:
    given = (f"model.path={model}", "prompt=hello", "sampling.max_tokens=2", *SMALL)
    ended = command(*given, "output=/dev/full", "metrics=metrics.json")
    assert failure(ended) == f"error: output = /dev/full {FULL}; what it was to hold is on standard output"
    assert ended.out == command(*given).out
    assert json.loads(Path("metrics.json").read_text())["output_tokens"] == 2


def test_metrics_that_cannot_be_written_spoil_no_output(model: Path, command: Command) -> None:
    given = (f"model.path={model}", "prompt=hello", "sampling.max_tokens=2", *SMALL)
    ended = command(*given, "metrics=/dev/full")
    assert failure(ended) == f"error: metrics = /dev/full {FULL}; what it was to hold is on standard error"
    assert '"output_tokens": 2,' in ended.err
    assert ended.out == command(*given).out


def test_events_that_cannot_be_written_end_no_run_but_make_it_fail(model: Path, command: Command) -> None:
    given = (f"model.path={model}", "prompt=hello", "sampling.max_tokens=20", *SMALL)
    ended = command(*given, "cache.events=/dev/full")
    assert failure(ended) == f"error: cache.events = /dev/full {FULL}; it lacks events"
    assert ended.err.count("it lacks events from now on") == 1
    assert ended.out == command(*given).out
