"""The kernels of a choice do what the rules in PyTorch say."""

from itertools import pairwise

import pytest
import torch

from helix import choose_kernels, penalty_kernels
from helix.choice import RowSettings, Rules, choose, scores
from helix.penalty_kernels import count_tokens, penalise
from helix.sampling import SamplingParams
from helix.token_counts import IN_PROMPT
from tests.helix.sampling.rows import CPU, KERNELS_ON, chosen_by_kernels, kernel_logits, make_batch, random_logits


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_best_score_of_all_slices_is_that_of_the_whole(shards: int) -> None:
    params = [SamplingParams(temperature=row % 3) for row in range(30)]
    logits, settings = random_logits(30, 1001), make_batch(params).settings
    bounds = [1001 * shard // shards for shard in range(shards + 1)]
    parts = [scores(logits[:, a:b], settings, a) for a, b in pairwise(bounds)]
    chosen = choose(logits, settings)
    assert torch.equal(torch.cat(parts, 1).argmax(-1), chosen)
    floats, integers = settings.floats.to(KERNELS_ON), settings.integers.to(KERNELS_ON)
    keys = [
        choose_kernels.best_keys(logits[:, a:b].to(KERNELS_ON), floats, integers, a, 1000) for a, b in pairwise(bounds)
    ]
    assert torch.equal(1000 - (torch.stack(keys).amax(0) & 0xFFFFFFFF).cpu(), chosen)


ON_DEVICES = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.3, "top_p": 0.5, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.2, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.001},
]


@pytest.mark.parametrize("kind", ["normal", "tied", "flat", "peaked", "banned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_choose_what_the_rules_say(kind: str, dtype: torch.dtype) -> None:
    for vocabulary in (300, 2500) if KERNELS_ON == "cpu" else (300, 4099, 151_552):
        params = [SamplingParams(**ON_DEVICES[row % len(ON_DEVICES)]) for row in range(18)]
        settings = RowSettings.of(Rules(params), list(range(18)), [vocabulary] * 18, CPU)
        logits = kernel_logits(kind, 18, vocabulary).to(dtype)
        got = chosen_by_kernels(logits, settings, KERNELS_ON)
        assert torch.equal(got, choose(logits, settings))
        alone = RowSettings.of(Rules(params[3:4]), [3], [vocabulary], CPU)
        assert torch.equal(chosen_by_kernels(logits[3:4], alone, KERNELS_ON), got[3:4])


def test_kernels_penalise_and_count_as_pytorch_does() -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 3, (4, 3000), generator=generator, dtype=torch.int32)
    counts[:, ::5] |= IN_PROMPT
    slots, tokens = torch.tensor([2, -1, 0, 0]), torch.tensor([105, 104, 99, 103])
    amounts = torch.tensor([[1.3, 1, 0.7, 0.7], [0.5, 0, 0, 0], [0.1, 0, -0.3, -0.3]], dtype=torch.float64)
    drafts = torch.tensor([[-1, -1], [7, 7], [103, 104], [103, 103]])
    logits = random_logits(4, 3000)
    want = penalise(logits, counts, slots, amounts, drafts, 100)
    on = [each.to(KERNELS_ON) for each in (logits, counts, slots, amounts, drafts)]
    if KERNELS_ON == "cpu":
        out = torch.empty_like(logits)
        given = (logits, out, counts, slots, amounts, drafts)
        penalty_kernels._penalise_kernel[(4, 2)](*given, 3000, 3000, 4, 2, 100, CHUNK=2048)
        penalty_kernels._count_kernel[(4,)](counted := counts.clone(), tokens, slots, 3000, 100)
    else:
        out = penalise(*on, 100).cpu()
        count_tokens(on[1], tokens.to(KERNELS_ON), slots.to(KERNELS_ON), 100)
        counted = on[1].cpu()
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    count_tokens(counts, tokens, slots, 100)
    assert torch.equal(counted, counts)
