"""What every command shares: rank 0 alone speaks, bad settings end with code 2 and one line, its flags work."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from scripts import cli, ending, key_help
from scripts.generate import GenerateConfig

ROOT = Path(__file__).parents[2]
GIVEN = ("model.path=DIR", "prompts=in.jsonl")


@dataclass(frozen=True)
class Ended:
    """How a command ended: what it would have run, its exit code (None: it returned) and what it printed."""

    ran: list[GenerateConfig]
    code: int | None
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Give ``generate``'s command line in this process, in an empty folder, with a body that only notes its config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ending, "_GRACE_S", 0.0)
    monkeypatch.setenv("COLUMNS", "200")

    def run(
        *arguments: str,
        rank: int | None = None,
        body: Callable[[Any], None] | None = None,
        plan: Callable[[Any], None] | None = None,
    ) -> Ended:
        configs: list[GenerateConfig] = []

        def note(config: GenerateConfig) -> None:
            configs.append(config)

        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        if rank is not None:
            monkeypatch.setenv("RANK", str(rank))
        code = None
        try:
            cli.main("generate", GenerateConfig, body or note, plan=plan)
        except SystemExit as end:
            code = end.code
        return Ended(configs, code, *capsys.readouterr())

    return run


def torchrun(num_ranks: int, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command on ranks of its own, in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def one_line(ended: Ended) -> str:
    """The message of a command that was refused as it should be."""
    assert (ended.code, ended.ran, ended.out) == (2, [], "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    return ended.err.removeprefix("error: ").rstrip("\n")


# --- settings ---------------------------------------------------------------------------------------------------------


def names(schema: type) -> str:
    return ", ".join(field.name for field in fields(schema))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "sampling.max_token=3",
            "sampling.max_token is not a key; did you mean sampling.max_tokens? sampling has: max_tokens, min_tokens, ",
        ),
        ("paralel.kvp=2", "paralel.kvp is not a key; did you mean parallel? there are: " + names(GenerateConfig)),
        ("zzz=1", "zzz is not a key; there are: " + names(GenerateConfig)),
        ("+zzz=1", "zzz is not a key; there are: " + names(GenerateConfig)),
        ("+cache.blocksize=1", "cache.blocksize is not a key; did you mean cache.block_size? cache has: block_size, "),
        ("~cache.blocks=1", "cache.blocks is not a key; did you mean cache.block_size? cache has: block_size, "),
        (
            "sampling.max_tokens.x=1",
            "sampling.max_tokens.x is not a key: sampling.max_tokens is a value, not a group of keys",
        ),
        (
            "sampling.max_tokens=many",
            "sampling.max_tokens = many must be an integer",
        ),
        ("parallel.kvp=[1,2]", "parallel.kvp = [1,2] must be an integer or null"),
        ("sampling.max_tokens=1,2", "sampling.max_tokens = 1,2 must be an integer"),
        ("sampling.max_tokens=4.5", "sampling.max_tokens = 4.5 must be an integer"),
        ("sampling.max_tokens=", "sampling.max_tokens = '' must be an integer"),
        ("sampling.top_p=null", "sampling.top_p = null must be a number"),
        ("sampling.ignore_eos=2", "sampling.ignore_eos = 2 must be true or false"),
        ("sampling.stop_token_ids=[1,x]", "sampling.stop_token_ids = x must be an integer"),
        (
            'sampling.stop=["\\q"]',
            'sampling.stop = "\\q" has an escape that is none of JSON\'s; write \\\\ for a backsl',
        ),
        (
            "output=a-${sampling.seeds}",
            "output = a-${sampling.seeds}: sampling.seeds is not a key; did you mean sampling.",
        ),
        ("output=a-${sampling}", "output = a-${sampling}: sampling is a group of keys; name one of them"),
        ("cache=16", "cache = 16 is a group of keys and no value; set one of cache.block_size, cache.dtype, "),
        ("cache.num_pages", "cache.num_pages is not KEY=VALUE; null is no value"),
        ("~cache.num_pages", "~cache.num_pages is not KEY=VALUE; null is no value"),
        ("hydra.verbose=true", "hydra.verbose is not a key; there are: "),
        (
            "--verbose",
            "unrecognized arguments: --verbose; the flags are --help, --cfg job, --multirun and --config-dir",
        ),
        ("sampling=beam", "Could not find 'sampling/beam' Available options in 'sampling': greedy nucleus"),
        ("model.dtype=int8", "model.dtype = 'int8' must be one of auto, float32, bfloat16, float16"),
        ("model.load=pickle", "model.load = 'pickle' must be one of checkpoint, dummy"),
        ("attention.backend=cuda", "attention.backend = 'cuda' must be one of auto, reference, triton"),
        ("attention.exchange=mpi", "attention.exchange = 'mpi' must be one of auto, "),
        ("runtime.device=tpu", "runtime.device = 'tpu' must be one of auto, cpu, cuda"),
        ("cache.block_size=3", "cache.block_size = 3 must be a power of two from 1 to 256"),
        ("cache.memory_fraction=1.5", "cache.memory_fraction = 1.5 must lie in (0, 1]"),
        ("scheduler.max_batch=0", "scheduler.max_batch = 0 must be at least 1"),
        ("parallel.tpa=0", "parallel.tpa = 0 must be at least 1"),
        ("sampling.top_p=2", "sampling.top_p = 2.0 must lie in (0, 1]"),
        ("prompt=hello", "give one of prompts (a JSON-lines file) and prompt (one string)"),
        ("prompts=null", "give one of prompts (a JSON-lines file) and prompt (one string)"),
        ("prompts", "prompts is not KEY=VALUE; null is no value"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line_that_names_it(command: Command, argument: str, message: str) -> None:
    assert message in one_line(command(*GIVEN, argument))


def test_defaults_are_those_of_the_schema(command: Command) -> None:
    ended = command(*GIVEN)
    assert (ended.code, ended.out, ended.err) == (None, "", "")
    (config,) = ended.ran
    expected = GenerateConfig(prompts="in.jsonl")
    expected.model.path = "DIR"
    assert config == expected


def test_presets_compose_and_the_command_line_has_the_last_word(command: Command) -> None:
    (config,) = command(*GIVEN, "parallel=tp", "sampling=nucleus", "runtime=debug", "sampling.top_p=0.5").ran
    assert (config.parallel.kvp, config.parallel.tpa) == (1, None)
    assert (config.sampling.temperature, config.sampling.top_p) == (0.8, 0.5)
    assert config.runtime.check_ranks
    (config,) = command(*GIVEN, "parallel=kvp", "sampling.stop=[a,'b c']", "sampling.seed=7").ran
    assert (config.parallel.kvp, config.parallel.tpa) == (None, 1)
    assert (config.sampling.stop, config.sampling.seed, config.sampling.temperature) == (["a", "b c"], 7, 0.0)


@pytest.mark.parametrize(
    "preset",
    [
        f"{field.name}={file.stem}"
        for field in fields(GenerateConfig)
        for file in (cli.CONF / field.name).glob("*.yaml")
    ],
)
def test_every_preset_composes(command: Command, preset: str) -> None:
    weightless = preset.startswith("model=") and not preset.endswith("=default")  # shapes for benchmarks, no path
    assert len(command(*GIVEN[weightless:], preset).ran) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a text, {with} = braces",
        "'quoted' and \"quoted\"",
        "it's \\'escaped\\' \\\\",
        "${sampling.seed} \\${no} \\\\${such}",
        "[1, 2",
        "two\nlines\t# and no comment",
        " 1e3 ",
        "007",
        "true",
        "glob(*)",
        "${",
        "\\",
        "",
    ],
)
def test_a_prompt_is_the_text_that_was_given(command: Command, text: str) -> None:
    (config,) = command("model.path=DIR", f"prompt={text}").ran
    assert config.prompt == text


ODD_TEXTS = [
    "/x/step=100", "/x/模型", "f(1).jsonl", "with spaces , commas", "{a:1,b}", "it's", 'a "b" c', "[1,2", "a]b[",
    "$HOME", "50%", "#1", "a:b", "a\\b", "\\", "naïve\u2028 .", "a;b|c&d", "*", "true", "007", "1e3", " x ", "-", "",
    "null.jsonl", "a~",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_text_setting_takes_any_characters(command: Command, text: str) -> None:
    keys = ("model.path", "prompts", "output", "metrics", "cache.events", "speculative.model.path")
    (config,) = command("speculative=draft_model", *(f"{key}={text}" for key in keys)).ran
    assert (config.model.path, config.prompts, config.output, config.metrics) == (text,) * 4
    assert (config.cache.events, config.speculative.model.path) == (text, text)


def test_a_home_quotes_and_other_keys_are_known_in_texts(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (config,) = command(
        "model.path=~/m", "prompts='in, \\'1\\'.jsonl'", 'output="a\\tb"', "parallel.kvp=2",
        "metrics=${output}-${parallel.kvp}-${cache.reuse}-${cache.num_pages}-\\${x}", "cache.events=null",
    ).ran  # fmt: skip
    assert (config.model.path, config.prompts, config.output) == ("/home/me/m", "in, '1'.jsonl", "a\tb")
    assert (config.metrics, config.cache.events) == ("a\tb-2-true-null-${x}", None)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('["\\n\\n"]', ["\n\n"]),
        ('["\\t", "\\u00e9", "a\\"b", "\\\\n"]', ["\t", "é", 'a"b', "\\n"]),
        ("['\\n', 'it\\'s', 'a,b']", ["\\n", "it's", "a,b"]),
        ("[</s>,<|im_end|>, [INST], it's, a: b, 模型]", ["</s>", "<|im_end|>", "[INST]", "it's", "a: b", "模型"]),
        ("END", ["END"]),
        ('"\\n"', ["\n"]),
        ("[]", []),
        ("[null,1,true]", ["null", "1", "true"]),
        ("[${x}]", ["${x}"]),
    ],
)
def test_stop_strings_are_read_as_they_were_meant(command: Command, text: str, items: list[str]) -> None:
    (config,) = command(*GIVEN, f"sampling.stop={text}").ran
    assert config.sampling.stop == items


def test_values_that_mean_the_same_are_the_same(command: Command) -> None:
    (config,) = command(
        *GIVEN, "sampling.max_tokens=4.0", "cache.num_pages=1e3", "sampling.temperature=1", "cache.reuse=True",
        "sampling.stop_token_ids=[1, 2.0]", "parallel.kvp=null",
    ).ran  # fmt: skip
    given = (config.sampling.max_tokens, config.cache.num_pages, config.sampling.temperature, config.cache.reuse)
    assert repr(given) == "(4, 1000, 1.0, True)"
    assert (config.sampling.stop_token_ids, config.parallel.kvp) == ([1, 2], None)


def test_a_sweep_splits_texts_at_commas_that_are_not_in_quotes_or_brackets(command: Command) -> None:
    sweep = ("-m", "model.path=DIR", "prompts=a (1).jsonl, 'b,c', \"d\\te\",it's[1,2]", "output=o-${prompts}")
    assert [job.prompts for job in command(*sweep).ran] == ["a (1).jsonl", "b,c", "d\te", "it's[1,2]"]
    stops = command("-m", *GIVEN, "sampling.stop=[a,b],[c],'d,e'").ran
    assert [job.sampling.stop for job in stops] == [["a", "b"], ["c"], ["d,e"]]


def test_a_preset_of_the_users_own_is_checked_in_our_words(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "it's mine" / "sampling"
    folder.mkdir(parents=True)
    for name, text in {"typo": "max_token: 3", "text": "max_tokens: many", "same": "max_tokens: 3.0"}.items():
        (folder / f"{name}.yaml").write_text(text)
    given = (*GIVEN, "--config-dir", str(folder.parent))
    assert "sampling.max_token is not a key; did you mean sampling.max_tokens?" in one_line(
        command(*given, "sampling=typo")
    )
    assert one_line(command(*given, "sampling=text")) == "sampling.max_tokens = many must be an integer or null"
    assert command(*given, "sampling=same").ran[0].sampling.max_tokens == 3


def test_a_sweep_takes_a_prompt_with_commas_for_one_and_null_for_none(command: Command) -> None:
    ran = command("-m", "model.path=DIR", "prompt=first, second", "sampling.seed=1,2").ran
    assert [(job.prompt, job.sampling.seed) for job in ran] == [("first, second", 1), ("first, second", 2)]
    (config,) = command(*GIVEN, "prompt=null").ran
    assert config.prompt is None


def test_a_draft_length_schedule_is_given_on_the_command_line_and_sorted(command: Command) -> None:
    schedule = "speculative.draft_len_schedule={32:1,4:3,8:2}"
    (config,) = command(*GIVEN, "speculative=ngram", "speculative.max_draft_len=3", schedule).ran
    assert (config.speculative.method, config.speculative.max_draft_len) == ("ngram", 3)
    assert list(config.speculative.draft_len_schedule.items()) == [(4, 3), (8, 2), (32, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speculative=medusa"], "Could not find 'speculative/medusa' Available options in 'speculative': draft_model"),
        (
            ["speculative.method=medusa"],
            "speculative.method = 'medusa' must be one of none, ngram, draft_model, mtp, eagle3",
        ),
        (
            ["speculative.draft_len_schedule={0:1}"],
            "speculative.draft_len_schedule has batch size 0, must be at least 1",
        ),
        (["speculative.draft_len_schedule={4:-1}"], "speculative.draft_len_schedule[4] = -1 must be at least 0"),
        (["speculative.draft_len_schedule={4:5}"], "[4] = 5 exceeds speculative.max_draft_len = 4; lower it or raise"),
        (
            ["speculative.draft_len_schedule={}"],
            "speculative.draft_len_schedule is empty; give batch sizes and lengths",
        ),
        (["speculative.draft_len_schedule={a:1}"], "speculative.draft_len_schedule has 'a': 1; batch sizes and draft"),
        (["speculative.draft_len_schedule=4"], "speculative.draft_len_schedule = 4 must map batch sizes to draft"),
        (["speculative.ngram_max=1"], "speculative.ngram_max = 1 must be at least speculative.ngram_min = 2"),
        (
            ["speculative.model.paht=x"],
            "did you mean speculative.model.path? speculative.model has: path, load, config",
        ),
    ],
)
def test_speculation_that_cannot_be_is_refused_in_one_line(
    command: Command, arguments: list[str], message: str
) -> None:
    assert message in one_line(command(*GIVEN, *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["speculative.max_draft_len=8"],
            "speculative.max_draft_len = 8 has no effect with speculative=none; "
            "use speculative=ngram or speculative=draft_model or speculative=mtp or speculative=eagle3",
        ),
        (
            ["speculative.draft_len_schedule={4:2}"],
            "speculative.draft_len_schedule = {4: 2} has no effect with speculative=none; "
            "use speculative=ngram or speculative=draft_model or speculative=mtp or speculative=eagle3",
        ),
        (
            ["speculative=ngram", "speculative.model.path=x"],
            "speculative.model.path = 'x' has no effect with speculative=ngram; use speculative=draft_model",
        ),
        (
            ["speculative.method=draft_model", "speculative.model.path=x", "speculative.ngram_min=1"],
            "speculative.ngram_min = 1 has no effect with speculative=draft_model; use speculative=ngram",
        ),
    ],
)
def test_a_setting_that_the_method_does_not_use_is_refused_in_one_line(
    command: Command, arguments: list[str], message: str
) -> None:
    assert one_line(command(*GIVEN, *arguments)) == message


@pytest.mark.parametrize(
    "arguments",
    [
        ["speculative.max_draft_len=4"],
        ["speculative=ngram", "speculative.max_draft_len=8", "speculative.ngram_max=6", "speculative.ngram_min=1"],
        ["speculative=draft_model", "speculative.max_draft_len=2", "speculative.model.path=x"],
    ],
)
def test_settings_that_the_method_uses_and_defaults_are_accepted(command: Command, arguments: list[str]) -> None:
    assert len(command(*GIVEN, *arguments).ran) == 1


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_every_rank_runs_the_command(command: Command) -> None:
    assert command(*GIVEN, rank=0).ran == command(*GIVEN, rank=3).ran != []


def raising(error: Exception) -> Callable[[Any], None]:
    def body(_: Any) -> None:
        raise error

    return body


@pytest.mark.parametrize("error", [ValueError("tpa = 3:\n  too\tmany"), OSError("tpa = 3: too many")])
def test_a_refusal_of_the_command_itself_is_one_line_and_code_2(command: Command, error: Exception) -> None:
    assert one_line(command(*GIVEN, body=raising(error))) == "tpa = 3: too many"


def test_other_ranks_wait_for_rank_0_to_speak(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(ending, "_GRACE_S", 20.0)
    monkeypatch.setattr(ending.time, "sleep", waited.append)
    assert command(*GIVEN, "zzz=1", rank=1).code == 2
    assert waited == [20.0]
    assert command(*GIVEN, "zzz=1", rank=0).code == 2
    assert waited == [20.0]


def test_a_rank_that_is_alone_with_its_problem_speaks_in_the_end(command: Command) -> None:
    ended = command(*GIVEN, rank=1, body=raising(ValueError("only here")))
    assert (ended.code, ended.err) == (2, "error on rank 1: only here\n")


def test_a_fault_is_not_taken_for_bad_input(command: Command) -> None:
    ended = command(*GIVEN, body=raising(ZeroDivisionError("a fault")))
    assert ended.code == 1
    assert ended.err.startswith("Traceback (most recent call last):\n")
    assert ended.err.endswith("\nZeroDivisionError: a fault\n")


def test_a_run_that_failed_is_neither_bad_input_nor_a_defect(command: Command) -> None:
    ended = command(*GIVEN, body=raising(ending.RunFailed("the disk\nis full")))
    assert (ended.code, ended.err) == (1, "error: the disk is full\n")


def test_a_fault_on_any_rank_is_told_whole_and_not_in_hydras_words(command: Command) -> None:
    def body(_: Any) -> None:
        try:
            raise KeyError("the cause")
        except KeyError as cause:
            raise RuntimeError("a fault") from cause

    ended = command(*GIVEN, rank=1, body=body)
    assert ended.code == 1
    assert ended.err.startswith("rank 1 failed\nTraceback (most recent call last):\n")
    assert "KeyError: 'the cause'" in ended.err
    assert ended.err.endswith("\nRuntimeError: a fault\n")


FAILING = """
from parallel.launch import gather_values, start
from scripts import cli
from scripts.generate import GenerateConfig

