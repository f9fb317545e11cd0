"""Which GPU is a rank's own, told from what the driver and the launcher show."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import parallel.device as device_module
from parallel.device import capability, conflict, host, own_gpu
from parallel.symmetric import can_launch_dependently, shares_memory

CUDA = torch.device("cuda", 0)


@pytest.fixture
def visible(monkeypatch):
    """Pretend that so many GPUs are visible."""

    def see(count, *, hip=None, capability=(9, 4)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return see


@pytest.mark.parametrize(
    ("count", "hip", "gpus"),
    [(4, None, [0, 1, 2, 3]), (8, None, [0, 1, 2, 3]), (1, None, [0] * 4), (2, None, [None] * 4), (0, None, [None] * 4),
     (4, "6.4", [None] * 4)],
)  # fmt: skip
def test_a_rank_takes_its_own_of_all_gpus_or_the_only_one_it_sees(visible, count, hip, gpus):
    visible(count, hip=hip)
    assert [own_gpu(rank, 4) for rank in range(4)] == gpus


@pytest.mark.parametrize(
    ("uuids", "why"),
    [(["a", "b", "c"], None), (["a", "b", "a"], "ranks 0 and 2 on here have the same GPU (a)"),
     (["a", None, "c"], "rank 1 on here has no GPU of its own"), ([None] * 3, "rank 0 on here has no GPU of its own")],
)  # fmt: skip
def test_every_rank_says_alike_why_gpus_are_not_distinct(monkeypatch, uuids, why):
    monkeypatch.setattr(device_module, "host", lambda: "here boot")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=uuids[gpu]))
    store, answers = dist.HashStore(), {}

    def ask(rank):
        answers[rank] = conflict(None if uuids[rank] is None else rank, store, rank, 3)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == dict.fromkeys(range(3), why)


def test_gpus_of_rocm_are_not_taken_for_hopper(visible):
    visible(1)
    assert capability(CUDA) == (9, 4) and can_launch_dependently(CUDA)
    visible(1, hip="6.4")
    assert capability(CUDA) == (0, 0) and not can_launch_dependently(CUDA)


@pytest.mark.parametrize(
    ("places", "shared"),
    [
        ([("here", 0), ("here", 1)], True),
        ([("here", 0), ("here", 0)], False),  # each rank sees its own GPU alone, as number 0
        ([("here", 0), ("there", 1)], False),
    ],
)
def test_memory_is_shared_on_one_host_by_devices_that_both_ranks_see(monkeypatch, places, shared):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("parallel.symmetric.host", lambda: "here")
    monkeypatch.setattr("parallel.symmetric.host_group", lambda: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(
        dist, "all_gather_object", lambda out, mine, group: out.__setitem__(slice(2), [(f"{n} ", i) for n, i in places])
    )
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    assert shares_memory(object(), CUDA) == shared


def test_hosts_of_equal_names_differ_by_their_boot(monkeypatch, tmp_path):
    names = set()
    for boot in ("one", "two"):
        (tmp_path / boot).write_text(boot)
        monkeypatch.setattr(device_module, "BOOT_ID", tmp_path / boot)
        host.cache_clear()
        names.add(host())
    host.cache_clear()
    assert len(names) == 2
