"""Grammars of strangers: what cannot be compiled is refused with its reason, in its time, and harms nothing else."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import closing

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helix.grammar import compiling
from helix.grammar.compiling import CompilerBusy, GrammarCompiler
from helix.grammar.vocabulary import Vocabulary

pytest.importorskip("xgrammar")
GREEDY = "((((((a{0,300}){0,300}){0,300}b){0,300}){0,300}c){0,300}){0,300}"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({each: at for at, each in enumerate([*letters, "</s>"])}, [], byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), 300, [256])


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(vocabulary)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ({"regex": "(a"}, "parenthesis is not closed"),
        ({"regex": "(?=a)b"}, "Lookahead is not supported"),
        ({"grammar": "root ::= other"}, '"other" is not defined'),
        ({"grammar": "root ::= root"}, "no text that the model's tokens spell matches it"),
        ({"json": '{"type": "integer", "minimum": 5, "maximum": 3}'}, "minimum greater than maximum"),
        ({"json": '{"$ref": "https://example.com/x"}'}, "URI should"),
        ({"json": '{"oneOf": [{"type": "integer"}, {"type": "number"}]}'}, "cannot be represented exactly"),
        ({"json": '{"allOf": [{"type": "integer"}, {"minimum": 3}]}'}, "allOf with multiple options"),
        ({"json": '{"type": "string", "pattern": "a", "minLength": 3}'}, "pattern combined with minLength"),
        ({"json": "false"}, "cannot accept any value"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(
    compiler: GrammarCompiler, structure: dict[str, str], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^sampling.structured_outputs.{next(iter(structure))} is .*{reason}"):
        compiler.compile(structure)


def test_one_that_takes_too_long_or_too_much_is_ended_alone(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "SECONDS", 0.2)
        late, good = compiler.begin({"regex": GREEDY}), compiler.begin({"regex": "a+"})
        assert good.result()
        with pytest.raises(CompilerBusy, match="^1 grammars are being compiled or wait, at most 1 may"):
            compiler.begin({"regex": "b+"}, max_waiting=1)
        assert compiler.begin({"regex": GREEDY}, max_waiting=1) is late
        with pytest.raises(ValueError, match="is not compiled after 0.2 s"):
            late.result()
    monkeypatch.setattr(compiling, "MEMORY_BYTES", 1 << 23)
    with pytest.raises(ValueError, match="needs more than 8 MiB|bad_alloc|bad alloc"):
        compiler.compile({"regex": GREEDY})


def test_what_was_compiled_is_kept_up_to_a_bound(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.begin({"regex": "a"})
    assert compiler.begin({"regex": "a"}) is first
    monkeypatch.setattr(compiling, "MAX_CACHED_BYTES", 2 * len(first.result()))
    wait([compiler.begin({"regex": letter}) for letter in "bcd"])
    assert compiler.begin({"regex": "d"}).done() and compiler.begin({"regex": "a"}) is not first


def test_what_is_missing_is_named(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    for other, reason in (
        (Vocabulary(None, 300, [256]), "needs a tokenizer"),
        (Vocabulary(vocabulary._tokenizer, 300, []), "needs a token that ends an answer"),
    ):
        with pytest.raises(ValueError, match=reason):
            GrammarCompiler(other).begin({"regex": "a"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs xgrammar: pip install -c constraints.txt -e '.\[grammar\]'"):
        GrammarCompiler(vocabulary).begin({"regex": "a"})


def test_a_vocabulary_beyond_what_a_socket_holds_is_sent_whole(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = json.loads(vocabulary.packed())
    made["spelled"] += ["a" * 20] * 50_000
    packed = json.dumps(made).encode()
    assert len(packed) > 1 << 20
    monkeypatch.setattr(vocabulary, "packed", lambda: packed)
    with closing(GrammarCompiler(vocabulary)) as compiler:
        assert compiler.compile({"regex": "a"})


def test_a_process_that_has_died_is_started_again(compiler: GrammarCompiler) -> None:
    compiler.compile({"regex": "x"})
    assert compiler._process is not None
    os.kill(compiler._process.pid, 9)
    compiler._process.wait()
    assert compiler.compile({"regex": "y"})
