"""Settings of speculation on a command line: those that the method uses, and no others."""

import pytest

from tests.scripts.cli.line import GIVEN, Command, one_line


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
