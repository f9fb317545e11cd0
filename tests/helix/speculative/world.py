"""What the tests of speculation share: drafters that know the answer or never do, and runs beside those without."""

from collections.abc import Sequence as Many
from random import Random
from typing import Any

import torch

from helix.config import (
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from helix.graphs import buckets_up_to
from helix.llm import LLM
from helix.request import Request, RequestOutput, Sequence
from helix.speculative.draft_model import DraftModel
from parallel.symmetric import Faults

VOCAB = 320


class Recorded:
    """Knows each sequence's continuation from a run without speculation; each draft is right with probability p.

    With p = 0 every draft is wrong. ``short`` cuts a draft at a length of its own, so that runs have padding.
    """

    def __init__(self, outputs: Many[RequestOutput], p: float, *, short: bool = False) -> None:
        self._tokens = [output.token_ids for output in outputs]
        self._p, self._short = p, short
        self.running: set[Sequence] = set()

    def draft(self, seqs: Many[Sequence], limits: Many[int]) -> list[list[int]]:
        self.running.update(seqs)
        return [self._draft(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def drop(self, seq: Sequence) -> None:
        self.running.discard(seq)

    def _draft(self, seq: Sequence, limit: int) -> list[int]:
        made = len(seq.token_ids) - seq.prompt_len
        rng = Random(seq.index * 100_003 + made)
        limit = rng.randrange(limit + 1) if self._short else limit
        known = self._tokens[seq.index][made : made + limit]
        return [token if rng.random() < self._p else (token + 1) % VOCAB for token in known]


def make_llm(
    path: str, *, kvp: int = 1, tpa: int = 1, graphs: bool = False, look_ahead: bool = False, **settings: Any
) -> LLM:
    """An LLM of small steps whose ranks compare their decisions, or look ahead where no drafts are due.

    ``graphs`` runs a graph's steps on the CPU too.
    """
    speculative = SpeculativeConfig(**settings.pop("speculative", {}))
    block_size = settings.pop("block_size", 16)
    llm = LLM(
        HelixConfig(
            model=ModelConfig(path=path, dtype="float32"),
            parallel=ParallelConfig(kvp=kvp, tpa=tpa),
            cache=CacheConfig(
                block_size=block_size,
                num_pages=settings.pop("num_pages", 2048 // block_size),
                **settings.pop("cache", {}),
            ),
            scheduler=SchedulerConfig(
                max_batch=settings.pop("max_batch", 8), prefill_chunk=settings.pop("prefill_chunk", 64)
            ),
            speculative=speculative,
            runtime=RuntimeConfig(check_ranks=not look_ahead, graphs=graphs),
        )
    )
    assert not settings
    if graphs and llm.launch.device.type == "cpu":
        llm.runner.faults = Faults(torch.device("cpu"))
        buckets = buckets_up_to(llm.runner.max_batch)
        llm.runner.capture(speculative.schedule.reachable(buckets) if llm.engine.speculator else ())
        drafter = llm.engine.speculator and llm.engine.speculator.drafter
        if isinstance(drafter, DraftModel):
            drafter._runner.faults = llm.runner.faults
            drafter.capture()
    return llm


def use(llm: LLM, drafter: Any) -> LLM:
    """Let another drafter draft."""
    assert llm.engine.speculator is not None
    llm.engine.speculator.drafter = drafter
    return llm


def told(outputs: Many[RequestOutput]) -> list[Any]:
    """All that an output says of its tokens."""
    return [(o.token_ids, o.text, o.finish_reason, o.error, len(o.logprobs or [])) for o in outputs]


def run(llm: LLM, asked: Many[Request | list[int]], sampling: Any = None) -> list[RequestOutput]:
    """Generate, and check that nothing is left behind."""
    outputs = llm.generate(list(asked), sampling)
    cache = llm.engine.scheduler.cache
    assert [cache.num_available(rank) for rank in range(llm.layout.kvp)] == [llm.num_pages] * llm.layout.kvp
    assert all(block.pins == 0 for block in cache.blocks.tree.walk())
    drafter = llm.engine.speculator and llm.engine.speculator.drafter
    for name in ("running", "_indices", "_twins"):
        assert not getattr(drafter, name, None), "a sequence was not dropped"
    if isinstance(drafter, DraftModel):
        assert drafter._pool.num_free(0) == drafter._pool.num_pages, "the draft model's pages were lost"
    return outputs
