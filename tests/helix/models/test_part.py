"""Which slices of a model a rank keeps, and which layouts cannot split it."""

from dataclasses import replace

import pytest

from helix.models.spec import load_spec
from helix.models.weights import part_of
from parallel.layout import Layout
from scripts.make_checkpoint import make_checkpoint


@pytest.mark.parametrize("size", ["ffn_size", "vocab_size"])
def test_a_world_larger_than_what_it_splits_is_refused(tmp_path, size):
    spec = load_spec(str(make_checkpoint(tmp_path / "model", family="llama")))
    layout = Layout(kvp=2, tpa=2, tpf=0, ep=1)
    part_of(spec, layout, 3)
    with pytest.raises(ValueError, match=f"4 ranks cannot split a model of .*{size} 3"):
        part_of(replace(spec, **{size: 3}), layout, 3)


def test_experts_are_split_ep_ways_and_each_of_them_tpf_ways(tmp_path):
    spec = load_spec(str(make_checkpoint(tmp_path / "model", family="qwen3_moe", experts=6, expert_ffn=72)))
    parts = [part_of(spec, Layout(kvp=2, tpa=2, ep=2), rank) for rank in range(4)]
    assert [part.experts for part in parts] == [(0, 3), (3, 6)] * 2
    assert [part.expert_ffn for part in parts] == [(0, 36)] * 2 + [(36, 72)] * 2
    assert [part.ffn for part in parts] == [(0, 40), (40, 80), (80, 120), (120, 160)]  # of the layers without experts
    with pytest.raises(ValueError, match=r"parallel.ep = 8 exceeds the model's 6 experts"):
        part_of(spec, Layout(kvp=8, ep=8), 0)
    few = replace(spec, experts=replace(spec.experts, ffn_size=1))
    with pytest.raises(ValueError, match=r"parallel.tpf = 4 exceeds the 1 units of the model's experts; raise ep"):
        part_of(few, Layout(kvp=4), 0)


def test_shared_experts_of_fewer_units_than_ranks_are_refused(tmp_path):
    spec = load_spec(str(make_checkpoint(tmp_path / "model", family="deepseek_v3", expert_ffn=3)))
    with pytest.raises(ValueError, match="4 ranks cannot split a model of .*units of shared experts 3: each needs one"):
        part_of(spec, Layout(kvp=4, tpa=1, tpf=1, ep=4), 0)
