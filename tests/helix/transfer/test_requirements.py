"""What a transfer lacks on this machine is said at once, in one line, before anything is loaded."""

import builtins

import pytest
import torch

from helix.transfer.requirements import check_secret, require
from parallel.launch import Launch

LAUNCH = Launch(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("package", "name"), [("nixl", "NIXL"), ("msgpack", "msgpack")])
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, package, name):
    plain = builtins.__import__

    def refuse(wanted, *args, **kwargs):
        if wanted.partition(".")[0] == package:
            raise ImportError(f"No module named '{package}'")
        return plain(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=f"KV transfer needs {name}.*pip install -e .\\[transfer\\]"):
        require(LAUNCH)


@pytest.mark.parametrize(("value", "problem"), [(None, "is not set"), ("", "is not set"), ("short", "has 5 bytes")])
def test_a_missing_or_short_secret_is_refused_with_a_way_out(value, problem):
    with pytest.raises(ValueError, match=f"HELIX_TRANSFER_SECRET {problem}:.*openssl rand"):
        check_secret(value)
    assert check_secret("x" * 16) == b"x" * 16
