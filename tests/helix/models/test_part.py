"""Which slices of a model a rank keeps, and which layouts cannot split it."""

from dataclasses import replace

import pytest

from helix.models.decoder import part_of
from helix.models.spec import load_spec
from parallel.grid import Layout
from scripts.make_checkpoint import make_checkpoint


@pytest.mark.parametrize("size", ["ffn_size", "vocab_size"])
def test_a_world_larger_than_what_it_splits_is_refused(tmp_path, size):
    spec = load_spec(str(make_checkpoint(tmp_path / "model", family="llama")))
    layout = Layout(kvp=2, tpa=2, tpf=0, ep=1)
    part_of(spec, layout, 3)
    with pytest.raises(ValueError, match=f"4 ranks cannot split a model of .*{size} 3"):
        part_of(replace(spec, **{size: 3}), layout, 3)
