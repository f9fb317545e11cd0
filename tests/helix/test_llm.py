"""The Python API in a world of one, on a small checkpoint; transformers' own model is the oracle."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import helix.feed
from helix import LLM, HelixConfig, Request, RequestOutput, SamplingParams
from helix.check import RankMismatch
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from helix.logprobs import SampledTokens
from helix.lost import RankLost
from parallel.symmetric import Faults
from scripts.make_checkpoint import EOS_ID, make_checkpoint

VOCAB = 320
BLOCK = 16
PROMPTS = [[7 * i % 256 for i in range(40)], [5], [9, 8, 7] * 4, [200, 100, 50, 25], [31] * 17]


def make_llm(
    path: Path, *, num_pages: int = 64, max_batch: int = 8, kvp: int = 1, check: bool = False, **model: Any
) -> LLM:
    """Steps are small, so that prompts come in chunks and sequences share them."""
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(path), dtype="float32", **model),
            parallel=ParallelConfig(kvp=kvp),
            cache=CacheConfig(block_size=BLOCK, num_pages=num_pages),
            scheduler=SchedulerConfig(max_batch=max_batch, prefill_chunk=32),
            runtime=RuntimeConfig(device="cpu", check_ranks=check),
        )
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def shared(path: Path) -> LLM:
    return make_llm(path)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The module's LLM, which every test has to leave without work and with all its pages free."""
    yield shared
    assert_idle(shared)


