"""One rank of a layout alone: its own slices, its own heads, and nobody to wait for."""

import pytest
import torch

import helix.lone_rank
from attention.partial import Partials
from helix.config import AttentionConfig, CacheConfig, HelixConfig, ModelConfig, ParallelConfig
from helix.lone_rank import LoneRank
from helix.models.weights import layer_weights, part_of
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint


def test_it_runs_on_the_slices_of_its_rank(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, family="deepseek_v3", layers=2)
    config = HelixConfig(
        model=ModelConfig(path=str(tmp_path), dtype="float32"),
        parallel=ParallelConfig(kvp=3),
        attention=AttentionConfig(split_query_rows=4),
        cache=CacheConfig(num_pages=8, block_size=4),
    )
    llm = LoneRank(config, rank=2, of=3)
    part = part_of(llm.spec, llm.layout, 2)
    for number, layer in enumerate(llm.runner.decoder.layers):
        expected = {role: weight.shape for role, weight in layer_weights(llm.spec, number, part).items()}
        assert {role: tuple(held.shape) for role, held in layer.items()} == expected
    heads, width = llm.spec.num_heads, llm.spec.value_dim
    device = llm.runner.decoder.device
    out, lse = torch.randn(5, heads, width, device=device), torch.zeros(5, heads, device=device)
    own = out[:, slice(*part.out_heads)]
    assert 0 < own.shape[1] < heads and torch.equal(llm.exchange(Partials(out, lse)), own)

    made, gather = [], helix.lone_rank._OthersHeads.__call__
    monkeypatch.setattr(
        helix.lone_rank._OthersHeads,
        "__call__",
        lambda self, mine, **rest: (made.append(mine.shape[1]), gather(self, mine, **rest))[1],
    )
    [output] = llm.generate([[1, 2, 3, 4, 5]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(output.token_ids) == 4 and set(made) == {own.shape[1]}
    assert all(part.vocab[0] <= token < part.vocab[1] for token in output.token_ids)


@pytest.mark.parametrize(("rank", "of", "problem"), [(3, 3, "rank = 3 must be"), (0, 4, "= 3 ranks but 4 started")])
def test_a_place_that_is_none_is_refused(tmp_path, rank, of, problem):
    make_checkpoint(tmp_path, family="llama", layers=1)
    config = HelixConfig(model=ModelConfig(path=str(tmp_path)), parallel=ParallelConfig(kvp=3))
    with pytest.raises(ValueError, match=problem):
        LoneRank(config, rank=rank, of=of)
