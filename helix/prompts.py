"""From a request to what can run: what a prompt must be, its limits, its seed; what is said of one that cannot."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np

from parallel.placement import BlockCyclic

from .checks import plain_number
from .commands import Add, Refuse, encode
from .grammar.compiling import GrammarCompiler
from .messages import plain_messages
from .request import Request
from .sampling import SEED_LIMIT, SamplingParams

Prompt = str | Sequence[int] | Request | Mapping[str, Any]
MAX_SCORES = 1 << 22
"""Log-probabilities of one prompt, which every rank keeps until its request ends."""
# What apply_chat_template takes for itself, and a template never sees.
_OWN_ARGUMENTS = (
    "conversation", "messages", "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


class TooLong(ValueError):
    """A prompt, or what is to follow it, is longer than the model or the cache takes."""


def as_request(prompt: Prompt) -> Request:
    """Return the request that a prompt stands for: text, token ids, a mapping with either, or itself.

    One with an error for anything else.
    """
    if isinstance(prompt, Request):
        return prompt
    if isinstance(prompt, str):
        return Request(prompt=prompt)
    if isinstance(prompt, Mapping):
        if len(prompt) == 1 and set(prompt) <= {"prompt", "prompt_token_ids"}:
            return Request(**prompt)
        return Request(error=f"a prompt that is a dict has prompt or prompt_token_ids alone, not {list(prompt)}")
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(ids, Sequence) and not isinstance(ids, bytes):
        return Request(prompt_token_ids=list(ids))
    return Request(error=f"a prompt is text, token ids or a Request, not a {type(prompt).__name__}")


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Return the list of prompts that an argument stands for: a text, ids, a mapping or a request alone is one.

    So is what is no list and no prompt, and would be taken for one of its members or bytes; it fails.
    """
    if isinstance(prompts, str | Request | bytes | Mapping | Set):
        return [prompts]
    given: Any = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    is_one = isinstance(given, Sequence) and len(given) > 0 and all(type(plain_number(token)) is int for token in given)
    return [list(given)] if is_one else given


class TokenSpace(Protocol):
    """What a prompt must fit: a model's spec, say."""

    @property
    def vocab_size(self) -> int:
        """Ids below it are tokens."""

    @property
    def max_position(self) -> int:
        """Tokens that the model takes."""


class PromptReader:
    """Turns requests into token ids for one model; the same on every rank.

    Args:
        spec: the model's.
        tokenizer: a transformers tokenizer, or None: prompts are then token ids.
    """

    def __init__(self, spec: TokenSpace, tokenizer: Any) -> None:
        self._spec, self._tokenizer = spec, tokenizer

    def token_ids(self, request: Request) -> list[int]:
        """Return a request's prompt.

        Raises:
            ValueError: in one line, why it cannot run: not one prompt, empty, too long (``TooLong``), or ids outside
                the vocabulary.
        """
        ids = self._read(request)
        vocab, limit = self._spec.vocab_size, self._spec.max_position
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        wrong = next((token for token in ids if not 0 <= token < vocab), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab}")
        if len(ids) >= limit:
            raise TooLong(f"the prompt has {len(ids)} tokens; the model takes at most {limit - 1}")
        return ids

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._spec.vocab_size

    def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of words, as they begin a text and, where that is of as many tokens, after a space.

        Raises:
            ValueError: without a tokenizer, or for a word of which it makes ids outside the vocabulary.
        """
        found: list[tuple[int, ...]] = []
        if words and self._tokenizer is None:
            raise ValueError(f"sampling.bad_words = {list(words)} needs a tokenizer, but the model folder has none")
        for word in words:
            plain, spaced = (
                tuple(self._tokenizer(space + word.lstrip(), add_special_tokens=False)["input_ids"])
                for space in ("", " ")
            )
            found += [plain] if plain else []
            if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
                found.append(spaced)
        if any(token >= self.vocab_size for ids in found for token in ids):
            raise ValueError(
                f"sampling.bad_words = {list(words)} has tokens outside the vocabulary of {self.vocab_size}"
            )
        return tuple(found)

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
        request.check()
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        if self._tokenizer is None:
            name = "messages" if request.prompt is None else "prompt"
            raise ValueError(f"{name} needs a tokenizer, but the model folder has none; use prompt_token_ids")
        if request.prompt is None:
            return list(self._tokenizer(self.render(request), add_special_tokens=False)["input_ids"])
        ids = list(self._tokenizer(request.prompt, add_special_tokens=not request.is_rendered)["input_ids"])
        bos, text = self._tokenizer.bos_token_id, self._tokenizer.bos_token
        is_doubled = bos is not None and ids[:2] == [bos, bos] and not request.prompt.startswith(text * 2)
        return ids[is_doubled:]  # the text begins with the token that the tokenizer adds

    def render(self, request: Request) -> str:
        """Return the text that the chat template makes of a request's messages; ValueError says why it makes none."""
        if self._tokenizer is None:
            raise ValueError("messages needs a tokenizer, but the model folder has none; use prompt_token_ids")
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError("messages needs a chat template, but the model's tokenizer has none; use prompt")
        messages = plain_messages(request.messages or (), str(self._tokenizer.chat_template))
        arguments = {"add_generation_prompt": not request.template.get("continue_final_message")} | request.template
        for name in _OWN_ARGUMENTS:
            if name in arguments:
                raise ValueError(f"{name} is no argument for a chat template; leave it out")
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
        except Exception as error:  # a template is the model's own program: it may raise anything
            raise ValueError(f"the chat template refused messages: {error}") from error


