"""What is written of layers of bounded memory, for any two layouts, without ranks; see test_transfer.py as well."""

import itertools

import numpy as np
import torch

from helix.cache.pages import PagedCache, page_layout
from helix.cache.windows import WindowPages
from helix.models.families import spec_of
from helix.models.weights import part_of
from helix.transfer.protocol import Pool
from helix.transfer.stores import Windows
from parallel.layout import Layout

SHAPE = {
    "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "head_dim": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 99, "max_position_embeddings": 999,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": True, "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def test_every_head_of_a_window_is_written_by_one_rank_to_all_that_hold_it():
    """For any two layouts: heads of windows are cut over all ranks, those of full layers by TPA alone."""
    cpu = torch.device("cpu")
    spec = spec_of(SHAPE, "here")

    def maps(layout):
        for rank in range(layout.world_size):
            first, stop = part_of(spec, layout, rank).window_kv_heads
            pages = PagedCache(
                page_layout(spec, stop - first, 16, torch.float32), num_layers=1, num_pages=2, device=cpu
            )
            windows = Windows(spec, pages, WindowPages(24, 16, 2), 16)
            pool = Pool(b"", np.array([1]), pages.pages.stride(1) * pages.pages.element_size(), 2, "DRAM", 0)
            yield windows, windows.map(pool, layout, rank), rank

    made = [Layout(kvp=kvp, tpa=tpa) for kvp, tpa in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4))]
    for source, target in itertools.product(made, made):
        for _, theirs, _ in maps(target):
            senders = [
                head
                for windows, ours, rank in maps(source)
                if windows.sends(source, rank)
                for head in range(max(ours.heads[0], theirs.heads[0]), min(ours.heads[1], theirs.heads[1]))
            ]
            assert sorted(senders) == list(range(*theirs.heads)) != []