def run(config):
    if start("cpu").rank == 1:
        raise RuntimeError("the cause")
    gather_values(0)

cli.main("generate", GenerateConfig, run)
"""


def test_a_rank_that_fails_alone_ends_all_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    ended = torchrun(2, "failing.py", *GIVEN, folder=tmp_path)
    assert ended.returncode == 1
    assert "rank 1 failed\nTraceback" in ended.stderr
    assert "RuntimeError: the cause" in ended.stderr
    cause = ended.stderr.split("Root Cause (first observed failure)")[1]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "exitcode  : 1 " in cause
    for words in ("Error executing job", "HYDRA_FULL_ERROR"):
        assert words not in ended.stderr


def test_only_rank_0_says_anything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    cli.say("alone")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        cli.say(f"rank {rank}")
    assert capsys.readouterr().out == "alone\nrank 0\n"


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--help",), "sampling.max_tokens=16"),
        (("--cfg", "job"), "max_tokens: 16"),
    ],
)
def test_flags_that_print_do_so_on_rank_0_and_run_nothing(command: Command, flags: tuple[str, ...], text: str) -> None:
    spoken = command(*GIVEN, *flags, rank=0)
    assert (spoken.ran, spoken.err) == ([], "")
    assert spoken.out.count(text) == 1
    silent = command(*GIVEN, *flags, rank=1)
    assert (silent.ran, silent.code, silent.out, silent.err) == ([], None, "", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cfg", "job", *GIVEN, "sampling.max_tokens=3"),
        (*GIVEN, "--cfg", "job", "sampling.max_tokens=3"),
        (GIVEN[0], "-c", "job", GIVEN[1], "sampling.max_tokens=3"),
        (GIVEN[0], "-m", GIVEN[1], "--cfg=job", "sampling.max_tokens=3"),
    ],
    ids=" ".join,
)
def test_flags_may_stand_anywhere(command: Command, arguments: tuple[str, ...]) -> None:
    ended = command(*arguments)
    assert (ended.ran, ended.code, ended.err) == ([], None, "")
    assert ended.out.count("max_tokens: 3\n") == 1


@pytest.mark.parametrize("name", sorted(file.stem for file in cli.CONF.glob("*.yaml")))
def test_help_says_what_a_command_does_and_what_each_key_means(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"scripts.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "500")  # no line is folded
    schema = get_type_hints(module.run)["config"]
    cli.main(name, schema, module.run)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}: {module.__doc__.splitlines()[0]}\n")
    lines = [line.strip() for line in shown.splitlines()]
    for key, meaning in key_help.meanings(schema):
        assert meaning, f"{key} has no line under Attributes in the docstring of its dataclass"
        assert any(line.startswith((f"{key}=", f"{key}: ")) and line.endswith(meaning) for line in lines), key


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


def test_a_run_leaves_no_folder_and_no_log(command: Command, tmp_path: Path) -> None:
    assert len(command(*GIVEN).ran) == 1
    assert command(*GIVEN, "--cfg", "job").code is None
    assert command(*GIVEN, body=raising(ValueError("bad"))).code == 2
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_print_the_composed_settings_once(tmp_path: Path) -> None:
    ended = torchrun(2, "-m", "scripts.generate", "--cfg", "job", *GIVEN, "parallel=tp", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("block_size: 64") == 1
    assert ended.stdout.count("  kvp: 1\n") == 1
    assert list(tmp_path.iterdir()) == []
