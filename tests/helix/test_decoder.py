import pytest
import torch

from attention.reference import ReferenceAttention
from helix.models.decoder import Decoder
from helix.models.rope import RopeSpec
from helix.models.spec import ModelSpec
from helix.models.weights import part_of
from parallel.grid import HelixGrid
from parallel.layout import Layout


def glm_like(**changes) -> ModelSpec:
    """The proportions of a GLM-4-9B layer, an eighth of its width."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 512,
        "num_heads": 32,
        "num_kv_heads": 2,
        "head_dim": 16,
        "ffn_size": 1712,
        "vocab_size": 1000,
    }
    return ModelSpec(
        family="glm",
        rms_eps=1e-5,
        qkv_bias=True,
        qk_norm=False,
        tied_embeddings=False,
        max_position=1024,
        rope=RopeSpec(torch.ones(4), 1.0, True, 8),
        **(sizes | changes),
    )


@pytest.mark.parametrize("layout", [Layout(), Layout(kvp=2), Layout(kvp=2, tpa=2), Layout(kvp=4, tpa=2), Layout(tpa=8)])
def test_weight_bytes_per_rank_follow_the_formula(layout):
    """Q and K, V of the TPA slice, O and the FFN over all ranks: the output projection is row-parallel over N."""
    spec = glm_like()
    h, D, Q, K, F, N = 512, 16, 32, 2, 1712, layout.world_size
    kv_heads = -(-K // layout.tpa)
    weights = h * (Q // layout.tpa) * D + h * (Q // N) * D + 2 * h * kv_heads * D + 3 * h * F // layout.tpf
    found = []
    for rank in range(N):
        grid = HelixGrid(layout, rank, None, None)
        decoder = Decoder(spec, grid, dtype=torch.bfloat16, device=torch.device("cpu"), attention=ReferenceAttention())
        found.append(decoder.layer_bytes)
    assert sum(found) / N == pytest.approx(weights * spec.num_layers * 2, rel=0.01)
    assert max(found) - min(found) <= 3 * h * 64 * spec.num_layers * 2  # ranges of units begin at multiples of up to 64


def test_parts_of_all_ranks_tile_the_model():
    spec, layout = glm_like(ffn_size=1711, vocab_size=997), Layout(kvp=4, tpa=2)
    parts = [part_of(spec, layout, rank) for rank in range(8)]
    for name, total in (("out_heads", 32), ("ffn", 1711), ("vocab", 997)):
        ranges = [getattr(part, name) for part in parts]
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == total


def test_experts_of_a_dense_model_are_refused():
    with pytest.raises(ValueError, match="parallel.ep = 2, but glm models have no experts"):
        part_of(glm_like(), Layout(kvp=2, ep=2), 0)
