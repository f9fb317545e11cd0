"""From a request to token ids: what a prompt must be, and what is said of one that cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .messages import plain_messages
from .models.spec import ModelSpec
from .request import Request

Prompt = str | Sequence[int] | Request


def as_request(prompt: Prompt) -> Request:
    """Return the request that a prompt stands for: text, token ids, or itself."""
    if isinstance(prompt, Request):
        return prompt
    return Request(prompt=prompt) if isinstance(prompt, str) else Request(prompt_token_ids=list(prompt))


class PromptReader:
    """Turns requests into token ids for one model; the same on every rank.

    Args:
        spec: the model's.
        tokenizer: a transformers tokenizer, or None: prompts are then token ids.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Any) -> None:
        self._spec, self._tokenizer = spec, tokenizer

    def token_ids(self, request: Request) -> list[int]:
        """Return a request's prompt.

        Raises:
            ValueError: in one line, why it cannot run: not one prompt, empty, too long, or ids outside the vocabulary.
        """
        ids = self._read(request)
        vocab, limit = self._spec.vocab_size, self._spec.max_position
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        wrong = next((token for token in ids if not 0 <= token < vocab), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab}")
        if len(ids) >= limit:
            raise ValueError(f"the prompt has {len(ids)} tokens; the model takes at most {limit - 1}")
        return ids

    def require_one(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, with the first one's reason, when none of the prompts can run."""
        first: ValueError | None = None
        for prompt in prompts:
            try:
                self.token_ids(as_request(prompt))
                return
            except ValueError as problem:
                first = first or problem
        if first is not None:
            raise ValueError(str(first) if len(prompts) == 1 else f"all {len(prompts)} prompts failed: {first}")

    def _read(self, request: Request) -> list[int]:
        if request.error is not None:
            raise ValueError(request.error)
        given = [name for name in ("prompt", "prompt_token_ids", "messages") if getattr(request, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a request takes one of prompt, prompt_token_ids and messages, not {given or 'none'}")
        if request.prompt_token_ids is not None:
            if not all(type(token) is int for token in request.prompt_token_ids):
                raise ValueError("prompt_token_ids must be integers")
            return list(request.prompt_token_ids)
        if self._tokenizer is None:
            raise ValueError(f"{given[0]} needs a tokenizer, but the model folder has none; use prompt_token_ids")
        if request.prompt is not None:
            try:
                request.prompt.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"the prompt is no valid text: {error}") from error
            return list(self._tokenizer(request.prompt)["input_ids"])
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError("messages needs a chat template, but the model's tokenizer has none; use prompt")
        messages = plain_messages(request.messages or (), str(self._tokenizer.chat_template))
        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is the model's own program: it may raise anything
            raise ValueError(f"the chat template refused messages: {error}") from error
        return list(ids)
