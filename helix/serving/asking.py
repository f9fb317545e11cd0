"""From the body of a completion or chat request to what is asked: requests, and how their answers are to be given."""

from __future__ import annotations

import logging
from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from ..cache.retention import DEFAULT_PRIORITY, Retention
from ..checks import conforms, whole_number
from ..fields import (
    BY_NAME,
    CHAT,
    COMPLETIONS,
    LENGTHS,
    is_ids,
    one_name,
    require_messages,
    require_neutral,
    retention_of,
    take_settings,
    take_template,
)
from ..request import Request, priority_of
from ..sampling import SamplingParams
from .config import ServingConfig
from .errors import ApiError
from .forced_calls import names_of

_log = logging.getLogger(__name__)
_MAX_NAMED = 100
_named: set[str] = set()  # fields that the log has told of


@dataclass(frozen=True, slots=True)
class Asked:
    """What one HTTP call asks for.

    Attributes:
        endpoint: completions or chat.
        requests: one a prompt, its settings in it.
        n: answers to each prompt.
        stream: send the answer as it is made.
        include_usage, continuous_usage: a last chunk with the usage; usage in every chunk.
        echo: begin with the prompt.
        only_prompt: show nothing else: no token was asked for.
        prompt_logprobs: tell those of the prompt by themselves.
        return_token_ids: tell the ids.
        length: the name under which the length of the answer was asked for; empty where it is a default's.
        tools: that the answer may call.
        called: functions of which it has to call one; none where it need not.
    """

    endpoint: str
    requests: list[Request]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    only_prompt: bool = False
    prompt_logprobs: bool = False
    return_token_ids: bool = False
    length: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    called: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """True for messages."""
        return self.endpoint == CHAT


