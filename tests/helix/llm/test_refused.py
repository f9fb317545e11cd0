"""Prompts that cannot run fail alone, with their reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helix import LLM, Request
from tests.helix.llm.small import VOCAB, greedy, make_llm, told


def test_without_a_tokenizer_text_and_stop_strings_fail_and_ids_run(edited: Callable[..., Path]) -> None:
    llm = make_llm(edited(tokenizer=None, tokenizer_config=None))
    outputs = llm.generate(["text", Request(prompt_token_ids=[1], sampling=greedy(3, stop=["a"])), [1]], greedy(3))
    assert [output.finish_reason for output in outputs] == ["error", "error", "length"]
    assert outputs[0].error == "prompt needs a tokenizer, but the model folder has none; use prompt_token_ids"
    assert outputs[1].error == "sampling.stop = ['a'] needs a tokenizer, but the model folder has none"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1.5], "prompt_token_ids must be integers"),
        ([True], "prompt_token_ids must be integers"),
        ("\ud800", "prompt is no valid text: character 0, '\\ud800', is a lone surrogate"),
        (3, "a prompt is text, token ids or a Request, not a int"),
        (None, "a prompt is text, token ids or a Request, not a NoneType"),
        (b"hi", "a prompt is text, token ids or a Request, not a bytes"),
        ({"prompt": "a", "multi_modal_data": 1}, "a prompt that is a dict has prompt or prompt_token_ids alone, not ["),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids is a str, must be a list"),
        (Request(prompt=7), "prompt is a int, must be a str"),
        (Request(prompt="a", cache_salt="\udfff"), "cache_salt is no valid text: "),
        (Request(prompt="a", cache_salt="x" * 1001), "cache_salt has 1001 characters, must have at most 1000"),
        (Request(messages=[{"role": "user", "content": "a\ud800"}]), "messages[0].content is no valid text: "),
        (Request(messages="hi"), "messages is a str, must be a list"),
        (Request(prompt="a", sampling=greedy(2, logprobs=21)), "sampling.logprobs = 21 exceeds scheduler.max_logprobs"),
    ],
    ids=str,
)
def test_prompts_that_are_no_text_and_no_ids_fail_alone(llm: LLM, prompt: Any, message: str) -> None:
    bad, good = llm.generate([prompt, "hi"], greedy(2))
    assert bad.finish_reason == "error" and (bad.error or "").startswith(message)
    assert len(good.token_ids) == 2


def test_a_prompt_of_too_many_scores_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helix.prompts.MAX_SCORES", 8)
    bad, good = llm.generate(["abcde", "abcd"], greedy(2, prompt_logprobs=1))
    assert (bad.error or "").startswith("sampling.prompt_logprobs = 1 of 5 prompt tokens makes 10 values, at most 8")
    assert len(good.prompt_logprobs or ()) == 4


def test_settings_changed_after_they_were_made_are_checked_again(llm: LLM) -> None:
    changed = greedy(2)
    changed.stop = ["\ud800"]
    bad, good = llm.generate([Request(prompt="a", sampling=changed), "hi"], greedy(2))
    assert bad.error is not None and bad.error.startswith("sampling.stop[0] is no valid text")
    assert len(good.token_ids) == 2


@pytest.mark.parametrize(
    "prompt",
    ["hello", [1, 2, 3], torch.tensor([1, 2, 3]), [np.int64(1), np.int32(2), 3], Request(prompt="hello"),
     Request(prompt_token_ids=np.array([1, 2]), priority=np.int64(3))],
    ids=str,
)  # fmt: skip
def test_a_prompt_alone_is_one_prompt(llm: LLM, prompt: Any) -> None:
    alone = told(llm.generate(prompt, greedy(4)))
    assert alone == told(llm.generate([prompt], greedy(4))) and alone[0][-1] is None
    assert [event.index for event in llm.stream(prompt, greedy(2))] == [0, 0]


BAD = {
    "nothing": (Request(), "a request takes one of prompt, prompt_token_ids and messages, not none"),
    "two kinds": (
        Request(prompt="a", prompt_token_ids=[1]),
        "a request takes one of prompt, prompt_token_ids and messages, not ['prompt', 'prompt_token_ids']",
    ),
    "no text": ("", "the prompt is empty; give at least one token"),
    "no ids": ([], "the prompt is empty; give at least one token"),
    "id too large": ([1, VOCAB, 2], "token id 320 is outside the vocabulary of 320"),
    "id negative": ([1, 2, -1], "token id -1 is outside the vocabulary of 320"),
    "too long": ([1] * 65536, "the prompt has 65536 tokens; the model takes at most 65535"),
    "a turn without content": (
        Request(messages=[{"role": "user"}]),
        "messages[0] has no content; give text, or null for none",
    ),
    "no turns": (Request(messages=[]), "the chat template refused messages: "),
    "refused by the caller": (Request(prompt="fine", error="line 3: not JSON"), "line 3: not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_fails_alone_with_its_reason(llm: LLM, name: str) -> None:
    bad, reason = BAD[name]
    outputs = llm.generate([[1, 2], bad, [3, 4]], greedy(3))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    failed = outputs[1]
    assert failed.error is not None
    assert failed.error.startswith(reason) if reason.endswith(": ") else failed.error == reason
    assert (failed.token_ids, failed.text) == ([], "")
    assert llm.metrics.num_errors == 1
    assert told([outputs[0], outputs[2]]) == told(llm.generate([[1, 2], [3, 4]], greedy(3)))


def test_messages_without_a_chat_template_fail(edited: Callable[..., Path]) -> None:
    llm = make_llm(edited(chat_template=None))
    failed, fine = llm.generate([Request(messages=[{"role": "user", "content": "hi"}]), "hi"], greedy(2))
    assert failed.error == "messages needs a chat template, but the model's tokenizer has none; use prompt"
    assert fine.finish_reason == "length"
