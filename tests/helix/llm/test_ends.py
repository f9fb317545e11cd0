"""What ends an answer, and what of it is text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from helix import LLM, Request, SamplingParams
from scripts.make_checkpoint import EOS_ID
from tests.helix.llm.small import PROMPTS, VOCAB, greedy, make_llm, one


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


def test_null_max_tokens_goes_on_to_the_end_of_context_or_cache(llm: LLM) -> None:
    most = min(llm.spec.max_position, llm.num_pages * llm.config.cache.block_size + 1)
    output = one(llm, PROMPTS[0][:3], SamplingParams(max_tokens=None, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (most - len(PROMPTS[0][:3]), "length")
