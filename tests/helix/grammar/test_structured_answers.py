"""Structured answers are what was asked for, in every layout, with speculation and without, and disturb nobody.

Random schemas, a model of random weights, temperature 1: whatever the masks let through is tried. A whole answer
parses and is as its schema says; one that its length ended is the beginning of such a one.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest

from helix.grammar import matching
from helix.llm import LLM
from helix.request import LENGTH, STOP, Chunk, Request, RequestOutput
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint
from tests.helix.grammar.schemas import is_valid, random_schema
from tests.helix.speculative.world import Recorded, make_llm, run, told, use

xgrammar = pytest.importorskip("xgrammar")
NGRAM = {"method": "ngram", "ngram_min": 1, "max_draft_len": 3}
PLAIN = Request(prompt_token_ids=[3] * 20, sampling=SamplingParams(max_tokens=50, ignore_eos=True))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("structured") / "model", layers=1))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    made = make_llm(model, look_ahead=True)
    yield made
    made.preparer.grammars.close()


def asking(structure: dict[str, Any], seed: int = 0, max_tokens: int = 60, **settings: Any) -> Request:
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=1.0, seed=seed, structured_outputs=structure, **settings
    )
    prompt = Random(seed).choices(range(256), k=1 + seed % 23)
    return Request(prompt_token_ids=prompt, sampling=sampling)


def check(schema: dict[str, Any], output: RequestOutput, llm: LLM) -> None:
    """A whole answer is as its schema says; any other begins so."""
    assert output.error is None and output.finish_reason in (STOP, LENGTH)
    if output.finish_reason == STOP:
        assert is_valid(json.loads(output.text), schema, schema), (schema, output.text)
        return
    compiler = xgrammar.GrammarCompiler(llm.vocabulary.info, max_threads=1)
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    assert matcher.accept_string(bytes(output.token_ids)), (schema, output.text)


def layout_body(path: str, kvp: int, tpa: int, num_schemas: int, is_often_wrong: bool) -> list[Any]:
    """Outputs launched ahead beside another, and drafted for: from their own tokens, or by one who is often wrong."""
    schemas = [random_schema(Random(seed)) for seed in range(num_schemas)]
    asked = [asking({"json": schema}, seed, 40) for seed, schema in enumerate(schemas)]
    llm = make_llm(path, kvp=kvp, tpa=tpa, look_ahead=True)
    outputs = run(llm, [*asked, PLAIN])
    for schema, output in zip(schemas, outputs, strict=False):
        if llm.launch.speaks:
            check(schema, output, llm)
    drafting = sharing(llm, make_llm(path, kvp=kvp, tpa=tpa, graphs=is_often_wrong, speculative=NGRAM))
    if is_often_wrong:
        use(drafting, Recorded(outputs, 0.7))
    assert told(run(drafting, [*asked, PLAIN])) == told(outputs)
    counters = drafting.metrics.speculative
    assert counters is not None and 0 < counters.accepted < counters.drafted
    llm.preparer.grammars.close()
    return [output.token_ids for output in outputs]


def sharing(llm: LLM, other: LLM) -> LLM:
    """Let another compile its grammars in the same process, whose start takes seconds."""
    other.preparer.grammars = llm.preparer.grammars
    return other


def test_random_schemas_are_kept_alike_in_every_layout(ranks: Callable[..., Any], model: str) -> None:
    tokens, *_ = ranks(1).run(layout_body, model, 1, 1, 8, True)
    for others in ranks(4).run(layout_body, model, 2, 2, 4, False):
        assert others == [*tokens[:4], tokens[-1]]


@pytest.mark.slow
@pytest.mark.timeout(3_000)
def test_ten_thousand_random_schemas_are_kept(model: str) -> None:
    """Run by: bash scripts/test.sh -m slow -k ten_thousand_random_schemas."""
    llm = make_llm(model, look_ahead=True, max_batch=64, num_pages=4096)
    schemas = [random_schema(Random(seed)) for seed in range(10_000)]
    outputs = run(llm, [asking({"json": schema}, seed, 80) for seed, schema in enumerate(schemas)])
    for schema, output in zip(schemas, outputs, strict=True):
        check(schema, output, llm)
    whole = sum(output.finish_reason == STOP for output in outputs)
    assert 5_000 < whole < 10_000


@pytest.mark.parametrize(
    ("structure", "is_one"),
    [
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
        ({"regex": "[a-c]{3}[0-9]+"}, lambda text: re.fullmatch("[a-c]{3}[0-9]+", text)),
        ({"choice": ["yes", 'no, "é\n"']}, lambda text: text in ("yes", 'no, "é\n"')),
        ({"grammar": 'root ::= "x" root | "y"'}, lambda text: re.fullmatch("x*y", text)),
        (
            {"call": '{"begin": "<c>", "schema": {"const": [1]}, "end": "</c>"}'},
            lambda text: (text[:3], text[-4:], json.loads(text[3:-4])) == ("<c>", "</c>", [1]),
        ),
    ],
)
def test_other_forms_are_kept(llm: LLM, structure: dict[str, Any], is_one: Callable[[str], bool]) -> None:
    outputs = run(llm, [asking(structure, seed, 150) for seed in range(8)])
    whole = [output.text for output in outputs if output.finish_reason == STOP]
    assert whole and all(map(is_one, whole))


def test_a_preempted_answer_goes_on_as_it_would_have(model: str, llm: LLM) -> None:
    asked = [asking({"regex": "([a-z]|[0-9]{2}){50}"}, seed, 80) for seed in range(6)]
    tight = sharing(llm, make_llm(model, block_size=4, num_pages=40))
    assert told(run(tight, asked)) == told(run(llm, asked))
    assert tight.engine.scheduler.cache.counters.preemptions > 0


def test_stops_that_are_text_end_an_answer_early_and_special_ones_only_a_whole_one(llm: LLM) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 3}
    early, late = run(
        llm,
        [asking({"json": schema}, 1, stop=[","]), asking({"json": schema}, 2, 300, stop_token_ids=[260])],
    )
    assert (early.finish_reason, early.stop_reason) == (STOP, ",") and early.text.startswith("[")
    assert late.finish_reason == STOP and len(json.loads(late.text)) >= 3


def test_an_aborted_answer_is_the_beginning_of_one_and_leaves_nothing(llm: LLM) -> None:
    asked = asking({"regex": "[ab]{60}"}, max_tokens=80)
    stream = llm.stream([asked, PLAIN])
    made = [token for _, event in zip(range(60), stream, strict=False) if event.index == 0 for token in event.token_ids]
    stream.close()  # type: ignore[attr-defined]
    [whole] = run(llm, [asked])
    assert 10 < len(made) < 60 and made == whole.token_ids[: len(made)]
    matchers = llm.engine._masks._matchers
    assert matchers is not None and not matchers._matched


@pytest.mark.parametrize(
    ("structure", "made", "forbidden"),
    [
        ({"json": {"type": "string", "maxLength": 4}}, b'"', range(0x20)),
        ({"json": {"type": "string", "maxLength": 4}}, b'"\xed', range(0xA0, 0xC0)),
        ({"regex": "[^a]+"}, b"\xe0", range(0x80, 0xA0)),
        ({"regex": "[^a]+"}, b"b", [0xC0, 0xC1, *range(0xF5, 0x100)]),
    ],
)
def test_no_token_breaks_json_or_a_character(
    llm: LLM, structure: dict[str, Any], made: bytes, forbidden: Sequence[int]
) -> None:
    matchers = matching.Matchers(llm.vocabulary)
    seq = matchers.admit(
        llm.preparer.prepare(0, asking(structure), SamplingParams(structured_outputs=structure))
    ).sequence()
    seq.token_ids += made
    masks = np.zeros((1, -(-llm.spec.vocab_size // 32)), np.int32)
    assert matchers.fill([Chunk(seq, len(seq.token_ids) - 1, len(seq.token_ids))], masks) == [0]
    allowed = np.unpackbits(masks[0].view(np.uint8), bitorder="little")
    assert allowed[:256].any() and not allowed[list(forbidden)].any()


@pytest.mark.parametrize(
    ("structure", "num_bounded"),
    [
        ({"json_object": True}, 1),
        ({"call": '{"begin": "  ", "schema": {"type": "array", "items": {"const": 1}, "minItems": 2}, "end": "x"}'}, 3),
    ],
)
def test_blanks_between_the_parts_of_json_come_to_an_end(llm: LLM, structure: dict[str, Any], num_bounded: int) -> None:
    """However much the model wants them, drafted ones too; a string, as an object's first name, may have more."""
    asked = [asking(structure, seed, 80, logit_bias=dict.fromkeys(b" \n", 50.0)) for seed in range(4)]
    outputs = run(llm, asked)
    drafting = sharing(llm, make_llm(llm.config.model.path, speculative=NGRAM))
    assert told(run(drafting, asked)) == told(outputs)
    counters = drafting.metrics.speculative
    assert counters is not None and counters.accepted > 0
    runs = list[str]()
    for output in outputs:
        parts = output.text.lstrip().split('"')
        assert len(parts) == 1 or parts[1].count(" ") > 20
        runs += [run for part in parts[::2] for run in re.findall(r"\s+", part)]
    assert all(re.fullmatch(" |\n {0,20}", run) for run in runs)
    assert runs.count("\n" + " " * 20) >= num_bounded


