"""Records of states bring a prompt to ranks that have other heads and other rings: what follows comes out the same."""

import pytest
import torch

from helix.models.states import States
from helix.states.cache import StateCache
from helix.states.heads import StateHeads
from helix.states.records import StateRecords
from helix.states.reference import advance_reference
from parallel.layout import split_evenly

STATES = States(num_key_heads=2, num_value_heads=6, key_dim=8, value_dim=12, taps=4, eps=1e-6, by_key_head=False)
LAYERS, SLOTS = 2, 3
WEIGHTS = torch.Generator().manual_seed(1)
CONV, RATES, NORM = (torch.randn(shape, generator=WEIGHTS) for shape in ((2 * 16 + 72, 1, 4), (2, 6), (12,)))


class Rank:
    """A rank's states, and what it makes of rows [R, columns of all heads]."""

    def __init__(self, world, rank, max_run):
        first, stop = split_evenly(6, world, rank)
        keys = STATES.key_heads((first, stop))
        q = torch.arange(keys[0] * 8, keys[1] * 8)
        self.value = slice(first, stop)
        conv = torch.cat((q, 16 + q, 32 + torch.arange(first * 12, stop * 12)))
        gate, scores = 104 + torch.arange(first * 12, stop * 12), torch.arange(first, stop)
        self.columns = torch.cat((conv, gate, 176 + scores, 182 + scores))
        self.weights = {"state_conv": CONV[conv], "state_rates": RATES[:, self.value].flatten(), "state_norm": NORM}
        self.cache = StateCache(
            StateHeads.of(STATES, (first, stop)), num_layers=LAYERS, num_slots=SLOTS, max_run=max_run,
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        self.records = StateRecords(self.cache.heads, self.cache.tensors)

    def advance(self, rows, first, slot):
        count = rows.shape[1]
        given = torch.arange(first, first + count), torch.full((count,), slot), torch.tensor([0, count])
        return [
            advance_reference(flat[:, self.columns], *given, states, self.weights, eps=1e-6, max_run=self.cache.max_run)
            for flat, states in zip(rows, self.cache.layers, strict=True)
        ]


@pytest.mark.parametrize("length", [2, 70])
def test_ranks_of_another_layout_go_on_behind_a_record(length):
    rows = torch.randn((LAYERS, length + 5, 188), generator=torch.Generator().manual_seed(2))
    prefill, decode = ([Rank(world, rank, max_run) for rank in range(world)] for world, max_run in ((2, 1), (4, 3)))
    alone = Rank(1, 0, 1)
    expected = alone.advance(rows, 0, 0)
    for source in prefill:
        source.advance(rows[:, :length], 0, 1)
        source.records.write(1, length)
    for target in decode:
        record = target.records.memory[0, 0].view(target.value.stop - target.value.start, -1)
        for source in prefill:
            sent = source.records.memory[0, 1].view(source.value.stop - source.value.start, -1)
            for head in range(max(source.value.start, target.value.start), min(source.value.stop, target.value.stop)):
                record[head - target.value.start] = sent[head - source.value.start]
        target.records.read(0, 2, length)
        for start, stop in ((length, length + 3), (length + 2, length + 4), (length + 4, length + 5)):  # one is drafted
            made = target.advance(rows[:, start:stop], start, 2)
            for ours, theirs in zip(made, expected, strict=True):
                torch.testing.assert_close(ours, theirs[start:stop, target.value], rtol=1e-4, atol=1e-4)
