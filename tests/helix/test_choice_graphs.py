"""Choices behind a decode graph, all settings data: the same as those that are launched as they are written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helix import Request, SamplingParams
from helix.choice_graphs import ChoiceGraph
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import Recorded, make_llm, told, use

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2},
    {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "seed": 3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 0.7, "min_p": 0.1, "seed": 5, "min_tokens": 6},
]
DRAFTS = {"method": "ngram", "max_draft_len": 3, "draft_len_schedule": {8: 3}}


def asked(settings: list[dict[str, Any]]) -> list[Request]:
    return [
        Request(prompt_token_ids=[7 + i] * (2 + i), sampling=SamplingParams(max_tokens=10, ignore_eos=True, **each))
        for i, each in enumerate(settings)
    ]


def body(path: str, kvp: int, drafts: bool) -> list[Any]:
    """What settings of all kinds, and those without filters, make with and without graphs, and the ways that ran."""
    ways: list[bool] = []
    fill = ChoiceGraph.fill

    def note(graph: ChoiceGraph, stage: int, *given: Any) -> Any:
        ways.extend([graph.filters] if given else [])
        return fill(graph, stage, *given)

    made = []
    ChoiceGraph.fill = note  # type: ignore[method-assign]
    for chosen in (SETTINGS, SETTINGS[:2]):
        plain = make_llm(path, kvp=kvp).generate(asked(chosen))
        llm = make_llm(path, kvp=kvp, graphs=True, look_ahead=not drafts, speculative=DRAFTS if drafts else {})
        if drafts:
            use(llm, Recorded(plain, 0.7, short=True))
        made.append((told(llm.generate(asked(chosen))) == told(plain), len(ways), any(ways), all(ways)))
        ways.clear()
    ChoiceGraph.fill = fill  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize(("kvp", "drafts"), [(1, True), (2, False)])
def test_all_settings_choose_behind_graphs_what_they_choose_without(
    ranks: Callable[..., Any], tmp_path: Path, kvp: int, drafts: bool
) -> None:
    path = str(make_checkpoint(tmp_path / "model", layers=1))
    for many, few in ranks(kvp).run(body, path, kvp, drafts):
        assert many[0] and few[0]
        assert many[1] >= 4 and many[2], "filters, as soon as no token is banned"
        assert few[1] >= 4 and few[2] == few[3] == (kvp == 1), "one rank has one graph for all"