def test_a_row_with_a_mask_waits_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another a structured sequence has a row in every other step, and the other one in each."""
    launched: list[tuple[int, ...]] = []
    launch = llm.runner.launch
    monkeypatch.setattr(llm.runner, "launch", lambda chunks: launched.append(_who(chunks)) or launch(chunks))
    asked = [asking({"regex": "a{30}"}), asking({"regex": "[a-z]{30}"}, 1)]
    for each in asked:  # one that waits for its compiler would come later
        llm.preparer.grammars.compile(each.sampling.structured_outputs)  # type: ignore[union-attr]
    run(llm, [PLAIN, *asked])
    together, alone = launched.count((0, 1, 2)), launched.count((0,))
    assert together + alone > 40 and abs(together - min(alone, 30)) <= 2


def _who(chunks: Sequence[Any]) -> tuple[int, ...]:
    return tuple(sorted(chunk.seq.index for chunk in chunks))


def test_an_ambiguous_grammar_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with ever more readings takes ever longer to match, while all ranks wait."""
    [plain] = run(llm, [PLAIN])
    monkeypatch.setattr(matching, "ROW_S", 0.001)
    ambiguous = asking({"grammar": 'root ::= "a" | root root'}, max_tokens=1_500, logit_bias={97: 100.0})
    slow, beside = run(llm, [ambiguous, PLAIN])
    assert slow.finish_reason == "error" and "ambiguous" in str(slow.error)
    assert told([beside]) == told([plain])


