"""With temperature, speculation keeps the target's distribution: 20,000 runs against exact probabilities."""

from collections import Counter
from collections.abc import Sequence as Many
from itertools import product

import pytest
import torch

from helix.llm import LLM
from helix.request import Request, Sequence
from helix.sampling import SamplingParams
from helix.speculative.verify import num_accepted
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import make_llm, use

PROMPT = [3]  # one token: its first turn drafts already
TEMPERATURE, TOP_K = 4.0, 3
SAMPLES = 20_000
Tokens = tuple[int, ...]


@pytest.mark.parametrize(
    ("drafts", "choices", "count"),
    [([], [], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1, 2], [3, 2], 0), ([2, 2, 2], [2, 1, 2], 1)],
)
def test_a_draft_counts_while_all_before_it_do(drafts: list[int], choices: list[int], count: int) -> None:
    assert num_accepted(drafts, choices) == count


class Likely:
    """Drafts the most likely tokens, as a greedy draft model would, or ones that the target never draws."""

    def __init__(self, next_token: dict[Tokens, int]) -> None:
        self._next_token = next_token

    def draft(self, seqs: Many[Sequence], limits: Many[int]) -> list[list[int]]:
        return [self._draft(tuple(seq.output_ids), limit) for seq, limit in zip(seqs, limits, strict=True)]

    def drop(self, seq: Sequence) -> None:
        pass

    def _draft(self, made: Tokens, limit: int) -> list[int]:
        drafts: list[int] = []
        while len(drafts) < limit and (*made, *drafts) in self._next_token:
            drafts.append(self._next_token[(*made, *drafts)])
        return drafts


def distributions(llm: LLM) -> dict[Tokens, dict[int, float]]:
    """The exact distribution of the next token after every output of up to 2 tokens that can be drawn."""
    known: dict[Tokens, dict[int, float]] = {}
    todo: list[Tokens] = [()]
    for made in todo:
        [output] = llm.generate([[*PROMPT, *made]], SamplingParams(max_tokens=1, logprobs=TOP_K))
        assert output.logprobs is not None
        top = output.logprobs[0].top
        weights = (torch.tensor(list(top.values()), dtype=torch.float64) / TEMPERATURE).softmax(0).tolist()
        known[made] = dict(zip(top, weights, strict=True))
        todo += [(*made, token) for token in top] if len(made) < 2 else []
    return known


def p_value(counts: Counter[Tokens], expected: dict[Tokens, float]) -> float:
    """The chi-squared test: how likely counts are at least so far from what is expected."""
    assert set(counts) <= set(expected), "a token that cannot be drawn was drawn"
    assert min(expected.values()) * SAMPLES > 5, "too few are expected of some outcome"
    total = sum((counts[each] - p * SAMPLES) ** 2 / (p * SAMPLES) for each, p in expected.items())
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(total / 2, dtype=torch.float64)))


@pytest.mark.slow
def test_twenty_thousand_samples_have_the_targets_distribution(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(make_checkpoint(tmp_path_factory.mktemp("verify") / "model", layers=1, hidden=32, heads=4, ffn=64))
    settings = {"max_batch": 500, "num_pages": 1100, "prefill_chunk": 2000}
    plain = make_llm(path, **settings)
    llm = make_llm(path, speculative={"method": "ngram", "max_draft_len": 2}, **settings)
    known = distributions(plain)
    expected = {
        (a, b, c): known[()][a] * known[(a,)][b] * known[(a, b)][c]
        for a, b in product(known[()], range(320))
        if b in known[(a,)]
        for c in known[(a, b)]
    }
    assert len(expected) == TOP_K**3
    likely = {made: max(top, key=lambda token: top[token]) for made, top in known.items()}
    never = {made: next(token for token in range(320) if token not in top) for made, top in known.items()}
    sampling = {"max_tokens": 3, "temperature": TEMPERATURE, "top_k": TOP_K, "ignore_eos": True}

    def draw(drawing: LLM, number: int, first_seed: int) -> Counter[Tokens]:
        asked = [
            Request(prompt_token_ids=PROMPT, sampling=SamplingParams(seed=first_seed + i, **sampling))  # type: ignore[arg-type]
            for i in range(number)
        ]
        return Counter(tuple(output.token_ids) for output in drawing.generate(asked))

    assert p_value(draw(plain, SAMPLES, 0), expected) > 1e-3
    use(llm, Likely(likely))
    counts = draw(llm, SAMPLES, SAMPLES)
    counters = llm.metrics.speculative
    assert counters is not None and 0.3 < counters.accepted / counters.drafted < 0.7
    assert p_value(counts, expected) > 1e-3
    use(llm, Likely(never))
    assert draw(llm, 1000, SAMPLES) == draw(plain, 1000, SAMPLES), "the same seeds draw the same tokens"
    assert llm.metrics.speculative is not None and llm.metrics.speculative.accepted == 0
    biased = Counter({each: round(p * SAMPLES) for each, p in expected.items()})
    biased[min(expected, key=lambda each: expected[each])] += 100
    assert p_value(biased, expected) < 1e-3, "the test cannot tell a bias of 100 samples"
