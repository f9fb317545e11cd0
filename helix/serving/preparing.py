"""From what is asked to commands: templates, tokens, limits and seeds, in threads beside the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from ..commands import Add
from ..grammar.compiling import MAX_WAITING, CompilerBusy, GrammarCompiler
from ..grammar.vocabulary import Vocabulary
from ..prompts import Preparer, PromptReader, TooLong
from ..request import Request
from ..sampling import SEED_LIMIT
from .asking import Asked
from .errors import ApiError, as_written
from .wire import Ready, Setup

_log = logging.getLogger(__name__)

NUM_THREADS = 4
TOO_LONG = "context_length_exceeded"  # what clients that shorten prompts look for
T = TypeVar("T")


class Settler:
    """Makes commands of what clients ask for.

    Args:
        setup: how the server answers.
        ready: what the world can take.
        tokenizer: the model's, or None.
    """

    def __init__(self, setup: Setup, ready: Ready, tokenizer: Any) -> None:
        self._setup, self._ready = setup, ready
        self._reader = PromptReader(ready, tokenizer)
        self._grammars = GrammarCompiler(Vocabulary(tokenizer, ready.vocab_size, ready.end_ids))
        self._preparer = Preparer(
            self._reader,
            ready.limits,
            has_tokenizer=tokenizer is not None,
            end_of_turn_ids=ready.end_of_turn_ids,
            grammars=self._grammars,
        )
        self._threads = ThreadPoolExecutor(NUM_THREADS, "settle")
        self._template_threads = ThreadPoolExecutor(NUM_THREADS, "template")  # one that hangs holds up its like alone

    async def settle(self, asked: Asked, new_indices: Callable[[int], list[int]]) -> tuple[list[Add], list[str | None]]:
        """Return the requests that can run, n for each prompt, one after the other; and their prompts' texts.

        Raises:
            ApiError: why one of them cannot run.
        """
        adds: list[Add] = []
        await self._compile(asked)
        texts: list[str | None] = []
        for request in asked.requests:
            request = await self.rendered(request)
            texts += [request.prompt] * asked.n
            index, *others = new_indices(asked.n)
            add = await self.beside(lambda index=index, request=request: self._prepare(index, request, asked))  # type: ignore[misc]
            adds.append(add)
            for number, other in enumerate(others, 1):
                if (seed := asked.requests[0].sampling.seed) is not None:  # type: ignore[union-attr]
                    adds.append(msgspec.structs.replace(add, index=other, seed=(seed + number) % SEED_LIMIT))
                else:
                    adds.append(msgspec.structs.replace(add, index=other, seed=self._preparer.new_seed()))
        return [adds[0], *(msgspec.structs.replace(add, grammar=b"") for add in adds[1:])], texts

    async def start_compiler(self) -> None:
        """Start what compiles grammars before the first one comes, which tries again where that fails."""
        try:
            await self.beside(self._grammars.start)
        except RuntimeError as problem:
            _log.error("%s; structured_outputs need it", problem)

    def close(self) -> None:
        """End what compiles grammars."""
        self._grammars.close()

    async def _compile(self, asked: Asked) -> None:
        """Have the answer's grammar compiled, where there is one: it holds up its like alone."""
        sampling = asked.requests[0].sampling
        if sampling is not None and sampling.structured_outputs:
            structure = sampling.structured_outputs
            try:
                compiling = await self.beside(lambda: self._grammars.begin(structure, max_waiting=MAX_WAITING))
            except CompilerBusy as problem:
                raise ApiError(429, f"{problem}; try again later", code="overloaded", retry_after_s=5) from problem
            try:
                await asyncio.shield(asyncio.wrap_future(compiling))  # another request may wait for the same
            except ValueError as problem:
                raise ApiError.of(problem) from problem

    async def rendered(self, request: Request) -> Request:
        """Return a request whose messages are the text that the chat template makes of them, in its time."""
        if request.messages is None:
            return request
        wait_s = self._setup.serving.template_timeout_s
        try:
            rendering = self.beside(lambda: self._reader.render(request), self._template_threads)
            async with asyncio.timeout(wait_s):
                text = await rendering
        except TimeoutError as error:
            raise ApiError(
                400, f"the chat template took more than {wait_s:g} s for messages", param="messages"
            ) from error
        except ApiError as problem:
            problem.param = "messages"
            raise
        return replace(request, prompt=text, messages=None, template={}, is_rendered=True)

    def token_ids(self, request: Request) -> list[int]:
        """Return a prompt's tokens; ValueError where it is none."""
        return self._reader.token_ids(request)

    async def beside(self, work: Callable[[], T], threads: ThreadPoolExecutor | None = None) -> T:
        """Do something in a thread; ApiError for bad input."""
        try:
            return await asyncio.get_running_loop().run_in_executor(threads or self._threads, work)
        except ValueError as problem:
            raise ApiError.of(problem) from problem

    def _prepare(self, index: int, request: Request, asked: Asked) -> Add:
        sampling, limit = request.sampling, self._ready.max_position
        assert sampling is not None
        where = "messages" if asked.is_chat else "prompt"
        try:
            token_ids = self._reader.token_ids(request)
        except ValueError as problem:
            raise ApiError(400, str(problem), param=where, code=_code_of(problem)) from problem
        request = replace(request, prompt=None, prompt_token_ids=token_ids)
        if asked.is_chat and not asked.length:
            sampling = replace(sampling, max_tokens=None)
        elif asked.length and len(token_ids) + (sampling.max_tokens or 0) > limit:
            raise ApiError(
                400,
                f"{asked.length} = {sampling.max_tokens} and a prompt of {len(token_ids)} tokens exceed the model's "
                f"{limit} tokens",
                param=asked.length,
                code=TOO_LONG,
            )
        try:
            return self._preparer.prepare(index, request, sampling)
        except TooLong as problem:
            text = as_written(problem, asked.length)
            raise ApiError(400, text, param=asked.length or where, code=TOO_LONG) from problem


def _code_of(problem: ValueError) -> str | None:
    return TOO_LONG if isinstance(problem, TooLong) else None