@dataclass(frozen=True)
class Limits:
    """What one sequence can take.

    Attributes:
        max_position: tokens that the model takes.
        num_pages: of each KVP rank.
        max_logprobs: likely tokens that may be asked for beside each of its own.
    """

    max_position: int
    placement: BlockCyclic
    num_pages: int
    max_logprobs: int

    def fits(self, length: int) -> bool:
        """Return whether empty pools can hold a sequence of so many tokens."""
        return -(-self.placement.num_blocks(length) // self.placement.kvp) <= self.num_pages

    @property
    def num_tokens(self) -> int:
        """Tokens that the pools hold in all."""
        return self.num_pages * self.placement.kvp * self.placement.block_size


class Settled(NamedTuple):
    """An encoded command, and how many prompt tokens it adds; 0 where it refuses a request."""

    data: bytes
    prompt_len: int


class Preparer:
    """Settles on rank 0, from any thread, everything about a request that can fail or that ranks could see differently.

    Args:
        prompts: reads its prompt.
        limits: what it may take.
        has_tokenizer: whether text can be made, and a stop string be found in it.
        end_of_turn_ids: tokens that end the answer to messages, beside those that end every output.
        grammars: compiles what answers must be.
        admit: takes out of a command what rank 0 alone keeps.
    """

    def __init__(
        self,
        prompts: PromptReader,
        limits: Limits,
        *,
        has_tokenizer: bool,
        end_of_turn_ids: Sequence[int] = (),
        grammars: GrammarCompiler,
        admit: Callable[[Add], Add] = lambda add: add,
    ) -> None:
        self.limits, self.end_of_turn_ids = limits, list(end_of_turn_ids)
        self._prompts, self._has_tokenizer = prompts, has_tokenizer
        self.grammars, self.admit = grammars, admit
        self._entropy, self._num_seeded = secrets.randbelow(SEED_LIMIT), count()

    def is_quick(self, prompt: Prompt, sampling: SamplingParams) -> bool:
        """Return whether ``settle`` would not wait for a compiler, which is begun where it would."""
        own = prompt.sampling if isinstance(prompt, Request) else None
        asked = (own or sampling).structured_outputs
        try:
            return not asked or self.grammars.begin(asked).done()
        except ValueError:  # settle says what
            return True

    def settle(self, index: int, prompt: Prompt, sampling: SamplingParams) -> Settled:
        """Return the command that adds a prompt's request, or refuses it; ``sampling`` where it has none."""
        request = as_request(prompt)
        try:
            add = self.admit(self.prepare(index, request, request.sampling or sampling))
            return Settled(encode(add), add.prompt_len)
        except ValueError as problem:
            error = str(problem).encode("utf-8", "backslashreplace").decode()
            return Settled(encode(Refuse(index, _name(request), error)), 0)

    def prepare(self, index: int, request: Request, sampling: SamplingParams) -> Add:
        """Return the command that adds a request; ValueError says in one line why it cannot run."""
        token_ids, limits = self._prompts.token_ids(request), self.limits
        sampling = replace(sampling)  # checked again: a caller may have changed it since it was made
        self._check_logprobs(sampling, len(token_ids))
        is_answer = request.messages is not None or request.is_rendered
        if is_answer and self.end_of_turn_ids and not sampling.ignore_eos:
            sampling = replace(sampling, stop_token_ids=[*sampling.stop_token_ids, *self.end_of_turn_ids])
        self._check_biases(sampling)
        most = limits.num_tokens + 1 if sampling.max_tokens is None else len(token_ids) + sampling.max_tokens
        max_len = min(max(most, len(token_ids) + 1), limits.max_position)
        if not limits.fits(max_len - 1):
            raise TooLong(
                f"{len(token_ids)} prompt tokens and sampling.max_tokens = {sampling.max_tokens} need more than the "
                f"{limits.num_tokens} tokens that cache.num_pages = {limits.num_pages} pages a rank hold"
            )
        if sampling.stop and not self._has_tokenizer:
            raise ValueError(f"sampling.stop = {sampling.stop} needs a tokenizer, but the model folder has none")
        asked = sampling.structured_outputs
        return Add(
            index,
            _name(request),
            token_ids=np.array(token_ids, "<i4").tobytes(),
            sampling=sampling,
            seed=self.new_seed() if sampling.seed is None else sampling.seed,
            max_len=max_len,
            cache_salt=request.cache_salt,
            retention=request.retention,
            bad_word_ids=self._prompts.bad_word_ids(sampling.bad_words),
            priority=request.priority,
            grammar=self.grammars.compile(asked) if asked else b"",
        )

    def new_seed(self) -> int:
        """Return a seed that no other request has."""
        return (self._entropy + next(self._num_seeded)) % SEED_LIMIT

    def _check_logprobs(self, sampling: SamplingParams, num_tokens: int) -> None:
        most = self.limits.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(sampling, name) or 0) > most:
                raise ValueError(
                    f"sampling.{name} = {getattr(sampling, name)} exceeds scheduler.max_logprobs = "
                    f"{most}; raise that, or ask for fewer"
                )
        num_scores = 0 if sampling.prompt_logprobs is None else num_tokens * (1 + sampling.prompt_logprobs)
        if num_scores > MAX_SCORES:
            raise ValueError(
                f"sampling.prompt_logprobs = {sampling.prompt_logprobs} of {num_tokens} prompt tokens makes "
                f"{num_scores} values, at most {MAX_SCORES} are kept; ask for fewer, or score parts of the prompt"
            )

    def _check_biases(self, sampling: SamplingParams) -> None:
        vocab = self._prompts.vocab_size
        wrong = next((token for token in sampling.logit_bias if token >= vocab), None)
        if wrong is not None:
            raise ValueError(f"sampling.logit_bias names token id {wrong}, which is outside the vocabulary of {vocab}")


def _name(request: Request) -> bytes | None:
    return None if request.id is None else request.id.encode("utf-8", "surrogatepass")
