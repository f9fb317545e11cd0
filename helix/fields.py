"""The names under which other programs ask for things, in files of prompts and over HTTP: one table for both.

A setting of ``SamplingParams`` stands here under its own name, and under those that OpenAI's API and other servers have
for it. What Helix does not do is refused, but for the values that ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .cache.retention import Retention
from .checks import plain_number, whole_number
from .sampling import SamplingParams
from .structured import from_response_format

COMPLETIONS, CHAT = "completions", "chat"
BOTH = (COMPLETIONS, CHAT)
HONOURED, IGNORED, REFUSED = "honoured", "ignored", "400"
SETTINGS = tuple(each.name for each in fields(SamplingParams))
RETENTION_KEYS = ("start", "end", "priority", "duration_s")


@dataclass(frozen=True)
class Field:
    """A name that a request may hold.

    Attributes:
        name: as clients write it.
        does: what it does, for the documentation; of one that is refused, why.
        kind: "setting" of SamplingParams, "request" for what is asked, "call" for how an answer is given (HTTP's
            alone), "ignored", or "refused".
        at: the endpoints that know it.
        to: the setting that it stands for, where that has another name.
        neutral: values that ask for nothing, where it is refused; files of prompts take them for those of HTTP too.
    """

    name: str
    does: str
    kind: str = "setting"
    at: tuple[str, ...] = BOTH
    to: str = ""
    neutral: tuple[Any, ...] = ()

    @property
    def effect(self) -> str:
        """What becomes of it over HTTP."""
        if self.kind == "refused" and self.name in SETTINGS:
            return HONOURED
        return {"ignored": IGNORED, "refused": REFUSED}.get(self.kind, HONOURED)


FIELDS = (
    Field("model", "the served name, or left out; 404 for any other", "call"),
    Field("prompt", "a text, token ids, or a list of either", "request", (COMPLETIONS,)),
    Field("messages", "turns; content is text, null, or a list of text parts", "request", (CHAT,)),
    Field("max_tokens", "completions: 16 unless set otherwise, with echo also 0; chat: what fits"),
    Field("max_completion_tokens", "the same as max_tokens", to="max_tokens"),
    Field("max_new_tokens", "the same as max_tokens", to="max_tokens"),
    Field("n", "answers to each prompt, of seeds seed, seed + 1, ...", "call", neutral=(1,)),
    Field("stream", "server-sent events", "call"),
    Field("stream_options", "include_usage, continuous_usage_stats", "call"),
    Field("temperature", "0 takes the most likely token always"),
    Field("top_p", "in (0, 1]"),
    Field("top_k", "-1 and 0 are all"),
    Field("min_p", "in [0, 1]"),
    Field("repetition_penalty", "1 is none"),
    Field("presence_penalty", "in [-2, 2]"),
    Field("frequency_penalty", "in [-2, 2]"),
    Field("seed", "makes an answer repeatable"),
    Field("stop", "a text or a list of them; they are not part of the answer"),
    Field("stop_token_ids", "token ids that end the answer"),
    Field("ignore_eos", "goes on after the model's end of sequence"),
    Field("min_tokens", "before, nothing ends the answer"),
    Field("logit_bias", "token id -> what is added, in [-100, 100]"),
    Field("bad_words", "texts that the answer must not hold"),
    Field("structured_outputs", "what the answer must be: one of json, json_object, regex, choice, grammar"),
    Field("response_format", "json_schema and json_object, as structured_outputs; text", to="structured_outputs"),
    Field("include_stop_str_in_output", "a stop is part of the answer"),
    Field("skip_special_tokens", "false shows them"),
    Field("logprobs", "completions: how many likely tokens; chat: true or false"),
    Field("top_logprobs", "likely tokens beside each one; needs logprobs", "request", (CHAT,)),
    Field("echo", "the prompt comes first, in the text and in logprobs", "call", (COMPLETIONS,), neutral=(False,)),
    Field("prompt_logprobs", "as many likely tokens beside each of the prompt's; not streamed"),
    Field("cache_salt", "shares cached blocks only with requests of the same salt", "request"),
    Field("priority", "higher is first, as in files of prompts; needs serve.max_priority", "request", neutral=(0,)),
    Field("retention", "as in files of prompts; needs serve.max_retention_s", "request"),
    Field("return_token_ids", "adds token_ids and prompt_token_ids", "call", neutral=(False,)),
    Field("request_id", "names the request, as the header X-Request-Id does", "call"),
    Field("chat_template_kwargs", "for the template, such as enable_thinking", "request", (CHAT,)),
    Field("add_generation_prompt", "false does not begin an answer", "request", (CHAT,)),
    Field("continue_final_message", "goes on with the last turn", "request", (CHAT,)),
    Field("documents", "for the template", "request", (CHAT,)),
    Field("tools", "for the template; its response template finds calls", "request", (CHAT,)),
    Field("tool_choice", "none, auto, required, or a function", "request", (CHAT,), neutral=("none", "auto")),
    Field("user", "", "ignored"),
    Field("metadata", "", "ignored"),
    Field("store", "", "ignored"),
    Field("service_tier", "", "ignored"),
    Field("safety_identifier", "", "ignored"),
    Field("prompt_cache_key", "blocks are found by their tokens", "ignored"),
    Field("parallel_tool_calls", "", "ignored"),
    Field("spaces_between_special_tokens", "special tokens are no text", "refused", neutral=(True, False)),
    Field("best_of", "ask for n", "refused", neutral=(1,)),
    Field("suffix", "no model here fills gaps", "refused", (COMPLETIONS,), neutral=("",)),
    Field("truncate_prompt_tokens", "prompts are taken whole", "refused", neutral=(-1,)),
    Field("use_beam_search", "not done", "refused", neutral=(False,)),
    Field("length_penalty", "belongs to beam search", "refused", neutral=(1,)),
    Field("functions", "use tools", "refused", (CHAT,), neutral=([],)),
    Field("function_call", "use tool_choice", "refused", (CHAT,), neutral=("none", "auto")),
    Field("modalities", "only text", "refused", (CHAT,), neutral=(["text"],)),
    Field("audio", "only text", "refused", (CHAT,)),
    Field("prediction", "drafts are the server's to choose", "refused", (CHAT,)),
    Field("reasoning_effort", "use chat_template_kwargs", "refused", (CHAT,)),
    Field("web_search_options", "not done", "refused", (CHAT,)),
    Field("guided_json", "use structured_outputs", "refused"),
    Field("guided_regex", "use structured_outputs", "refused"),
    Field("guided_choice", "use structured_outputs", "refused"),
    Field("guided_grammar", "use structured_outputs", "refused"),
)  # fmt: skip
BY_NAME = {each.name: each for each in FIELDS}
_TEMPLATE: dict[str, type[Any]] = {
    "chat_template_kwargs": dict,
    "add_generation_prompt": bool,
    "continue_final_message": bool,
    "documents": list,
    "tools": list,
}
LENGTHS = tuple(each.name for each in FIELDS if "max_tokens" in (each.name, each.to))
_SAME_AS = {each.name: each.to for each in FIELDS if each.to}


def one_name(given: Mapping[str, Any], also: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what was given without what is null, each under the name that it has here; ``also`` has more of them.

    Raises:
        ValueError: where two names of one thing have different values.
    """
    plain: dict[str, Any] = {}
    names = {**_SAME_AS, **(also or {})}
    for key, value in given.items():
        if value is None:
            continue
        name = names.get(key, key)
        if key == "response_format":
            value = from_response_format(value)
        if name in plain and plain[name] != value:
            raise ValueError(f"{name} is given twice, once as {key}; give it once")
        plain[name] = value
    _take_logprobs(plain)
    return plain


