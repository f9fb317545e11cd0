"""Groups that cannot work together end soon, and both say why."""

import logging

import pytest
import torch
import torch.distributed as dist

from helix.config import HelixConfig, TransferConfig
from helix.transfer import meeting
from helix.transfer.channel import ChannelLost, Listener
from helix.transfer.meeting import Group
from parallel.launch import Launch
from parallel.layout import Layout
from tests.helix.transfer.worlds import make_llm


def refused_body(ports, path, layout, *_):
    """The last prefill rank has another secret."""
    mine = {"secret": "another secret, as long"} if dist.get_rank() == dist.get_world_size() - 1 else {}
    with pytest.raises(ValueError) as problem:
        make_llm(path, ports[0], "prefill", layout, connect_timeout_s=60.0, **mine)
    return str(problem.value)


def refusing_body(ports, path, _, layout):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("helix.transfer").addHandler(handler)
    with pytest.raises(ValueError) as problem:
        make_llm(path, ports[0], "decode", layout, connect_timeout_s=8.0)
    logging.getLogger("helix.transfer").removeHandler(handler)
    return str(problem.value), "\n".join(records)


@pytest.mark.slow
def test_groups_whose_secrets_differ_both_name_the_secret(groups, model):
    served, [(problem, log)] = groups(2, 1).run(refused_body, refusing_body, model, (2, 1), (1, 1))
    for told in served:
        assert "refused this rank, whose HELIX_TRANSFER_SECRET differs" in told, "nobody waits for the time-out"
    assert "its HELIX_TRANSFER_SECRET differs from this group's" in log
    assert problem == (
        "0 prefill ranks have come within transfer.connect_timeout_s = 8 s, and 1 with another "
        "HELIX_TRANSFER_SECRET; set HELIX_TRANSFER_SECRET to the same value in both groups"
    )


@pytest.fixture
def split():
    """A prefill rank of a split world."""
    launch = Launch(0, 1, 0, 1, torch.device("cpu"), store=dist.HashStore())
    config = HelixConfig(transfer=TransferConfig(prefill_ranks=1, connect_timeout_s=1.0))
    return Group(config, launch, Layout(1, 1), spec=None, engine=None)


def test_a_prefill_rank_that_no_decode_rank_calls_ends_with_the_setting(split):
    with pytest.raises(ChannelLost, match="transfer.connect_timeout_s = 1 s; raise it"):
        meeting._where_to_go(split)


def test_the_parts_of_a_split_world_find_each_other_through_its_store(split):
    listener = Listener("127.0.0.1", 0, b"made for this run")
    meeting._announce(split, listener, b"made for this run")
    listener.close()
    assert meeting._where_to_go(split) == ("127.0.0.1", listener.port, b"made for this run")
