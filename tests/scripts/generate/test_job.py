"""The main job from its command line: input lines, output lines, metrics.json."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import scripts.progress
from helix.metrics import RunMetrics
from helix.runner import Runner
from tests.scripts.generate.job import SMALL, Command, outputs_in, torchrun, write_lines

# --- on ranks ---------------------------------------------------------------------------------------------------------


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


# --- in one process ---------------------------------------------------------------------------------------------------


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


def test_no_bar_wipes_what_is_printed_on_the_same_terminal(
    model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    told = []
    for is_terminal, output in ((True, ()), (False, ()), (True, ("output=out.jsonl",))):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        ended = command(f"model.path={model}", "prompt=hi", "sampling.max_tokens=3", *SMALL, *output)
        assert ended.code is None
        told.append("of 3 tokens" in ended.err)
    assert told == [False, True, True]


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
