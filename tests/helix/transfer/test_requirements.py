"""What a transfer lacks on this machine is said at once, in one line, before anything is loaded."""

import builtins
import re
import socket
from dataclasses import replace

import pytest
import torch
from torch.distributed import HashStore

import helix.prepare
from helix.config import TransferConfig
from helix.transfer.requirements import require, shared_secret
from parallel.launch import Launch
from tests.helix.transfer.worlds import SECRET, make_llm

PREFILL = TransferConfig(role="prefill", address="127.0.0.1:29600")
LAUNCH = Launch(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("package", "name"), [("nixl", "NIXL"), ("zmq", "pyzmq")])
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, package, name):
    plain = builtins.__import__

    def refuse(wanted, *args, **kwargs):
        if wanted.partition(".")[0] == package:
            raise ImportError(f"No module named '{package}'")
        return plain(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=f"KV transfer needs {name}.*pip install -e .\\[transfer\\]"):
        require(PREFILL, LAUNCH)


@pytest.mark.parametrize(("value", "problem"), [(None, "is not set"), ("", "is not set"), ("short", "has 5 bytes")])
def test_a_missing_or_short_secret_is_refused_with_a_way_out(monkeypatch, value, problem):
    monkeypatch.delenv("HELIX_TRANSFER_SECRET", raising=False)
    if value is not None:
        monkeypatch.setenv("HELIX_TRANSFER_SECRET", value)
    with pytest.raises(ValueError, match=f"HELIX_TRANSFER_SECRET {problem}:.*openssl rand"):
        require(PREFILL, LAUNCH)
    monkeypatch.setenv("HELIX_TRANSFER_SECRET", "x" * 16)
    require(PREFILL, LAUNCH)
    assert shared_secret() == b"x" * 16


def test_a_split_world_needs_no_secret_and_uses_none(monkeypatch):
    """What the environment has may be other runs' too: it must not lie in the store, which asks nobody for a secret."""
    monkeypatch.setenv("HELIX_TRANSFER_SECRET", "short")
    require(TransferConfig(prefill_ranks=1), replace(LAUNCH, store=HashStore()))


@pytest.fixture
def taken(monkeypatch):
    """A port that somebody listens on."""
    monkeypatch.setenv("HELIX_TRANSFER_SECRET", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def decode(**settings):
    return TransferConfig(role="decode", **settings)


def test_a_port_that_is_taken_is_named_by_its_setting_before_anything_is_loaded(taken):
    told = (
        f"transfer.address = 127.0.0.1:{taken}: the decode group cannot listen on port {taken} (Address already in use)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}; .* another port$"):
        make_llm("no such model", taken, "decode", (1, 1))


def test_a_port_that_is_taken_while_the_model_is_loaded_is_named_by_its_setting(taken, model, monkeypatch):
    monkeypatch.setattr(helix.prepare, "require_transfer", lambda *_: None)
    with pytest.raises(ValueError, match=f"^transfer.address = 127.0.0.1:{taken}: .* another port$"):
        make_llm(model, taken, "decode", (1, 1))


def test_an_interface_that_is_not_there_is_named_by_its_setting(monkeypatch):
    monkeypatch.setenv("HELIX_TRANSFER_SECRET", SECRET)
    with pytest.raises(ValueError, match="^transfer.bind = 192.0.2.1 cannot be listened on .* or 0.0.0.0 for all"):
        require(decode(address="192.0.2.1:29600", bind="192.0.2.1"), LAUNCH)


def test_addresses_may_be_of_ipv6(monkeypatch):
    monkeypatch.setenv("HELIX_TRANSFER_SECRET", SECRET)
    assert decode(address="[::1]:29600").host_and_port() == ("::1", 29600)
    with pytest.raises(ValueError, match="^transfer.bind = 2001:db8::1 cannot be listened on"):
        require(decode(address="[2001:db8::1]:29600", bind="2001:db8::1"), LAUNCH)


def test_only_the_rank_that_listens_needs_the_port(taken):
    address = f"127.0.0.1:{taken}"
    require(TransferConfig(role="prefill", address=address), LAUNCH)
    require(decode(address=address), Launch(1, 2, 1, 2, torch.device("cpu")))
