"""Sweeps: several jobs of one command line."""

from pathlib import Path

import pytest

from scripts.generate import GenerateConfig
from tests.scripts.cli.line import GIVEN, Command, one_line, raising


def test_a_sweep_splits_texts_at_commas_that_are_not_in_quotes_or_brackets(command: Command) -> None:
    sweep = ("-m", "model.path=DIR", "prompts=a (1).jsonl, 'b,c', \"d\\te\",it's[1,2]", "output=o-${prompts}")
    assert [job.prompts for job in command(*sweep).ran] == ["a (1).jsonl", "b,c", "d\te", "it's[1,2]"]
    stops = command("-m", *GIVEN, "sampling.stop=[a,b],[c],'d,e'").ran
    assert [job.sampling.stop for job in stops] == [["a", "b"], ["c"], ["d,e"]]


def test_a_sweep_takes_a_prompt_with_commas_for_one_and_null_for_none(command: Command) -> None:
    ran = command("-m", "model.path=DIR", "prompt=first, second", "sampling.seed=1,2").ran
    assert [(job.prompt, job.sampling.seed) for job in ran] == [("first, second", 1), ("first, second", 2)]
    (config,) = command(*GIVEN, "prompt=null").ran
    assert config.prompt is None


def test_a_sweep_runs_every_job_on_every_rank_and_leaves_nothing(command: Command, tmp_path: Path) -> None:
    for rank in (0, 1):
        ended = command("-m", *GIVEN, "sampling.max_tokens=1,2", "sampling.seed=3,4", rank=rank)
        assert (ended.code, ended.out) == (None, "")
        assert [(job.sampling.max_tokens, job.sampling.seed) for job in ended.ran] == [(1, 3), (1, 4), (2, 3), (2, 4)]
        assert ended.err.splitlines() == [
            f"job {number} of 4: sampling.max_tokens={tokens} sampling.seed={seed}"
            for number, (tokens, seed) in enumerate([(1, 3), (1, 4), (2, 3), (2, 4)], 1)
            if rank == 0
        ]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_takes_presets_ranges_quoted_values_and_other_flags(command: Command, tmp_path: Path) -> None:
    presets = command(*GIVEN, "sampling=glob(*)", "sampling.stop=['a,b']", "--multirun").ran
    assert [(job.sampling.temperature, job.sampling.stop) for job in presets] == [(0.0, ["a,b"]), (0.8, ["a,b"])]
    (tmp_path / "mine" / "sampling").mkdir(parents=True)
    (tmp_path / "mine" / "sampling" / "short.yaml").write_text("max_tokens: 3\n")
    folder = ("--config-dir", f"{tmp_path}/mine")
    ran = command(*GIVEN, "-m", "sampling=short", *folder, "sampling.seed=range(2)", "prompts='a,b'").ran
    assert [(job.sampling.max_tokens, job.sampling.seed, job.prompts) for job in ran] == [(3, 0, "a,b"), (3, 1, "a,b")]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sampling.max_tokens=1,many", "sampling.max_tokens = many must be an integer"),
        ("sampling.max_tokens=1,0", "sampling.max_tokens = 0 must lie in [1, 2**31)"),
        ("output=same.jsonl,same.jsonl", "output = same.jsonl would be written by 2 jobs; name it"),
        ("cache.events=e.jsonl,e.jsonl", "cache.events = e.jsonl would be written by 2 jobs; name it"),
        ("sampling.max_token=1,2", "sampling.max_token is not a key; did you mean sampling.max_tokens?"),
        ("sampling.top_p=interval(0,1)", "Can only enumerate CHOICE and RANGE sweeps"),
    ],
)
def test_a_sweep_with_one_bad_job_is_refused_before_the_first(command: Command, argument: str, message: str) -> None:
    assert message in one_line(command("-m", *GIVEN, argument))


def test_every_job_of_a_sweep_is_planned_before_the_first_runs(command: Command) -> None:
    planned: list[int] = []

    def plan(config: GenerateConfig) -> None:
        planned.append(config.sampling.max_tokens)
        if config.sampling.max_tokens == 3:
            raise ValueError("3 is too many")

    sweep = ("-m", *GIVEN, "sampling.max_tokens=1,2,3,4")
    assert one_line(command(*sweep, plan=plan)) == "3 is too many"
    assert planned == [1, 2, 3]
    assert len(command(*sweep, plan=lambda _: None).ran) == 4
    assert len(command(*GIVEN, plan=raising(ValueError("a single job finds out for itself"))).ran) == 1


def test_a_folder_of_presets_of_the_users_own_reaches_every_rank(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine" / "sampling").mkdir(parents=True)
    (tmp_path / "mine" / "sampling" / "short.yaml").write_text("max_tokens: 3\n")
    for rank in (0, 1):
        (config,) = command(f"--config-dir={tmp_path}/mine", *GIVEN, "sampling=short", rank=rank).ran
        assert config.sampling.max_tokens == 3


def test_a_sweep_with_a_bad_preset_of_the_users_own_is_refused_before_the_first(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "sampling").mkdir(parents=True)
    (tmp_path / "mine" / "sampling" / "none.yaml").write_text("max_tokens: 0\n")
    sweep = (*GIVEN, "-m", "sampling=greedy,none", "--config-dir")
    assert "sampling.max_tokens = 0 must lie in [1, 2**31)" in one_line(command(*sweep, f"{tmp_path}/mine"))
    assert one_line(command(*sweep, "gone")).startswith("--config-dir gone is not a folder; give one that holds")