@pytest.fixture
def edited(path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Give a copy of the checkpoint where a JSON file has other values, or is gone (None)."""

    def copy(**changes: dict[str, Any] | None) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(path, folder)
        for name, change in changes.items():
            file = next(folder.glob(f"{name}.*"))
            if change is None:
                file.unlink()
            else:
                file.write_text(json.dumps(json.loads(file.read_text()) | change))
        return folder

    return copy


@pytest.fixture(scope="module")
def reference(path: Path) -> Callable[[Sequence[int]], torch.Tensor]:
    """The log-probabilities [S, V] of transformers' model after each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @torch.inference_mode()
    def logprobs(token_ids: Sequence[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    return logprobs


def assert_idle(llm: LLM) -> None:
    scheduler = llm.engine.scheduler
    assert not scheduler.has_work
    kvp = llm.layout.kvp
    assert [scheduler.cache.num_available(rank) for rank in range(kvp)] == [llm.num_pages] * kvp


def greedy(num_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, **settings)


def drawn(num_tokens: int, seed: int | None, **settings: Any) -> SamplingParams:
    return greedy(num_tokens, temperature=0.8, seed=seed, **settings)


def told(outputs: Sequence[RequestOutput]) -> list[tuple[Any, ...]]:
    """What a caller may rely on to the letter, whatever was in the cache."""
    return [(o.id, o.token_ids, o.text, o.finish_reason, o.prompt_tokens, o.error) for o in outputs]


def one(llm: LLM, prompt: Any, sampling: SamplingParams | None = None) -> RequestOutput:
    (output,) = llm.generate([prompt], sampling)
    return output


# --- tokens -----------------------------------------------------------------------------------------------------------


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


def test_without_a_tokenizer_text_and_stop_strings_fail_and_ids_run(edited: Callable[..., Path]) -> None:
    llm = make_llm(edited(tokenizer=None, tokenizer_config=None))
    outputs = llm.generate(["text", Request(prompt_token_ids=[1], sampling=greedy(3, stop=["a"])), [1]], greedy(3))
    assert [output.finish_reason for output in outputs] == ["error", "error", "length"]
    assert outputs[0].error == "prompt needs a tokenizer, but the model folder has none; use prompt_token_ids"
    assert outputs[1].error == "sampling.stop = ['a'] needs a tokenizer, but the model folder has none"


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_text_before_itself(llm: LLM) -> None:
    full = one(llm, PROMPTS[0], greedy(60))
    text = full.text
    at = next(i for i in range(3, len(text)) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
    stopped = one(llm, PROMPTS[0], greedy(60, stop=["never seen", text[at : at + 2]]))
    assert (stopped.text, stopped.finish_reason) == (text[:at], "stop")
    made = len(stopped.token_ids)
    assert stopped.token_ids == full.token_ids[:made]
    assert text[at : at + 2] in llm.tokenizer.decode(stopped.token_ids, skip_special_tokens=True)
    assert text[at : at + 2] not in llm.tokenizer.decode(stopped.token_ids[:-1], skip_special_tokens=True)


def test_a_stop_token_ends_the_sequence_and_leaves_no_text(llm: LLM) -> None:
    full = one(llm, PROMPTS[1], greedy(20)).token_ids
    at = full.index(full[7])
    stopped = one(llm, PROMPTS[1], greedy(20, stop_token_ids=[VOCAB + 5, full[7]]))
    assert (stopped.token_ids, stopped.finish_reason) == (full[: at + 1], "stop")
    assert stopped.text == llm.tokenizer.decode(full[:at], skip_special_tokens=True)


def test_any_eos_token_of_the_model_ends_a_sequence_unless_it_is_ignored(llm: LLM, edited: Callable[..., Path]) -> None:
    full = one(llm, PROMPTS[2], greedy(12)).token_ids
    at = full.index(full[4])
    other = make_llm(edited(generation_config={"eos_token_id": [EOS_ID, full[4]]}))
    stopped = one(other, PROMPTS[2], SamplingParams(max_tokens=12))
    assert (stopped.token_ids, stopped.finish_reason) == (full[: at + 1], "stop")
    ignored = one(other, PROMPTS[2], SamplingParams(max_tokens=12, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == (full, "length")


def test_the_end_that_only_the_tokenizer_or_its_template_names_ends_an_answer(
    llm: LLM, edited: Callable[..., Path]
) -> None:
    turns = Request(messages=[{"role": "user", "content": "Why?"}])
    full, of_turns = one(llm, PROMPTS[2], greedy(12)).token_ids, one(llm, turns, greedy(12)).token_ids
    names = [llm.tokenizer.convert_ids_to_tokens(ids[4]) for ids in (full, of_turns)]
    assert all(len(name) == 1 for name in names), "byte tokens stand for special ones below"
    other = make_llm(edited(config={"eos_token_id": None}, generation_config={"eos_token_id": None},
                            tokenizer_config={"eos_token": names[0]}))  # fmt: skip
    stopped = one(other, PROMPTS[2], SamplingParams(max_tokens=12))
    assert (stopped.token_ids, stopped.finish_reason) == (full[: full.index(full[4]) + 1], "stop")
    assert other.preparer.end_of_turn_ids == [EOS_ID], "the template ends turns with <|eos|>"
    settled = other.preparer.prepare(0, turns, SamplingParams(stop_token_ids=[3]))
    assert settled.sampling.stop_token_ids == [3, EOS_ID]
    assert other.preparer.prepare(0, Request(prompt="Why?"), SamplingParams()).sampling.stop_token_ids == []
    assert other.preparer.prepare(0, turns, SamplingParams(ignore_eos=True)).sampling.stop_token_ids == []


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


@pytest.mark.parametrize("number", [1, 2, 33])
def test_max_tokens_ends_a_sequence_for_length_with_all_its_text(llm: LLM, number: int) -> None:
    for output in llm.generate(PROMPTS, greedy(number)):
        assert (len(output.token_ids), output.finish_reason) == (number, "length")
        assert output.text == llm.tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_what_could_have_begun_a_stop_string_is_released_in_the_end(llm: LLM) -> None:
    full = one(llm, PROMPTS[0], greedy(30))
    held = one(llm, PROMPTS[0], greedy(30, stop=[full.text[-2:] + "not to come"]))
    assert (held.text, held.finish_reason) == (full.text, "length")
    *_, last = llm.stream([PROMPTS[0]], greedy(30, stop=[full.text[-2:] + "not to come"]))
    assert last.text.endswith(full.text[-2:])


def test_max_position_ends_a_sequence_for_length_and_refuses_longer_prompts(llm: LLM, path: Path) -> None:
    short = make_llm(path, max_position=20)
    outputs = short.generate([PROMPTS[4], [1] * 19, [1] * 20], greedy(50))
    assert [(len(output.token_ids), output.finish_reason) for output in outputs] == [
        (3, "length"),
        (1, "length"),
        (0, "error"),
    ]
    assert outputs[0].token_ids == one(llm, PROMPTS[4], greedy(3)).token_ids
    assert outputs[2].error == "the prompt has 20 tokens; the model takes at most 19"


# --- streaming --------------------------------------------------------------------------------------------------------


def test_streamed_events_joined_are_the_outputs_of_generate(llm: LLM) -> None:
    full = one(llm, PROMPTS[0], greedy(30))
    stop = next(char for char in full.text[3:] if char.isascii())
    requests = [
        Request(prompt_token_ids=prompt, sampling=sampling, id=name)
        for prompt, sampling, name in (
            (PROMPTS[0], greedy(30, stop=[stop, full.text[:3] + "?"]), "stop string"),
            (PROMPTS[1], drawn(40, 3, logprobs=1), "drawn"),
            ([], None, "bad"),
            (PROMPTS[2], greedy(1), "short"),
            (PROMPTS[3], greedy(40, stop_token_ids=[EOS_ID]), "long"),
        )
    ]
    expected = llm.generate(requests)
    events = list(llm.stream(requests))
    assert [output.finish_reason for output in expected] == ["stop", "length", "error", "length", "length"]
    for index, output in enumerate(expected):
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == output.token_ids
        assert "".join(event.text for event in mine) == output.text
        assert [event.output for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert told([event.output for event in mine[-1:] if event.output]) == told([output])
    order = [event.index for event in events]
    assert order.index(4) < len(order) - order[::-1].index(1) - 1, "tokens come as they are made, side by side"


def test_a_second_stream_is_refused_while_one_is_open(llm: LLM) -> None:
    first = llm.stream(PROMPTS[:1], greedy(6))
    next(first)
    with pytest.raises(RuntimeError, match="another stream of this LLM is open"):
        llm.generate(PROMPTS[1:2], greedy(2))
    assert [event.output for event in first][-1] is not None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1.5], "prompt_token_ids must be integers"),
        ([True], "prompt_token_ids must be integers"),
        ("\ud800", "prompt is no valid text: character 0, '\\ud800', is a lone surrogate"),
        (3, "a prompt is text, token ids or a Request, not a int"),
        (None, "a prompt is text, token ids or a Request, not a NoneType"),
        (b"hi", "a prompt is text, token ids or a Request, not a bytes"),
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


def test_a_stream_that_is_left_early_frees_everything_it_held(llm: LLM) -> None:
    before = told(llm.generate(PROMPTS, greedy(10)))
    for wanted in (0, 1, 8):
        stream = llm.stream([*PROMPTS, *PROMPTS], greedy(100))
        for _ in range(wanted):
            next(stream)
        assert llm.engine.scheduler.has_work == (wanted > 0)
        stream.close()
        assert_idle(llm)
        assert told(llm.generate(PROMPTS, greedy(10))) == before


def test_metrics_count_what_was_done(path: Path) -> None:
    llm = make_llm(path)
    steps: list[int] = []
    outputs = llm.generate([*PROMPTS, []], greedy(9), on_step=lambda metrics: steps.append(metrics.decode_tokens))
    metrics = llm.metrics.as_dict()
    prompt_tokens = sum(map(len, PROMPTS))
    assert (metrics["requests"], metrics["errors"], metrics["preemptions"]) == (6, 1, 0)
    assert (metrics["prefill_tokens"], metrics["output_tokens"]) == (prompt_tokens, 45)
    assert metrics["tokens_per_kvp_rank"] == [prompt_tokens + 45 - 5], "the last token of a sequence is never stored"
    assert (len(llm.metrics.ttft_s), len(llm.metrics.ttl_s)) == (5, 40)
    assert metrics["steps"] == len(steps)
    assert (steps, steps[-1]) == (sorted(steps), 45)
    assert metrics["output_tokens_per_s"] == pytest.approx(45 / metrics["elapsed_s"])
    assert outputs[-1].error == "the prompt is empty; give at least one token"
    assert llm.generate([]) == []
    assert (llm.metrics.num_requests, llm.metrics.decode_tokens) == (0, 0), "counted anew for every call"
    assert_idle(llm)


# --- who shares the batch ---------------------------------------------------------------------------------------------


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


# --- out of pages -----------------------------------------------------------------------------------------------------


def test_running_out_of_pages_preempts_and_changes_no_result(llm: LLM, path: Path) -> None:
    requests = [Request(prompt_token_ids=p, sampling=drawn(40, i, logprobs=0)) for i, p in enumerate(PROMPTS)]
    expected = llm.generate(requests)
    tight = make_llm(path, num_pages=6)
    outputs = tight.generate(requests)
    assert tight.metrics.as_dict()["preemptions"] > 0
    assert told(outputs) == told(expected)
    assert [len(output.logprobs or []) for output in outputs] == [40] * len(PROMPTS)
    assert len(tight.metrics.ttft_s) == len(PROMPTS)
    assert_idle(tight)


def test_requests_wait_for_pages_and_batch_slots_and_lose_nothing(llm: LLM, path: Path) -> None:
    prompts = [[token] * 30 for token in range(7)]
    expected = told(llm.generate(prompts, greedy(2)))
    for few in ({"num_pages": 2}, {"max_batch": 1}, {"num_pages": 5, "max_batch": 2}):
        tight = make_llm(path, **few)
        assert told(tight.generate(prompts, greedy(2))) == expected
        assert tight.metrics.as_dict()["preemptions"] == 0
        assert_idle(tight)


def test_a_request_that_can_never_fit_fails_alone(llm: LLM, path: Path) -> None:
    tight = make_llm(path, num_pages=3)
    exact = Request(prompt_token_ids=PROMPTS[0], sampling=greedy(3 * BLOCK - 40 + 1))  # its last token takes no room
    beyond = Request(prompt_token_ids=PROMPTS[0], sampling=greedy(3 * BLOCK - 40 + 2), id="big")
    outputs = tight.generate([exact, beyond, [5]], greedy(4))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[1].error == (
        "40 prompt tokens and sampling.max_tokens = 10 need more than the 48 tokens "
        "that cache.num_pages = 3 pages a rank hold"
    )
    assert (outputs[1].id, outputs[1].token_ids) == ("big", [])
    assert told([outputs[0], outputs[2]]) == told(llm.generate([exact, [5]], greedy(4)))


# --- bad requests -----------------------------------------------------------------------------------------------------

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


# --- several ranks ----------------------------------------------------------------------------------------------------


def tamper_input(llm: LLM, tampered: str) -> None:
    """Change what one sequence begins with, so that every decision stays what it was."""
    original = llm.engine.add

    def add(seq: Any) -> None:
        if seq.index == 1 and tampered == "prompt":
            seq.token_ids[0] ^= 1
        elif seq.index == 1 and tampered == "seed":
            seq.seed += 1
        elif seq.index == 1:
            seq.sampling = seq.sampling.with_overrides({"top_p": 0.5})
        original(seq)

    llm.engine.add = add  # type: ignore[method-assign]


def rank_body(path: Path, tampered: str) -> tuple[list[list[int]], str]:
    """Run with check_ranks; rank 1 takes one decision of its own. Return the tokens, or what was found."""
    llm = make_llm(path, kvp=2, check=True)
    scheduler = llm.engine.scheduler
    sampler, calls = llm.runner.sampler, 0
    assert sampler is not None
    original = sampler.choose

    def choose(local: torch.Tensor, choices: Any) -> SampledTokens:
        nonlocal calls
        calls += 1
        tokens = original(local, choices)
        if calls == 4:
            tokens.token_ids[0] ^= 1
        return tokens

    if llm.launch.rank == 1 and tampered == "token":
        sampler.choose = choose  # type: ignore[method-assign]
    elif llm.launch.rank == 1 and tampered == "page":
        scheduler.cache.blocks.device._free[1].reverse()
    elif llm.launch.rank == 1 and tampered == "chunk":
        scheduler._prefill_chunk = 8
    elif llm.launch.rank == 1 and tampered == "slot":
        scheduler._free_slots = scheduler._free_slots[1:]
    elif llm.launch.rank == 1 and tampered in ("prompt", "seed", "sampling"):
        tamper_input(llm, tampered)
    try:
        outputs = llm.generate(PROMPTS[:3], drawn(12, 1))
    except RankMismatch as mismatch:
        return [], str(mismatch)
    return [output.token_ids for output in outputs], ""


def test_ranks_that_agree_pass_the_check_and_make_the_tokens_of_one_rank(
    llm: LLM, path: Path, ranks: Callable[..., Any]
) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS[:3], drawn(12, 1))]
    assert ranks(2).run(rank_body, path, "") == [(expected, "")] * 2


@pytest.mark.parametrize(
    ("tampered", "at_step"),
    [("token", 3), ("page", 0), ("slot", 0), ("chunk", 0), ("seed", 0), ("sampling", 0), ("prompt", 0)],
)
def test_a_rank_that_decides_otherwise_is_found_and_named(
    path: Path, ranks: Callable[..., Any], tampered: str, at_step: int
) -> None:
    message = f"step {at_step}: rank 1 decided otherwise than rank 0 (1 of 2 ranks differ from it)"
    assert ranks(2).run(rank_body, path, tampered) == [([], message)] * 2


def fault_body(path: Path) -> str:
    """Run eagerly where a kernel has noted that it gave up waiting for KVP rank 1 in layer 7's exchange."""
    llm = make_llm(path, kvp=2)
    llm.runner.faults = Faults(torch.device("cpu"))
    llm.runner.faults.word.fill_((7 * 4 + 1) << 8 | 2)
    try:
        llm.generate(PROMPTS[:1], greedy(2))
    except RankLost as lost:
        return str(lost)
    return ""


def test_a_fault_fails_the_step_without_graphs_too(path: Path, ranks: Callable[..., Any]) -> None:
    assert ranks(2).run(fault_body, path) == ["rank 1 never arrived at the exchange of layer 7"] * 2


# --- callbacks and preparation ----------------------------------------------------------------------------------------


def callbacks_body(path: Path) -> tuple[list[list[int]], list[int]]:
    """Tokens, and how often a progress function and a listener were called that raise on rank 1 alone."""
    llm, calls = make_llm(path, kvp=2), [0, 0]

    def call(number: int) -> None:
        calls[number] += 1
        if llm.launch.rank == 1:
            raise RuntimeError("the terminal is gone")

    llm.listen(lambda event: call(0))
    outputs = llm.generate(PROMPTS, greedy(6), on_step=lambda metrics: call(1))
    assert_idle(llm)
    return [output.token_ids for output in outputs], calls


def test_what_a_callback_raises_on_one_rank_ends_no_run_and_is_called_no_more(
    ranks: Callable[[int], Any], llm: LLM, path: Path
) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(6))]
    (tokens, calls), (other_tokens, other_calls) = ranks(2).run(callbacks_body, path)
    assert tokens == other_tokens == expected
    assert min(calls) > 5 and other_calls == [1, 1]


def test_what_a_callback_raises_is_logged_with_its_traceback(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    def broken(metrics: Any) -> None:
        raise ValueError("no such column")

    assert one_with_progress(llm, broken).finish_reason == "length"
    [record] = [record for record in caplog.records if record.name == "helix.callbacks"]
    assert "broken" in record.message and "is called no more" in record.message
    assert record.exc_info and "no such column" in str(record.exc_info[1])


def one_with_progress(llm: LLM, on_step: Callable[[Any], None]) -> RequestOutput:
    (output,) = llm.generate([PROMPTS[0]], greedy(4), on_step=on_step)
    return output


def test_prompts_are_prepared_as_they_may_start_and_not_all_at_first(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[index, *range(50)] for index in range(40)]
    expected = told(llm.generate(prompts, greedy(3)))
    prepare, prepared, events = llm.preparer.prepare, list[int](), list[Any]()
    monkeypatch.setattr(llm.preparer, "prepare", lambda index, *args: prepared.append(index) or prepare(index, *args))
    monkeypatch.setattr(helix.feed, "PREPARED_TOKENS", 150)
    for event in llm.stream([*prompts, []], greedy(3)):
        if not events:
            assert len(prepared) <= 5, "150 tokens are enough for the first steps"
        events.append(event)
    assert prepared == list(range(41))
    outputs = {event.index: event.output for event in events if event.output is not None}
    assert told([outputs[index] for index in range(40)]) == expected
    assert outputs[40].error is not None


# --- what ends an answer, and what it must not hold -------------------------------------------------------------------


def test_stops_say_which_they_were_and_may_be_part_of_the_text(llm: LLM) -> None:
    plain = one(llm, PROMPTS[2], greedy(24))
    at = next(at for at in range(3, len(plain.text) - 1) if plain.text[at : at + 2].isascii())
    stop = plain.text[at : at + 2]
    begins = plain.text.index(stop)
    for included in (False, True):
        output = one(llm, PROMPTS[2], greedy(24, stop=[stop], include_stop_str_in_output=included))
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.text == plain.text[: begins + 2 * included]
    number = next(n for n in range(4, 24) if plain.token_ids[n] not in plain.token_ids[:n])
    token = plain.token_ids[number]
    stopped = one(llm, PROMPTS[2], greedy(24, stop_token_ids=[token]))
    assert (stopped.token_ids, stopped.stop_reason) == (plain.token_ids[: number + 1], token)
    later = one(llm, PROMPTS[2], greedy(24, stop=[stop], min_tokens=24))
    assert (later.text, later.finish_reason, later.stop_reason) == (plain.text, "length", None)


def test_min_tokens_rules_out_what_would_end_the_answer(llm: LLM) -> None:
    plain = one(llm, PROMPTS[1], greedy(24))
    stops = plain.token_ids[:3]
    output = one(llm, PROMPTS[1], greedy(24, stop_token_ids=stops, min_tokens=5))
    assert len(output.token_ids) > 5 and not {*output.token_ids[:5]} & {*stops, EOS_ID}


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


def test_null_max_tokens_goes_on_to_the_end_of_context_or_cache(llm: LLM) -> None:
    most = min(llm.spec.max_position, llm.num_pages * llm.config.cache.block_size + 1)
    output = one(llm, PROMPTS[0][:3], SamplingParams(max_tokens=None, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (most - len(PROMPTS[0][:3]), "length")