def take_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Take the settings of ``SamplingParams`` out of what was given, and return them."""
    return {name: given.pop(name) for name in SETTINGS if name in given}


def take_template(given: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of the chat template out of what was given, tools that may be called among them.

    Raises:
        ValueError: for a value of another type, and for a choice of tools that is more than none or auto.
    """
    template: dict[str, Any] = {}
    for name, kind in _TEMPLATE.items():
        if name in given:
            value = given.pop(name)
            if not isinstance(value, kind):
                raise ValueError(f"{name} is a {type(value).__name__}, must be of type {kind.__name__}")
            template.update(value if name == "chat_template_kwargs" else {name: value})
    choice = given.pop("tool_choice", "auto")
    require_neutral("tool_choice", choice)
    tools = template.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of objects")
    if choice == "none" or not template.get("tools"):
        template.pop("tools", None)
    return template


def require_neutral(name: str, value: Any) -> None:
    """Raise ValueError for a value that asks for what is not done."""
    field = BY_NAME[name]
    if not any(value == each for each in field.neutral):
        why = f": {field.does}" if field.kind == "refused" else ""
        raise ValueError(f"{name} = {_short(value)} is not supported{why}; leave it out")


def retention_of(ranges: Any) -> tuple[Retention, ...]:
    """Return the retention that is asked for: one range of tokens, or a list of them."""
    ranges = [ranges] if isinstance(ranges, dict) else ranges
    if not (isinstance(ranges, list) and all(isinstance(each, dict) for each in ranges)):
        raise ValueError('retention must be an object {"start": ..., "end": ..., "priority": ..., "duration_s": ...}, '
                         "or a list of them")  # fmt: skip
    return tuple(_range(each) for each in ranges)


def is_ids(value: Any) -> bool:
    """Say whether a value is a list of integers."""
    return isinstance(value, list) and all(type(token) is int for token in value)


def require_messages(messages: Any) -> None:
    """Raise ValueError unless a value is a list of turns."""
    if not (isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages)):
        raise ValueError('messages must be a list of objects {"role": ..., "content": ...}')


def table() -> str:
    """Return the fields of HTTP as a table of Markdown."""
    rows = ["| field | completions | chat | what it does |", "|---|---|---|---|"]
    for each in FIELDS:
        cells = [each.effect if place in each.at else "ignored" for place in BOTH]
        values = ", ".join(f"`{json.dumps(value)}`" for value in each.neutral)
        does = f"{each.does}; taken are {values}".removeprefix("; ") if each.effect == REFUSED and values else each.does
        rows.append(f"| `{each.name}` | {cells[0]} | {cells[1]} | {does} |")
    return "\n".join(rows)


def _take_logprobs(given: dict[str, Any]) -> None:
    """Turn OpenAI's two ways to ask for log-probabilities into the number of alternatives."""
    top = given.pop("top_logprobs", None)
    if given.get("logprobs") is True:
        given["logprobs"] = top or 0
    elif given.get("logprobs") is False:
        del given["logprobs"]
    elif top is not None:
        raise ValueError(f"top_logprobs = {_short(top)} needs logprobs = true")


def _range(given: Mapping[str, Any]) -> Retention:
    values = {}
    for key, value in given.items():
        if key not in RETENTION_KEYS:
            raise ValueError(f"retention.{key} is not a key; the keys are {', '.join(RETENTION_KEYS)}")
        value = plain_number(value) if key == "duration_s" else whole_number(value)
        if value is None:
            continue
        if type(value) not in ((int, float) if key == "duration_s" else (int,)):
            raise ValueError(f"retention.{key} = {json.dumps(value)} must be a number")
        values[key] = value
    return Retention(**values)


def _short(value: Any) -> str:
    return json.dumps(value)[:200]