def test_one_that_no_token_can_go_on_with_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a vocabulary spells the beginning of a text, and not its end."""
    [plain] = run(llm, [PLAIN])
    fill = matching.Matchers.fill

    def fill_until(self: matching.Matchers, chunks: Sequence[Chunk], masks: Any) -> list[int]:
        counts = fill(self, chunks, masks)
        masks[[len(chunk.seq.output_ids) == 3 for chunk in chunks]] = 0
        return counts

    monkeypatch.setattr(matching.Matchers, "fill", fill_until)
    stuck, beside = run(llm, [asking({"regex": "b{9}"}), PLAIN])
    assert (stuck.finish_reason, stuck.text) == ("error", "bbb") and "no token" in str(stuck.error)
    assert told([beside]) == told([plain])


def test_a_defect_of_matching_ends_every_rank(ranks: Callable[..., Any], model: str) -> None:
    assert ranks(2).run(defect_body, model) == ["RuntimeError: not here", "DoorClosed: rank 0 failed"]


def defect_body(path: str) -> str:
    llm = make_llm(path, kvp=2)

    def fail(*_: Any) -> list[int]:
        raise RuntimeError("not here")

    if llm.launch.speaks:
        llm.engine._masks._matchers.fill = fail  # type: ignore[union-attr, method-assign]
    with pytest.raises(RuntimeError) as caught:
        llm.generate([asking({"regex": "b{9}"})])
    llm.preparer.grammars.close()
    return f"{type(caught.value).__name__}: {str(caught.value)[:13]}"
