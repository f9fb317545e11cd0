"""What is computed: tokens and log-probabilities, whoever shares the batch; transformers' own model is the oracle."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helix import LLM, Request
from tests.helix.llm.small import PROMPTS, VOCAB, drawn, greedy, make_llm, one, told


def test_greedy_tokens_are_the_most_likely_ones_of_transformers(
    llm: LLM, reference: Callable[[Sequence[int]], torch.Tensor]
) -> None:
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, greedy(20)), strict=True):
        assert output.prompt_tokens == len(prompt)
        best = reference([*prompt, *output.token_ids]).argmax(-1)
        assert output.token_ids == best[len(prompt) - 1 : -1].tolist()


def test_log_probabilities_are_transformers_log_softmax(
    llm: LLM, reference: Callable[[Sequence[int]], torch.Tensor]
) -> None:
    asked = [3, 0, None, 20]
    requests = [
        Request(prompt_token_ids=prompt, sampling=drawn(10, seed, logprobs=number))
        for seed, (prompt, number) in enumerate(zip(PROMPTS, asked, strict=False))
    ]
    for request, number, output in zip(requests, asked, llm.generate(requests), strict=True):
        if number is None:
            assert output.logprobs is None
            continue
        assert request.prompt_token_ids is not None and output.logprobs is not None
        expected = reference([*request.prompt_token_ids, *output.token_ids])[output.prompt_tokens - 1 : -1]
        assert [each.token_id for each in output.logprobs] == output.token_ids
        for each, row in zip(output.logprobs, expected, strict=True):
            assert each.logprob == pytest.approx(row[each.token_id].item(), abs=1e-4)
            values, ids = row.topk(min(number, VOCAB))
            assert list(each.top.values()) == pytest.approx(values.tolist(), abs=1e-4)
            assert set(each.top) == set(ids.tolist())


def test_text_and_messages_become_the_tokenizers_ids(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = "<|bos|><|system|>Be brief.<|eos|><|user|>Why?<|eos|><|assistant|>"
    requests = [Request(messages=messages), Request(prompt=text), text]
    ids = llm.tokenizer(text)["input_ids"]
    assert len(ids) == 6 + len("Be brief.Why?")
    expected = one(llm, ids, greedy(8))
    assert told(llm.generate(requests, greedy(8))) == told([expected] * 3)
    assert (expected.prompt_tokens, len(expected.token_ids)) == (len(ids), 8)


def test_a_request_takes_its_own_sampling_and_else_the_calls_or_the_configs(llm: LLM) -> None:
    requests = [Request(prompt_token_ids=[3, 4], sampling=greedy(2), id="own"), Request(prompt_token_ids=[3, 4])]
    outputs = llm.generate(requests, greedy(5))
    assert [(output.id, len(output.token_ids)) for output in outputs] == [("own", 2), (None, 5)]
    assert len(one(llm, [3, 4]).token_ids) == llm.config.sampling.max_tokens


def test_dummy_weights_need_a_config_alone_and_are_the_same_every_time(path: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    shutil.copy(path / "config.json", config)
    outputs = [one(make_llm(config, load="dummy"), PROMPTS[0], drawn(30, 1)) for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert outputs[0].finish_reason == "length"
    assert len(set(outputs[0].token_ids)) > 10
    assert outputs[0].text == ""


def test_a_text_that_begins_with_bos_gets_no_second_one(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bos = llm.tokenizer("<|bos|>")["input_ids"]
    reader, plain = llm.preparer._prompts, llm.tokenizer

    class AddsBos:
        bos_token, bos_token_id = "<|bos|>", bos[0]

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            assert add_special_tokens
            return {"input_ids": bos + plain(text)["input_ids"]}

    monkeypatch.setattr(reader, "_tokenizer", AddsBos())
    for text, num_bos in (("a", 1), ("<|bos|>a", 1), ("<|bos|><|bos|>a", 3)):
        assert reader.token_ids(Request(prompt=text)) == bos * num_bos + [ord("a")]


def test_a_result_does_not_depend_on_who_shares_the_batch(llm: LLM) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 20, "repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "logprobs": 2},
        {"min_p": 0.02, "frequency_penalty": -0.4},
    ]
    requests = [
        Request(prompt_token_ids=prompt, sampling=drawn(25 - 3 * seed, seed, **extra))
        for seed, (prompt, extra) in enumerate(zip(PROMPTS, settings, strict=True))
    ]
    together = llm.generate(requests)
    for request, output in zip(requests, together, strict=True):
        alone = one(llm, request)
        assert (alone.token_ids, alone.text) == (output.token_ids, output.text)
        assert [each.token_id for each in alone.logprobs or []] == [each.token_id for each in output.logprobs or []]
    assert [output.token_ids for output in llm.generate(requests[::-1])] == [o.token_ids for o in together[::-1]]


def test_equal_seeds_give_equal_text_and_other_seeds_other_text(llm: LLM) -> None:
    first, again, other = llm.generate(
        [Request(prompt_token_ids=[1, 2, 3], sampling=drawn(24, seed)) for seed in (11, 11, 12)]
    )
    assert told([first]) == told([again]) == told([one(llm, [1, 2, 3], drawn(24, 11))])
    assert first.token_ids != other.token_ids


def test_without_a_seed_every_request_every_call_and_every_start_differs(path: Path) -> None:
    outputs = []
    for llm in (make_llm(path), make_llm(path)):
        for _ in range(2):
            outputs += llm.generate([[1, 2, 3]] * 2, drawn(24, None))
    assert len({tuple(output.token_ids) for output in outputs}) == 8


def test_biases_and_bad_words_change_the_answer(llm: LLM) -> None:
    plain = one(llm, PROMPTS[0], greedy(8))
    first = plain.token_ids[0]
    assert first not in one(llm, PROMPTS[0], greedy(8, logit_bias={first: -100})).token_ids
    assert one(llm, PROMPTS[0], greedy(8, logit_bias={"7": 100})).token_ids == [7] * 8
    word = llm.tokenizer.decode(plain.token_ids[:2])
    if tuple(llm.tokenizer(word, add_special_tokens=False)["input_ids"]) == tuple(plain.token_ids[:2]):
        assert one(llm, PROMPTS[0], greedy(8, bad_words=[word])).token_ids[:2] != plain.token_ids[:2]
    letters = [chr(code) for code in range(97, 123)]
    assert not {*one(llm, PROMPTS[0], greedy(40, bad_words=letters)).text} & {*letters}
    refused = one(llm, PROMPTS[0], greedy(8, logit_bias={VOCAB: 1}))
    assert refused.error == f"sampling.logit_bias names token id {VOCAB}, which is outside the vocabulary of {VOCAB}"
