"""Which slices of a model a rank keeps, and which layouts cannot split it."""

from dataclasses import replace

import pytest

from helix.models.families import load_spec
from helix.models.kinds import FULL_KIND, Kind
from helix.models.weights import layer_weights, part_of
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


@pytest.mark.parametrize(("kvp", "tpa"), [(1, 2), (4, 1), (4, 2), (1, 8)])
def test_layers_with_a_window_split_their_heads_over_all_ranks(tmp_path, kvp, tpa):
    window = Kind("window", 5)
    plain = load_spec(str(make_checkpoint(tmp_path / "model", family="llama", heads=8, kv_heads=4)))
    spec, ranks = replace(plain, kinds=(window, FULL_KIND)), range(kvp * tpa)
    parts = [part_of(spec, Layout(kvp=kvp, tpa=tpa), rank) for rank in ranks]
    mine = [part.for_kind(window) for part in parts]
    assert [head for part in mine for head in range(*part.q_heads)] == list(range(8))
    assert all(part.out_heads == part.q_heads for part in mine)
    assert all(range(*part.kv_heads) == range(part.q_heads[0] // 2, -(-part.q_heads[1] // 2)) for part in mine)
    assert [part.for_kind(FULL_KIND) for part in parts] == parts
    columns = [layer_weights(spec, layer, parts[-1])["o"].shape[1] // 16 for layer in (0, 1)]
    assert columns == [8 // len(ranks), 8 // len(ranks)]
    assert (spec.window, spec.num_cached_layers, spec.layers_of("window")) == (5, 1, (0,))


def test_ranks_that_cannot_split_the_heads_of_windows_are_refused(tmp_path):
    plain = load_spec(str(make_checkpoint(tmp_path / "model", family="llama", heads=8, kv_heads=4)))
    spec = replace(plain, kinds=(Kind("window", 5), FULL_KIND))
    with pytest.raises(ValueError, match="3 ranks cannot split the 4 KV heads of llama's layers with a window"):
        part_of(spec, Layout(kvp=3), 0)
    with pytest.raises(ValueError, match="kinds of 1 layers are given, the model has num_layers = 2"):
        replace(spec, kinds=(FULL_KIND,))
    with pytest.raises(ValueError, match="windows of 4, 5 tokens; Helix computes one size"):
        replace(spec, kinds=(Kind("window", 4), Kind("window", 5)))
