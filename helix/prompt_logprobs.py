"""Log-probabilities of the tokens of prompts, made while their chunks are computed, each rank from its own logits.

The row of a prompt's token says how likely the next one is. Of few rows at a time each rank makes its slice of the
logits, and keeps of it what all ranks need: the sum of its probabilities, the next token's logit, and its own most
likely tokens. Those are gathered once for a step, so that the logits of a chunk, whole or sliced, are never there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from parallel.collectives import all_gather

from .logprobs import SampledTokens, best, in_order, on_host
from .models.decoder import Decoder
from .request import Chunk, Sequence, TokenLogprobs
from .upload import upload

MAX_LOGITS = 1 << 23
"""Logits of a slice that are there at once."""


def rows_to_score(chunk: Chunk) -> range:
    """Return the positions of a chunk whose rows say how likely a token of the prompt is that is not scored yet."""
    if not chunk.seq.scores_prompt:
        return range(0)
    return range(max(chunk.start, chunk.seq.num_scored - 1), min(chunk.stop, chunk.seq.prompt_len - 1))


class PromptScorer:
    """Scores the prompts of a decoder's steps.

    Args:
        decoder: the rank's model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._vocab, self._vocab_size = decoder.part.vocab, decoder.spec.vocab_size
        widest = -(-self._vocab_size // decoder.grid.world_size)
        self._rows_at_once = max(MAX_LOGITS // widest, 1)
        self._scored: list[tuple[list[Sequence], SampledTokens]] = []

    def score(self, chunks: Many[Chunk], hidden: Tensor, stops: Many[int]) -> None:
        """Score what a step computes of prompts that want it; ``take`` has the result.

        Collective over the world, where any chunk has rows to score.

        Args:
            chunks: the step's.
            hidden: [R, h], final hidden states of all their rows.
            stops: where the rows of each chunk end.
        """
        rows: list[int] = []
        targets: list[int] = []
        seqs: list[Sequence] = []
        for chunk, stop in zip(chunks, stops, strict=True):
            positions = rows_to_score(chunk)
            first = stop - chunk.num_rows - chunk.start
            rows += range(first + positions.start, first + positions.stop)
            targets += chunk.seq.token_ids[positions.start + 1 : positions.stop + 1] if positions else []
            seqs += [chunk.seq] * len(positions)
        if seqs:
            num = min(max(seq.sampling.prompt_logprobs or 0 for seq in seqs), self._vocab_size)
            sent = upload({"rows": np.array(rows, np.int64), "targets": np.array(targets, np.int64)}, hidden.device)
            self._scored.append((seqs, self._score(hidden[sent["rows"]], sent["targets"], num)))

    def clear(self) -> None:
        """Forget what was scored and not taken."""
        self._scored = []

    def take(self) -> list[tuple[Sequence, TokenLogprobs]]:
        """Return what was scored since the last call, in the order of the prompts' tokens; waits for the device."""
        scored, self._scored = self._scored, []
        found: list[tuple[Sequence, TokenLogprobs]] = []
        for seqs, tokens in scored:
            found += zip(seqs, on_host(tokens, [seq.sampling.prompt_logprobs or 0 for seq in seqs]), strict=True)
        return found

    def warm_up(self, hidden: Tensor) -> None:
        """Take the memory that scoring takes at most, of one hidden state [1, h]. Collective over the world."""
        self._score(hidden.expand(self._rows_at_once, -1), hidden.new_zeros(self._rows_at_once, dtype=torch.int64), 1)

    @torch.inference_mode()
    def _score(self, hidden: Tensor, targets: Tensor, num: int) -> SampledTokens:
        """Return the log-probabilities of tokens [R] and ``num`` alternatives, from hidden states [R, h] before."""
        parts = [
            self._of_slice(*some, num)
            for some in zip(hidden.split(self._rows_at_once), targets.split(self._rows_at_once), strict=True)
        ]
        group = self._decoder.grid.world_group
        sums = all_gather(torch.cat([part[0] for part in parts]), group)  # [N, R, 2]
        log_total, logit = sums[..., 0].logsumexp(0), sums[..., 1].amax(0)
        if not num:
            return SampledTokens(token_ids=targets, logprobs=logit - log_total)
        keys = all_gather(torch.cat([part[1] for part in parts]), group).transpose(0, 1).flatten(1)  # [R, N * num]
        top_ids, top_logits = in_order(keys.topk(num, dim=-1).values, self._vocab_size)
        return SampledTokens(
            token_ids=targets,
            logprobs=logit - log_total,
            top_ids=top_ids,
            top_logprobs=top_logits - log_total[:, None],
        )

    def _of_slice(self, hidden: Tensor, targets: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return of this rank's logits the log of the sum of their exponents and the target's [r, 2]; keys [r, num]."""
        first, stop = self._vocab
        logits = self._decoder.local_logits(hidden).float()
        mine = (targets >= first) & (targets < stop)
        logit = logits.gather(1, (targets - first).clamp(0, stop - first - 1)[:, None])[:, 0]
        sums = torch.stack((logits.logsumexp(-1), logit.masked_fill(~mine, -math.inf)), -1)
        if not num:
            return sums, sums.new_empty((len(sums), 0), dtype=torch.int64)
        return sums, best(logits, num, first=first, vocab_size=self._vocab_size)
