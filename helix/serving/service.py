"""Answers completion and chat requests: from the body to the last event, and an abort where the client leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..commands import Add
from ..fields import CHAT
from ..sampling import SamplingParams
from ..token_texts import TokenTexts
from .asking import Asked, asked_of, read_json
from .errors import ApiError
from .forced_calls import forced_call
from .link import Call, Link, Piece
from .parsing import AnswerParser, response_template
from .preparing import Settler
from .replies import ChatReply, CompletionReply, Reply, chances_by_id, head, require_answer, usage_of
from .sending import EventStream, Receive, Scope, Send, read_body, send_json, while_connected
from .wire import Setup

NO_TEMPLATE = (
    "tools need a response template, and the model's tokenizer has none: start the server with "
    "serve.response_template=FILE, or send tool_choice = none"
)


class Service:
    """Answers what clients ask of the model.

    Args:
        link: the world.
        setup: how the server answers.

    Attributes:
        settler: makes commands; None while the model or its tokenizer is loaded.
        tokenizer: the model's; None before, and where it has none.
        template: how an answer's parts are told apart; None where nothing says.
        texts: spells tokens.
    """

    def __init__(self, link: Link, setup: Setup) -> None:
        self.link, self.setup = link, setup
        self.settler: Settler | None = None
        self.tokenizer: Any = None
        self.template: Any = None
        self.texts = TokenTexts(None)

    def open(self, tokenizer: Any) -> Settler:
        """Begin to answer, with what makes commands: the world is ready, and this is the model's tokenizer."""
        assert self.link.ready is not None
        self.template = response_template(self.setup.serving.response_template, tokenizer)
        self.tokenizer, self.texts = tokenizer, TokenTexts(tokenizer)
        self.settler = Settler(self.setup, self.link.ready, tokenizer)
        return self.settler

    def ready(self, num_requests: int = 1) -> Settler:
        """Return what makes commands; ApiError where so many requests cannot be taken now."""
        self.link.require_open(num_requests)
        if self.settler is None:
            raise ApiError(503, "the model is being loaded", code="loading", retry_after_s=5)
        return self.settler

    async def answer(self, endpoint: str, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Answer one request to completions or chat.

        Raises:
            ApiError: why there is no answer; nothing was sent then.
            ClientGone: where the client left; what it asked for is aborted.
        """
        settler, setup = self.ready(), self.setup
        body = await read_body(scope, receive, setup.serving.max_body_bytes)

        def read() -> Asked:
            sampling = setup.sampling
            if endpoint == CHAT and self.template is not None:  # what tells parts apart may be special tokens
                sampling = replace(sampling, skip_special_tokens=False)
            return asked_of(read_json(body), endpoint, setup.served_name, sampling, setup.serving)

        async def work() -> None:
            asked = await settler.beside(read)
            if asked.tools and self.template is None:
                raise ApiError(400, NO_TEMPLATE, param="tools")
            if asked.called:
                asked = await self._with_call(settler, asked)
            adds, texts = await settler.settle(asked, self.link.new_indices)
            answering = Answering(self, asked, adds, texts, request_id)
            call = self.link.submit(adds)
            try:
                if asked.stream:
                    await answering.stream(call, EventStream(send, setup.serving.send_timeout_s))
                else:
                    await send_json(send, await answering.whole(call))
            finally:
                call.close()

        await while_connected(receive, work())

    async def _with_call(self, settler: Settler, asked: Asked) -> Asked:
        """Return what is asked for with the form of the tool call that the answer has to be."""
        request = await settler.rendered(asked.requests[0])
        prompt, sampling = request.prompt or "", request.sampling
        assert sampling is not None

        def structure() -> SamplingParams:
            return replace(sampling, structured_outputs=forced_call(self.template, prompt, asked.tools, asked.called))

        return replace(asked, requests=[replace(request, sampling=await settler.beside(structure))])


class Answering:
    """One call's answer.

    Args:
        service: whose it is.
        asked: what was asked for.
        adds: its requests, ``asked.n`` for each prompt.
        texts: their prompts; None of token ids.
        request_id: in the answer's id.
    """

    def __init__(
        self, service: Service, asked: Asked, adds: Sequence[Add], texts: Sequence[str | None], request_id: str
    ) -> None:
        prompts = [(_text_of(service, asked, text, add), add.prompt) for text, add in zip(texts, adds, strict=True)]
        self._reply: Reply
        if asked.is_chat:
            parsers = [] if service.template is None else [
                AnswerParser(service.template, text, asked.tools) for text, _ in prompts
            ]  # fmt: skip
            self._reply = ChatReply(service.texts, asked, prompts, parsers)
        else:
            self._reply = CompletionReply(service.texts, asked, prompts)
        self._asked, self._setup, self._texts = asked, service.setup, service.texts
        self._request_id = request_id
        self._prompt_lens = [add.prompt_len for add in adds]
        self._num_made, self._num_cached = [0] * len(adds), [0] * len(adds)

    async def whole(self, call: Call) -> dict[str, Any]:
        """Return the answer when it is there."""
        made = {choice: Piece() for choice in range(len(call.indices))}
        while call.is_open:
            for choice, piece in (await self._take(call)).items():
                made[choice].add(piece)
        choices = [self._reply.whole(choice, piece) for choice, piece in made.items()]
        answer = self._head(self._reply.kind) | {"choices": choices, "usage": self._usage()}
        if self._asked.is_chat and self._asked.prompt_logprobs:  # there vLLM has them once
            answer["prompt_logprobs"] = chances_by_id(self._texts, made[0])
        return answer

    async def stream(self, call: Call, stream: EventStream) -> None:
        """Send the answer as it is made; what fails after its beginning is told in an event."""
        try:
            await self._stream(call, stream)
        except ApiError as error:
            if not stream.has_begun:
                raise
            await stream.events([error.body()])
        await stream.end()

    async def _stream(self, call: Call, stream: EventStream) -> None:
        base = self._head(self._reply.chunk_kind)
        begun: set[int] = set()
        while call.is_open:
            pieces = await self._take(call, self._setup.serving.keepalive_s)
            if not pieces:
                await stream.comment(_waiting(call))
            chunks: list[dict[str, Any]] = []
            for choice, piece in pieces.items():
                if choice not in begun:
                    begun.add(choice)
                    if (made := self._reply.first(choice, piece)) is not None:
                        chunks.append(base | self._chunk(made))
                if (made := self._reply.chunk(choice, piece)) is not None:
                    chunks.append(base | self._chunk(made))
            await stream.events(chunks)
        if self._asked.include_usage:
            await stream.events([base | {"choices": [], "usage": self._usage()}])

    async def _take(self, call: Call, wait_s: float | None = None) -> dict[int, Piece]:
        """Return what is new, as far as it is to be shown; ApiError where a choice ended without an answer."""
        pieces = await call.take(wait_s)
        for choice, piece in pieces.items():
            require_answer(piece)
            if self._asked.only_prompt:
                piece.drop_answer()
            self._num_made[choice] += len(piece.token_ids)
            if piece.end is not None:
                self._num_cached[choice] = piece.end.cached_tokens
        return pieces

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        if self._asked.continuous_usage:
            return {"choices": [choice], "usage": self._usage()}
        return {"choices": [choice], "usage": None} if self._asked.include_usage else {"choices": [choice]}

    def _usage(self) -> dict[str, Any]:
        """Return the usage so far; a prompt counts once, however many answers it gets."""
        n = self._asked.n
        return usage_of(sum(self._prompt_lens[::n]), sum(self._num_made), sum(self._num_cached[::n]))

    def _head(self, kind: str) -> dict[str, Any]:
        return head(kind, self._request_id, self._setup.served_name)


def _text_of(service: Service, asked: Asked, text: str | None, add: Add) -> str:
    """Return the text of a prompt where it is needed: for an echo, or to parse what follows it."""
    if text is not None:
        return text
    return service.tokenizer.decode(add.prompt) if asked.echo and service.tokenizer is not None else ""


def _waiting(call: Call) -> str:
    """Return what a stream says while nothing comes."""
    if not call.progress:
        return "waiting"
    progress = [call.progress[choice] for choice in sorted(call.progress)]
    return "prefill " + ", ".join(f"{each.num_computed}/{each.prompt_len}" for each in progress)