def read_json(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds; ApiError where it holds none."""
    try:
        value = msgspec.json.decode(body.removeprefix(BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a {type(value).__name__}, must be an object")
    return value


def asked_of(
    body: Mapping[str, Any], endpoint: str, model_name: str, sampling: SamplingParams, serving: ServingConfig
) -> Asked:
    """Return what a body asks for.

    Raises:
        ApiError: 404 for another model, 400 for a setting.
        ValueError: in one line that begins with the field that is at fault.
    """
    given = one_name(body)
    require_model(given.pop("model", None), model_name)
    calls = _take_calls(given)
    n = calls.pop("n", 1)
    choice = given.get("tool_choice", "auto") if endpoint == CHAT else "auto"
    if choice != "none":
        given.pop("tool_choice", None)
    template = take_template(given) if endpoint == CHAT else {}
    called = tuple(names_of(choice, template.get("tools", ())))
    echoes = endpoint == COMPLETIONS and calls.get("echo", False)
    if echoes and given.get("max_tokens") == 0:
        given["max_tokens"], calls["only_prompt"] = 1, True
    length = next((name for name in LENGTHS if body.get(name) is not None), "")
    try:
        settings = sampling.with_overrides(take_settings(given))
    except ValueError as problem:
        raise ApiError.of(problem, length) from problem
    calls["prompt_logprobs"] = settings.prompt_logprobs is not None
    if calls["prompt_logprobs"] and calls.get("stream"):
        raise ValueError("prompt_logprobs is not streamed; leave out stream, or ask for echo and logprobs")
    if echoes and settings.logprobs is not None:
        settings = replace(settings, prompt_logprobs=max(settings.logprobs, settings.prompt_logprobs or 0))
    shared: dict[str, Any] = {
        "sampling": settings,
        "cache_salt": given.pop("cache_salt", ""),
        "retention": _retention(given.pop("retention", []), serving.max_retention_s),
        "priority": _priority(given.pop("priority", 0), serving.max_priority),
        "template": template,
    }
    if endpoint == CHAT:
        require_messages(given.get("messages"))
        prompts: list[dict[str, Any]] = [{"messages": given.pop("messages")}]
    else:
        prompts = _prompts(given.pop("prompt", None), serving.max_prompts)
    for name, value in given.items():
        _pass_over(name, value, endpoint)
    if len(prompts) * n > serving.max_choices:
        raise ValueError(f"n = {n} for {len(prompts)} prompts exceeds serve.max_choices = {serving.max_choices}")
    requests = [Request(**prompt, **shared) for prompt in prompts]
    for request in requests:
        request.check()
    if called and settings.structured_outputs:
        raise ValueError('tool_choice = "required" or a function together with structured_outputs is not supported')
    tools = tuple(template.get("tools", ()))
    return Asked(endpoint, requests, n, length=length, tools=tools, called=called, **calls)


def require_model(given: Any, model_name: str) -> None:
    """Raise ApiError where another model is asked for than the one that is served."""
    if given is not None and given != model_name:
        shown = str(given)[:200]
        raise ApiError(
            404, f"the model {shown!r} is not served here; {model_name!r} is", param="model", code="model_not_found"
        )


def _take_calls(given: dict[str, Any]) -> dict[str, Any]:
    """Take out how the answer is to be given."""
    calls: dict[str, Any] = {}
    for name, kind in (("n", int), ("stream", bool), ("echo", bool), ("return_token_ids", bool), ("request_id", str)):
        if name in given:
            value = whole_number(given.pop(name)) if kind is int else given.pop(name)
            if not conforms(value, kind):
                raise ValueError(f"{name} is a {type(value).__name__}, must be of type {kind.__name__}")
            calls[name] = value
    calls.pop("request_id", None)
    if calls.get("n", 1) < 1:
        raise ValueError(f"n = {calls['n']} must be at least 1")
    options = given.pop("stream_options", {})
    if not isinstance(options, dict):
        raise ValueError(f"stream_options is a {type(options).__name__}, must be an object")
    calls["include_usage"] = bool(options.get("include_usage"))
    calls["continuous_usage"] = bool(options.get("continuous_usage_stats"))
    return calls


def _prompts(prompt: Any, most: int) -> list[dict[str, Any]]:
    """Return the prompts of a completion request: a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if is_ids(prompt) and prompt:
        return [{"prompt_token_ids": prompt}]
    if not (isinstance(prompt, list) and prompt):
        raise ValueError("prompt must be a text, a list of token ids, or a list of texts or of lists of token ids")
    if len(prompt) > most:
        raise ValueError(f"prompt holds {len(prompt)} prompts, and serve.max_prompts = {most}")
    for number, each in enumerate(prompt):
        if not (isinstance(each, str) or is_ids(each)):
            raise ValueError(f"prompt[{number}] must be a text or a list of token ids")
    return [{"prompt": each} if isinstance(each, str) else {"prompt_token_ids": each} for each in prompt]


def _retention(given: Any, most_s: float) -> tuple[Retention, ...]:
    """Return retention that clients may ask for; ValueError for any other."""
    ranges = retention_of(given)
    if ranges and not most_s:
        raise ValueError("retention is not taken here; serve.max_retention_s allows it")
    for each in ranges:
        if each.priority > DEFAULT_PRIORITY and not (each.duration_s is not None and each.duration_s <= most_s):
            raise ValueError(
                f"retention.duration_s = {each.duration_s} must be at most serve.max_retention_s = {most_s}"
            )
    return ranges


def _priority(given: Any, most: int | None) -> int:
    """Return a priority that clients may ask for; ValueError for any other."""
    priority = priority_of(given)
    if priority and most is None:
        raise ValueError(f"priority = {priority} is not taken here; serve.max_priority allows it")
    if priority and most is not None and priority > most:
        raise ValueError(f"priority = {priority} must be at most serve.max_priority = {most}")
    return priority


def _pass_over(name: str, value: Any, endpoint: str) -> None:
    """Let a field pass that changes nothing, and name it in the log once; ValueError for one that is not done."""
    field = BY_NAME.get(name)
    if field is not None and field.kind == "refused" and endpoint in field.at:
        require_neutral(name, value)
    elif name not in _named and len(_named) < _MAX_NAMED:
        _named.add(name)
        _log.info("the field %.100r is ignored", name)
