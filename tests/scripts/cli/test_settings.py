"""Settings of a command line: what is bad ends with code 2 and one line, texts are read as they were meant."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from helix.sampling import SamplingParams
from scripts import cli
from scripts.generate import GenerateConfig
from tests.scripts.cli.line import GIVEN, Command, one_line


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


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('{"regex": "[0-9]{3}, [a-z]+"}', {"regex": "[0-9]{3}, [a-z]+"}),
        ('{"json": {"type": "object", "maxProperties": 1}}', {"json": {"type": "object", "maxProperties": 1}}),
        ('{"grammar": "root ::= \\"x\\" root | \\"y\\""}', {"grammar": 'root ::= "x" root | "y"'}),
        ("{choice: [yes it is, no]}", {"choice": ["yes it is", "no"]}),
    ],
)
def test_a_form_of_answers_is_read_as_the_pages_write_it(command: Command, text: str, form: Any) -> None:
    ran = command(*GIVEN, f"sampling.structured_outputs={text}").ran
    ran += command(*GIVEN, f"sampling.structured_outputs={text}", "sampling.max_tokens=1,2", "--multirun").ran
    expected = SamplingParams(structured_outputs=form).structured_outputs
    assert [config.sampling.structured_outputs for config in ran] == [expected] * 3


def test_values_that_mean_the_same_are_the_same(command: Command) -> None:
    (config,) = command(
        *GIVEN, "sampling.max_tokens=4.0", "cache.num_pages=1e3", "sampling.temperature=1", "cache.reuse=True",
        "sampling.stop_token_ids=[1, 2.0]", "parallel.kvp=null",
    ).ran  # fmt: skip
    given = (config.sampling.max_tokens, config.cache.num_pages, config.sampling.temperature, config.cache.reuse)
    assert repr(given) == "(4, 1000, 1.0, True)"
    assert (config.sampling.stop_token_ids, config.parallel.kvp) == ([1, 2], None)


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
