"""What a prefill rank writes of a prompt, without ranks; see test_transfer.py as well."""

from types import SimpleNamespace

import numpy as np

from helix.transfer.regions import Side
from helix.transfer.sender import Sender, Sending
from parallel.layout import Layout


class Peer:
    """A receiver that keeps what it was to be written."""

    def __init__(self, rank):
        self.rank, self.written = rank, []

    def write(self, blocks, source_pages, target_pages, tokens):
        self.written.append([*zip(blocks.tolist(), source_pages.tolist(), target_pages.tolist(), strict=True)])


def test_a_write_names_the_pages_of_its_blocks_and_looks_at_no_others():
    """A prompt of a million tokens has 16,384 of them, a chunk few: a page that is looked at too early is no number."""
    peers = [Peer(0), Peer(1)]
    sender = Sender(
        None, rank=1, channel=None, source=Side(Layout(kvp=2, tpa=1), 16), target=Side(Layout(kvp=1, tpa=2), 16),
        bounded=None, peers=[peers], num_pages=[99], transports=[], prepare=None,
    )  # fmt: skip
    pages = [None] * 9
    seq = SimpleNamespace(blocks=SimpleNamespace(pages=pages, first_owner=0), prompt_len=132)
    ask = SimpleNamespace(pages=np.arange(20, 29), first_owner=0, token_ids=[0] * 132)
    sending = Sending(ask, seq, posted=16)  # what the receiver has cached of it
    for stop, known in ((64, {1: 11, 2: 12, 3: 13}), (132, {4: 14, 5: 15, 6: 16, 7: 17, 8: 18})):
        pages[:] = [known.get(block) for block in range(9)]
        sender._post(sending, stop)
    for peer in peers:
        assert peer.written == [[(1, 11, 21), (3, 13, 23)], [(5, 15, 25), (7, 17, 27)]]
