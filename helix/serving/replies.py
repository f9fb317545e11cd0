"""What OpenAI's API answers: the objects of completions and of chats, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from ..request import ABORT, ERROR, STOP
from ..token_texts import TokenTexts
from .asking import Asked
from .errors import ApiError
from .link import Piece
from .parsing import CONTENT, TOOL_CALL, AnswerParser
from .wire import TokenChance


class Reply(Protocol):
    """How an endpoint words its answers; ``choice`` counts them from 0, ``piece`` is what is new of one."""

    kind: str
    chunk_kind: str

    def first(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Return the choice of a chunk that comes before all others, where there is one."""

    def chunk(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Return the choice of a chunk; None where the piece has nothing to show."""

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """Return the choice of a whole answer."""


class CompletionReply:
    """Choices of /v1/completions.

    Args:
        texts: spells tokens.
        prompts: by choice, the text that an echo begins with and the prompt's tokens.
        asked: how the answer is to be given.
    """

    kind = chunk_kind = "text_completion"

    def __init__(self, texts: TokenTexts, asked: Asked, prompts: Sequence[tuple[str, list[int]]]) -> None:
        self._texts, self._asked, self._prompts = texts, asked, prompts
        self._num_letters = [0] * len(prompts)
        settings = asked.requests[0].sampling
        self._echoes_chances = asked.echo and settings is not None and settings.logprobs is not None

    def first(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Return the prompt's text, where an echo is asked for."""
        if not self._asked.echo:
            return None
        chances = self._chances(choice, piece.prompt) if self._echoes_chances else None
        return {"index": choice, "text": self._prompts[choice][0], "logprobs": chances, "finish_reason": None}

    def chunk(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Return what is new of a choice."""
        shows = piece.text or piece.logprobs or piece.end or (self._asked.return_token_ids and piece.token_ids)
        return self._choice(choice, piece, piece.text, piece.logprobs) if shows else None

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """Return a choice."""
        prefix = self._prompts[choice][0] if self._asked.echo else ""
        chances = [*piece.prompt, *piece.logprobs] if self._echoes_chances else piece.logprobs
        made = self._choice(choice, piece, prefix + piece.text, chances)
        return made | ({"prompt_logprobs": chances_by_id(self._texts, piece)} if self._asked.prompt_logprobs else {})

    def _choice(self, choice: int, piece: Piece, text: str, chances: Sequence[TokenChance | None]) -> dict[str, Any]:
        made: dict[str, Any] = {"index": choice, "text": text, "logprobs": None, "finish_reason": _reason(piece)}
        made["stop_reason"] = _stop_reason(piece)
        if chances:
            made["logprobs"] = self._chances(choice, chances)
        return made | _ids(self._asked, piece, self._prompts[choice][1])

    def _chances(self, choice: int, chances: Sequence[TokenChance | None]) -> dict[str, Any]:
        """Return log-probabilities; a prompt's first token has none."""
        first = self._prompts[choice][1][0]
        spelled = [self._texts.spelled(first if each is None else each.token_id)[0] for each in chances]
        offsets = []
        for text in spelled:
            offsets.append(self._num_letters[choice])
            self._num_letters[choice] += len(text)
        return {
            "tokens": spelled,
            "token_logprobs": [each and each.logprob for each in chances],
            "top_logprobs": [each and self._tops(each) for each in chances],
            "text_offset": offsets,
        }

    def _tops(self, chance: TokenChance) -> dict[str, float]:
        """Return likely tokens, and the one that is there; of several with one text the most likely."""
        tops: dict[str, float] = {}
        for token_id, value in [*chance.top.items(), (chance.token_id, chance.logprob)]:
            text = self._texts.spelled(token_id)[0]
            tops[text] = max(value, tops.get(text, value))
        return tops


class ChatReply:
    """Choices of /v1/chat/completions.

    Args:
        texts: spells tokens.
        asked: how the answer is to be given.
        prompts: by choice, the prompt's text and tokens.
        parsers: by choice, what tells the parts of its answer apart; none where nothing does.
    """

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        texts: TokenTexts,
        asked: Asked,
        prompts: Sequence[tuple[str, list[int]]],
        parsers: Sequence[AnswerParser] = (),
    ) -> None:
        self._texts, self._asked, self._prompts, self._parsers = texts, asked, prompts, parsers
        self._num_calls = [0] * len(prompts)

    def first(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Return the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Return what is new of a choice."""
        delta = self._message(choice, piece)
        for number, call in enumerate(delta.get("tool_calls", ())):
            call["index"] = self._num_calls[choice] - len(delta["tool_calls"]) + number
        if not (delta or piece.logprobs or piece.end or (self._asked.return_token_ids and piece.token_ids)):
            return None
        return {"index": choice, "delta": delta} | self._rest(choice, piece)

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """Return a choice."""
        message = {"role": "assistant", "content": None} | self._message(choice, piece)
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        return {"index": choice, "message": message} | self._rest(choice, piece)

    def _message(self, choice: int, piece: Piece) -> dict[str, Any]:
        """Return what a piece adds to the message: content, reasoning, tool calls."""
        if not self._parsers:
            return {"content": piece.text} if piece.text else {}
        message: dict[str, Any] = {}
        for part in self._parsers[choice].push(piece.text, ends=piece.end is not None):
            if part.kind == TOOL_CALL:
                function = {"name": part.name, "arguments": part.text}
                message.setdefault("tool_calls", []).append({"id": part.id, "type": "function", "function": function})
                self._num_calls[choice] += 1
            else:
                for name in ("content",) if part.kind == CONTENT else ("reasoning", "reasoning_content"):
                    message[name] = message.get(name, "") + part.text
        return message

    def _rest(self, choice: int, piece: Piece) -> dict[str, Any]:
        reason = _reason(piece)
        if reason == STOP and self._num_calls[choice]:
            reason = "tool_calls"
        chances = self._chances(piece.logprobs) if piece.logprobs else None
        made = {"logprobs": chances, "finish_reason": reason, "stop_reason": _stop_reason(piece)}
        return made | _ids(self._asked, piece, self._prompts[choice][1])

    def _chances(self, chances: Sequence[TokenChance]) -> dict[str, Any]:
        return {"content": [self._one(each.token_id, each.logprob) | {
            "top_logprobs": [self._one(i, value) for i, value in each.top.items()]
        } for each in chances]}  # fmt: skip

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, data = self._texts.spelled(token_id)
        return {"token": text, "logprob": logprob, "bytes": data}


def head(kind: str, request_id: str, model: str) -> dict[str, Any]:
    """Return what all objects of an answer begin with."""
    prefix = "cmpl" if kind == CompletionReply.kind else "chatcmpl"
    return {"id": f"{prefix}-{request_id}", "object": kind, "created": int(time.time()), "model": model}


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Return the tokens of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def require_answer(piece: Piece) -> None:
    """Raise ApiError where a choice ended without an answer."""
    if piece.end is not None and piece.end.finish_reason == ERROR:
        raise ApiError(500, piece.end.error or "the request failed")
    if piece.end is not None and piece.end.finish_reason == ABORT:
        raise ApiError(503, "the request was aborted", code="aborted")


def chances_by_id(texts: TokenTexts, piece: Piece) -> list[dict[str, Any] | None]:
    """Return the log-probabilities of a prompt by token id, as vLLM writes them; its first token has none."""
    return [
        None if each is None else {
            str(token_id): {"logprob": value, "decoded_token": texts.spelled(token_id)[0]}
            for token_id, value in (each.top | {each.token_id: each.logprob}).items()
        }
        for each in piece.prompt
    ]  # fmt: skip


def _reason(piece: Piece) -> str | None:
    return None if piece.end is None else piece.end.finish_reason


def _stop_reason(piece: Piece) -> int | str | None:
    return None if piece.end is None else piece.end.stop_reason


def _ids(asked: Asked, piece: Piece, prompt: list[int]) -> dict[str, Any]:
    if not asked.return_token_ids:
        return {}
    return {"token_ids": piece.token_ids, "prompt_token_ids": prompt if piece.end is not None else None}
