"""One call at a time, Ctrl-C between steps, and nothing after the end."""

import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helix import LLM, HelixConfig
from helix.cache.store import BlockStore
from helix.runner import Runner
from tests.helix.llm.small import PROMPTS, assert_idle, greedy, make_llm, one, told


@dataclass(kw_only=True)
class WithKeys(HelixConfig):
    """As commands add keys."""

    tokens: int = 5


def test_nothing_runs_after_close_and_closing_again_does_nothing(path: Path) -> None:
    with make_llm(path) as llm:
        assert len(one(llm, [1], greedy(2)).token_ids) == 2
        stream = llm.stream([[1, 2]], greedy(9))
        next(stream)
    with pytest.raises(RuntimeError, match="this LLM is closed; make another one"):
        next(stream)
    for call in (lambda: llm.generate([[1]]), lambda: next(llm.stream([[1]]))):
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            call()
    llm.close()
    assert_idle(llm)


def test_of_two_threads_that_begin_together_one_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = list[str]()
    settle = llm.preparer.settle

    def second() -> None:
        try:
            llm.generate([[2]], greedy(2))
        except RuntimeError as error:
            refused.append(str(error))

    def settle_late(*args: Any) -> Any:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return settle(*args)

    monkeypatch.setattr(llm.preparer, "settle", settle_late)
    assert len(one(llm, [1], greedy(4)).token_ids) == 4
    assert refused == ["another stream of this LLM is open; iterate it to its end or close it first"]


@pytest.mark.parametrize(("kind", "method"), [(BlockStore, "take"), (Runner, "launch")])
def test_ctrl_c_ends_a_call_between_two_steps_and_the_next_one_runs(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, kind: type, method: str
) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    expected = told(llm.generate(PROMPTS, greedy(20)))
    original, calls = getattr(kind, method), 0

    def interrupted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(kind, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[number] * 40 for number in range(100, 106)], greedy(20))
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_idle(llm)
    assert told(llm.generate(PROMPTS, greedy(20))) == expected


def test_who_asks_twice_is_not_made_to_wait_for_the_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(self: Any, *args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one is raised at once")

    monkeypatch.setattr(Runner, "launch", hangs)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1]], greedy(2))


def test_mappings_are_the_prompts_they_hold(llm: LLM) -> None:
    text, ids = llm.generate(["hello", [5, 6, 7]], greedy(4))
    mapped = llm.generate([{"prompt": "hello"}, {"prompt_token_ids": [5, 6, 7]}], greedy(4))
    assert [each.token_ids for each in mapped] == [text.token_ids, ids.token_ids] and text.token_ids
    assert [each.token_ids for each in llm.generate({"prompt": "hello"}, greedy(4))] == [text.token_ids]


@pytest.mark.parametrize("prompts", [{"a"}, b"ab"], ids=str)
def test_what_is_no_list_of_prompts_is_no_list_of_its_keys_or_bytes(llm: LLM, prompts: Any) -> None:
    [output] = llm.generate(prompts, greedy(2))
    assert output.error == f"a prompt is text, token ids or a Request, not a {type(prompts).__name__}"


def test_settings_of_another_type_are_refused_in_one_line(llm: LLM) -> None:
    bad: Any = {"max_tokens": 3}
    with pytest.raises(TypeError, match="sampling is a dict, must be SamplingParams"):
        llm.generate([[1]], bad)
    with pytest.raises(TypeError, match="LLM takes a HelixConfig, .* not a dict"):
        LLM(bad)
    with pytest.raises(TypeError, match=r"LLM takes a HelixConfig, .* not model=$"):
        LLM(model="DIR")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"LLM takes a HelixConfig, .* not tensor_parallel_size=$"):
        LLM(tensor_parallel_size=2, prompts="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="HelixConfig.cache is a dict, must be a CacheConfig"):
        HelixConfig(cache=bad)
    assert WithKeys().tokens == 5
