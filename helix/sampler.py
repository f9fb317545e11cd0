"""Chooses the tokens of a step on the device, from this rank's slice of the logits: what stands behind a forward.

1. ``prepare``, before the forward: the settings of the rows that choose go to the device in one copy, and the counts of
   their sequences are brought up to date.
2. The forward.
3. ``choose``: biases, penalties and masks on the slice; rows without filters choose by the largest score of all
   slices, so that one key a row travels; where any row has filters the slices are gathered, and all ranks choose alike.

Behind a captured forward the last of these is captured too (``choice_graphs.py``), where settings are of a fixed size.
Nothing of it needs the tokens of the step before on the host: a penalty's counts and the last token stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from parallel.sharded_argmax import ShardedArgmax

from .bans import banned
from .choice import RowSettings, Rules, choose, scores
from .choose_kernels import best_keys
from .logprobs import SampledTokens, with_logprobs
from .models.decoder import Decoder
from .prompt_logprobs import PromptScorer
from .request import MASK_BITS, Chunk, RequestOutput, Sequence
from .sampling import SamplingParams
from .token_counts import TokenCounts
from .upload import Arrays, upload


@dataclass(frozen=True, eq=False)
class Penalised:
    """Penalties of R rows; see ``TokenCounts.penalised``. ``counting`` [R] are the slots whose choice is counted."""

    slots: Tensor
    amounts: Tensor
    drafts: Tensor
    counting: Tensor

    @classmethod
    def of(cls, sent: Mapping[str, Tensor]) -> Penalised:
        """Return what was sent by name."""
        return cls(sent["slots"], sent["amounts"], sent["drafts"], sent["counting"])


@dataclass(frozen=True, eq=False)
class Choices:
    """How the R rows of a step that choose do so, on the device.

    Attributes:
        added: rows, local ids and values that are added to logits; None where there are none.
        banned: rows and local ids that are ruled out where ``values`` are -inf (else inf), pairs may repeat.
        allowed: rows [M] that may choose some tokens alone, and the words [M, W'] of their masks that this rank's
            slice of the vocabulary begins and ends in.
        num_logprobs: the most alternatives that any row asks for; None where no row wants log-probabilities.
    """

    settings: RowSettings
    added: tuple[Tensor, Tensor, Tensor] | None
    banned: tuple[Tensor, Tensor, Tensor] | None
    allowed: tuple[Tensor, Tensor] | None
    penalised: Penalised | None
    num_logprobs: int | None


@dataclass(frozen=True, eq=False)
class FixedChoices:
    """How the R rows of a step that choose do so, on the host, where all of it is of a size that R alone decides.

    Attributes:
        arrays: what ``RowSettings`` and ``Penalised`` hold, by name; right until the sampler prepares another step.
        filters: whether any row has them; equal on all ranks.
    """

    arrays: Arrays
    filters: bool


class Sampler:
    """Chooses tokens from a decoder's logits.

    Args:
        decoder: the rank's model.
        max_batch: batch slots.
        eos_token_ids: what ends a sequence, for ``min_tokens``.

    Attributes:
        scorer: makes the log-probabilities of prompts.
    """

    def __init__(self, decoder: Decoder, *, max_batch: int, eos_token_ids: Collection[int]) -> None:
        self._decoder, self._eos = decoder, tuple(eos_token_ids)
        self._vocab, self._vocab_size = decoder.part.vocab, decoder.spec.vocab_size
        self._argmax = ShardedArgmax(
            decoder.grid.world_group, vocab=self._vocab, vocab_size=self._vocab_size, device=decoder.device
        )
        self._rules = Rules([])
        self._counts = TokenCounts(max_batch, self._vocab, decoder.device)
        self.scorer = PromptScorer(decoder)
        start, stop = self._vocab
        self._words = slice(start // MASK_BITS, -(-stop // MASK_BITS))
        bits = torch.arange(start, stop, dtype=torch.int32, device=decoder.device)
        self._word_of, self._bit_of = bits // MASK_BITS - start // MASK_BITS, bits % MASK_BITS

    @property
    def sees_all(self) -> bool:
        """True where this rank's slice of the vocabulary is all of it."""
        return self._decoder.grid.world_size == 1

    def prepare(self, chunks: Many[Chunk], last_tokens: Tensor) -> Choices:
        """Return how the rows of a step choose. Before the forward; ``last_tokens`` [max_batch] are those it reads."""
        rows = _choosing(chunks)
        sent = upload(self._arrays(rows), self._decoder.device)
        settings = RowSettings(self._rules, sent["floats"], sent["doubles"], sent["integers"])
        added, ruled_out = self._biases(rows, last_tokens)
        wanted = [each.logprobs for each in self._rules.params if each.logprobs is not None]
        penalised = Penalised.of(sent) if any(each.has_penalties for each in self._rules.params) else None
        return Choices(settings, added, ruled_out, self._allowed(rows), penalised, max(wanted, default=None))

    def prepare_fixed(self, chunks: Many[Chunk]) -> FixedChoices | None:
        """Do what ``prepare`` does; None where anything is of another size: biases, bans, masks, log-probabilities."""
        rows = _choosing(chunks)
        for chunk in chunks:
            if not (chunk.seq.logit_bias is None and chunk.masks is None and chunk.seq.sampling.logprobs is None):
                return None
        return None if self._banned(rows) else FixedChoices(self._arrays(rows), self._rules.filters)

    @torch.inference_mode()
    def choose_fixed(self, local: Tensor, inputs: Mapping[str, Tensor], *, filters: bool) -> Tensor:
        """Return the tokens [R] of rows whose settings are ``inputs``, as ``FixedChoices.arrays``, on the device.

        Collective over the world. ``filters``: rows may have them; logits are gathered then.
        """
        settings = RowSettings(Rules.of_any(filters=filters), inputs["floats"], inputs["doubles"], inputs["integers"])
        return self.choose(local, Choices(settings, None, None, None, Penalised.of(inputs), None)).token_ids

    @torch.inference_mode()
    def choose(self, local: Tensor, choices: Choices) -> SampledTokens:
        """Return the tokens of the rows, from this rank's slice of their logits [R, V_local].

        Collective over the world; equal on all ranks.
        """
        logits, settings = self._adjusted(local, choices), choices.settings
        if settings.rules.filters:
            whole = logits if self.sees_all else self._decoder.gather_logits(logits)
            tokens = choose(whole, settings)
        elif logits.is_cuda:
            first = self._vocab[0]
            tokens = self._argmax.of_keys(
                best_keys(logits, settings.floats, settings.integers, first, self._vocab_size - 1)
            )
        else:
            tokens = self._argmax(scores(logits, settings, self._vocab[0]))
        if choices.penalised is not None:
            self._counts.count(tokens, choices.penalised.counting)
        if choices.num_logprobs is None:
            return SampledTokens(token_ids=tokens)
        return with_logprobs(tokens, self._decoder.gather_logits(local), choices.num_logprobs)

    def warm_up(self) -> None:
        """Run every kernel once for each type of logits, so that none is compiled later. Collective over the world."""
        seq = Sequence(
            index=0, token_ids=[0], prompt_len=1, sampling=SamplingParams(), seed=0, max_len=2,
            output=RequestOutput(None), batch_slot=0,
        )  # fmt: skip
        last_tokens = torch.zeros(1, dtype=torch.int64, device=self._decoder.device)
        logits = self._decoder.local_logits(
            last_tokens.new_zeros((1, self._decoder.spec.hidden_size)).to(self._decoder.dtype)
        )
        # what is penalised, biased or masked is float32; so are penalties of rows beside a biased one
        for given, top_k, presence in product((logits, logits.float()), (0, 1), (0.0, 0.5)):
            seq.sampling = SamplingParams(temperature=1.0, top_k=top_k, presence_penalty=presence)
            self.choose(given, self.prepare([Chunk(seq, 0, 1)], last_tokens))
        self._counts.forget(seq)

    def forget(self, seq: Sequence) -> None:
        """Hold nothing of a sequence that has left."""
        if seq.sampling.has_penalties:
            self._counts.forget(seq)

    def _adjusted(self, local: Tensor, choices: Choices) -> Tensor:
        logits = local
        if choices.added is not None or choices.banned is not None or choices.allowed is not None:
            logits = local.float() if local.dtype != torch.float32 else local.clone()
        if choices.added is not None:
            rows, ids, values = choices.added
            logits[rows, ids] += values
        if choices.banned is not None:
            rows, ids, values = choices.banned
            logits.view(-1).scatter_reduce_(0, rows * logits.shape[1] + ids, values, "amin")
        if choices.penalised is not None:
            each = choices.penalised
            logits = self._counts.penalised(logits, each.slots, each.amounts, each.drafts)
        if choices.allowed is not None:
            places, words = choices.allowed
            may = words[:, self._word_of] >> self._bit_of & 1
            logits[places] = logits[places].masked_fill(may == 0, -math.inf)
        return logits

    def _allowed(self, rows: Many[tuple[Chunk, int]]) -> tuple[Tensor, Tensor] | None:
        """Return the rows that have a mask, and this rank's words of it; None where none has."""
        masks = [(row, chunk.masks[ahead]) for row, (chunk, ahead) in enumerate(rows) if chunk.masks is not None]
        if not masks:
            return None
        places = np.array([row for row, _ in masks], np.int64)
        words = np.stack([mask[self._words] for _, mask in masks])
        sent = upload({"places": places, "words": words}, self._decoder.device)
        return sent["places"], sent["words"]

    def _biases(
        self, rows: Many[tuple[Chunk, int]], last_tokens: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, tuple[Tensor, Tensor, Tensor] | None]:
        """Return what is added and what is banned on this rank; None where nothing is on any: it decides the dtype."""
        start, stop = self._vocab
        device = self._decoder.device
        adding = banning = None
        added = [(row, *bias) for row, (chunk, _) in enumerate(rows) if (bias := chunk.seq.logit_bias) is not None]
        if added:
            ids = np.concatenate([each[1] for each in added])
            values = np.concatenate([each[2] for each in added])
            places = np.repeat([each[0] for each in added], [len(each[1]) for each in added])
            mine = (ids >= start) & (ids < stop)
            arrays = {"rows": places[mine], "ids": ids[mine] - start, "values": values[mine]}
            sent = upload(arrays, device)
            adding = (sent["rows"], sent["ids"], sent["values"])
        out = self._banned(rows)
        if out:
            table = np.array(out, np.int64).T - np.array([[0], [start], [0], [0]])
            table = np.ascontiguousarray(table[:, (table[1] >= 0) & (table[1] < stop - start)])
            row, token, after, slot = upload({"banned": table}, device)["banned"]
            holds = (after < 0) | (last_tokens[slot] == after)
            banning = (row, token, torch.where(holds, -math.inf, math.inf))
        return adding, banning

    def _banned(self, rows: Many[tuple[Chunk, int]]) -> list[tuple[int, int, int, int]]:
        """Return what rows may not choose: row, token id, the token that must stand before it (-1: any), batch slot."""
        return [
            (row, token, after, chunk.seq.batch_slot)
            for row, (chunk, ahead) in enumerate(rows)
            if chunk.seq.sampling.bad_words or chunk.seq.sampling.min_tokens
            for token, after in banned(chunk, ahead, self._eos)
        ]

    def _arrays(self, rows: Many[tuple[Chunk, int]]) -> Arrays:
        """Return the settings of rows, of which the names are those of ``RowSettings`` and ``Penalised``."""
        params = [chunk.seq.sampling for chunk, _ in rows]
        if not self._rules.are_of(params):
            self._rules = Rules(params)
        settings = self._rules.arrays(
            [chunk.seq.seed for chunk, _ in rows], [chunk.stop + ahead for chunk, ahead in rows]
        )
        return {**settings, **self._penalties(rows)}

    def _penalties(self, rows: Many[tuple[Chunk, int]]) -> Arrays:
        longest = max(len(chunk.drafts) for chunk, _ in rows)
        slots, counting = np.full(len(rows), -1), np.full(len(rows), -1)
        amounts, drafts = np.ones((3, len(rows))), np.full((len(rows), longest), -1)
        for row, (chunk, ahead) in enumerate(rows):
            seq, params = chunk.seq, chunk.seq.sampling
            if not params.has_penalties:
                continue
            if ahead == 0:
                made = chunk.stop - seq.prompt_len
                self._counts.bring_up_to_date(seq, made, counts_next=not chunk.drafts)
            slots[row] = seq.batch_slot
            counting[row] = -1 if chunk.drafts else seq.batch_slot
            amounts[:, row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
            drafts[row, :ahead] = chunk.drafts[:ahead]
        return {"slots": slots, "counting": counting, "amounts": amounts, "drafts": drafts}


def _choosing(chunks: Many[Chunk]) -> list[tuple[Chunk, int]]:
    """Return each row that chooses: its chunk, and how many of the drafts stand before it."""
    return [(chunk, ahead) for chunk in chunks for ahead in range(chunk.num_choices)]
