"""What a request may ask of its sampling: the settings of ``SamplingParams``, checked."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from .checks import INT64_LIMIT, check_text, conforms, plain_number, whole_number
from .structured import structured

SEED_LIMIT = INT64_LIMIT
TOKEN_LIMIT = 2**31
"""Token ids and counts of tokens are below it."""
COLDEST = 1e-5
"""A temperature below it chooses the most likely token."""
MAX_STOPS, MAX_STOP_CHARS, MAX_STOP_IDS = 64, 1_000, 1_024
MAX_BIASES, MAX_BIAS, MAX_BAD_WORDS = 1_024, 100.0, 256


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """How one request samples its tokens and when it stops.

    Values that mean the same are taken for what they mean: 4.0 for a count of 4, top_k -1 for 0, a temperature below
    0.00001 for 0, one string for a list of one, and null where null is no value of its own for the default.

    Attributes:
        max_tokens: the most tokens it makes; null is as many as the model's context and the cache hold.
        min_tokens: as many it makes at least: before, no token ends it and no stop string is looked for.
        temperature: what logits are divided by; 0 takes the most likely token always.
        top_k: sample among so many of the most likely tokens; 0 is all.
        top_p: sample among the fewest most likely tokens whose probabilities add up to it; 1 is all.
        min_p: drop tokens less likely than this times the most likely one; 0 drops none.
        repetition_penalty: makes tokens of prompt and answer less likely; above 1, which is none.
        presence_penalty: subtracted from the logits of tokens that the answer has already.
        frequency_penalty: subtracted from them once for each time that the answer has them.
        logit_bias: token id -> what is added to its logit, from -100 to 100.
        bad_words: texts that the answer must not hold, each of some tokens: the last of them is ruled out.
        structured_outputs: what the answer's text must be, one of json (a JSON schema), json_object (true), regex,
            choice (a list of texts) and grammar (EBNF as llama.cpp's); kept as ``structured`` returns it.
        seed: an integer that makes sampling repeatable; None takes another one for each request.
        stop: texts that end the answer; they are not part of it.
        include_stop_str_in_output: they are part of it, as is the text of a token that ends it.
        stop_token_ids: token ids that end the answer, beside the model's own.
        ignore_eos: go on after the model's end of sequence.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: return each token's log-probability, and those of so many of the most likely; None returns nothing.
        prompt_logprobs: return the same of the prompt's tokens, the first excepted; the prompt then reuses no cache.

    Raises:
        ValueError: in one line that names the setting, its value and what would be valid.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    bad_words: list[str] = field(default_factory=list)
    structured_outputs: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.structured_outputs is not None:
            self.structured_outputs = structured(self.structured_outputs)
        for item in fields(SamplingParams):
            given = getattr(self, item.name)
            if given is item.default:  # most are, and servers make four of these a request
                continue
            value = _plain(given, item.type)
            if value is None and not conforms(None, item.type):
                value = item.default_factory() if item.default_factory is not MISSING else item.default
            if not conforms(value, item.type):
                expected = item.type.__name__ if type(item.type) is type else item.type
                raise ValueError(f"sampling.{item.name} = {_short(value)} must be of type {expected}")
            setattr(self, item.name, value)
        if self.top_k == -1:
            self.top_k = 0
        if 0 <= self.temperature < COLDEST:
            self.temperature = 0.0
        for name, holds, rule in self._rules():
            if not holds:
                raise ValueError(f"sampling.{name} = {_short(getattr(self, name))} {rule}")
        check_text("sampling.stop", self.stop)
        check_text("sampling.bad_words", self.bad_words)

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yield each setting that has bounds, whether it keeps them, and what they are."""
        most = TOKEN_LIMIT if self.max_tokens is None else self.max_tokens
        yield "max_tokens", self.max_tokens is None or 1 <= most < TOKEN_LIMIT, "must lie in [1, 2**31)"
        yield "min_tokens", 0 <= self.min_tokens < TOKEN_LIMIT, "must lie in [0, 2**31)"
        yield "min_tokens", self.min_tokens <= most, f"must be at most sampling.max_tokens = {self.max_tokens}"
        heat = self.temperature
        yield "temperature", heat == 0 or COLDEST <= heat <= 1e5, "must be 0 (greedy) or lie in [0.00001, 100000]"
        yield "top_k", 0 <= self.top_k < INT64_LIMIT, "must lie in [0, 2**63) (0 keeps every token)"
        yield "top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"
        yield "min_p", 0 <= self.min_p <= 1, "must lie in [0, 1]"
        yield "repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "must lie in [0.01, 100] (1 is none)"
        yield "presence_penalty", -2 <= self.presence_penalty <= 2, "must lie in [-2, 2]"
        yield "frequency_penalty", -2 <= self.frequency_penalty <= 2, "must lie in [-2, 2]"
        yield "logit_bias", len(self.logit_bias) <= MAX_BIASES, f"must hold at most {MAX_BIASES} token ids"
        yield "logit_bias", all(0 <= i < TOKEN_LIMIT for i in self.logit_bias), "must hold token ids in [0, 2**31)"
        yield "logit_bias", all(abs(v) <= MAX_BIAS for v in self.logit_bias.values()), "must hold values in [-100, 100]"
        yield "bad_words", len(self.bad_words) <= MAX_BAD_WORDS, f"must hold at most {MAX_BAD_WORDS} strings"
        yield "bad_words", all(word.strip() for word in self.bad_words), "must not contain an empty string"
        yield (
            "bad_words",
            all(len(word) <= MAX_STOP_CHARS for word in self.bad_words),
            f"must hold strings of at most {MAX_STOP_CHARS} characters",
        )
        free = not self.structured_outputs
        yield "min_tokens", free or not self.min_tokens, "must be 0 with structured_outputs, which says where it ends"
        yield "ignore_eos", free or not self.ignore_eos, "must be false with structured_outputs: nothing may follow"
        yield "bad_words", free or not self.bad_words, "must be empty with structured_outputs: no token might be left"
        yield "seed", self.seed is None or 0 <= self.seed < SEED_LIMIT, "must lie in [0, 2**63) or be null"
        yield "stop", len(self.stop) <= MAX_STOPS, f"must hold at most {MAX_STOPS} strings"
        yield "stop", all(self.stop), "must not contain an empty string"
        yield (
            "stop",
            all(len(s) <= MAX_STOP_CHARS for s in self.stop),
            (f"must hold strings of at most {MAX_STOP_CHARS} characters"),
        )
        yield "stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_IDS, f"must hold at most {MAX_STOP_IDS} ids"
        yield (
            "stop_token_ids",
            all(0 <= i < TOKEN_LIMIT for i in self.stop_token_ids),
            ("must hold token ids in [0, 2**31)"),
        )
        for name, number in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            yield name, number is None or 0 <= number < TOKEN_LIMIT, "must lie in [0, 2**31) or be null (none returned)"

    @property
    def is_greedy(self) -> bool:
        """Say whether each token is the argmax of its logits."""
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """Say whether each token is the argmax of the logits as they are, and nothing else is asked for."""
        is_free = not (self.has_penalties or self.has_biases or self.structured_outputs)
        return self.is_greedy and is_free and self.logprobs is None

    @property
    def has_biases(self) -> bool:
        """Say whether anything is added to logits, or rules tokens out."""
        return bool(self.logit_bias or self.bad_words or self.min_tokens)

    @property
    def has_penalties(self) -> bool:
        """Say whether the choice depends on the tokens made so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def with_overrides(self, overrides: Mapping[str, Any]) -> "SamplingParams":
        """Return a copy with `overrides` (setting -> value, e.g. one line of an input file) in place.

        A null that is no value of the setting's changes nothing. ``n`` may be 1, as other programs write it. Raises
        ValueError for an unknown setting, a wrong type or a bad value.
        """
        types = {item.name: item.type for item in fields(self)}
        changes: dict[str, Any] = {}
        for name, value in overrides.items():
            if name == "n" and (value is None or _plain(value, int) == 1):
                continue
            if name == "n":
                raise ValueError(f"sampling.n = {_short(value)} must be 1; give the prompt once for each answer")
            if name not in types:
                raise ValueError(f"sampling.{name} is not a setting; valid settings: {', '.join(types)}")
            if value is not None or conforms(None, types[name]):
                changes[name] = value
        return replace(self, **changes)


def _plain(value: Any, expected: Any) -> Any:
    """Return a value in the type that is expected where it is certain what is meant, else as it is."""
    value = plain_number(value)
    if conforms(1, expected) and not conforms(1.5, expected):
        return whole_number(value)
    if isinstance(value, str) and conforms(["text"], expected):
        return [value]
    if isinstance(value, Mapping) and conforms({1: 1.0}, expected):  # JSON's keys are texts
        return {int(key) if _is_number(key) else key: item for key, item in value.items()}
    return list(value) if conforms(value, expected) and isinstance(value, list | tuple) else value


def _is_number(key: object) -> bool:
    return isinstance(key, str) and key.isdecimal() and key.isascii() and len(key) <= 10


def _short(value: object) -> str:
    """Return a value as it was given, or the beginning of it where it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**100 else "an integer of over 100 digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
