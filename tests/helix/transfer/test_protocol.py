"""Messages survive the wire as they are, and nothing else does."""

from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix.transfer.protocol import (
    Ask,
    Bye,
    Cancel,
    End,
    First,
    Hello,
    MessageError,
    Pool,
    Progress,
    Ready,
    Refuse,
    Welcome,
    decode,
    encode,
    pool_dict,
)


def ints(*values, dtype=np.int64):
    return np.array(values, dtype)


POOL = Pool(b"md", ints(4096, 8192), 512, 3, "DRAM", 0)
ASK = Ask(7, ints(5, 6, 7, dtype=np.int32), 1, 0, ints(2, 0), {"temperature": 0.5, "stop": ["x"]}, 9, "salt")
FIRST = First(7, 3, 9, 1, -0.5, ints(3, 1), np.array([-0.5, -1.5]))
MESSAGES = [
    Hello(1, 2, {"cache.block_size": 16, "model.dtype": "float32"}, 2, 1, "host", 12, 34),
    Welcome(2, 1, [pool_dict(POOL), pool_dict(POOL)]),
    Refuse("block size"),
    Ready(),
    ASK,
    Cancel(7),
    Bye(),
    Progress(7, 2048),
    FIRST,
    replace(FIRST, logprob=None),
    End(7, "unknown", "lost"),
]


def same(one, other):
    return type(one) is type(other) and encode(one) == encode(other)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message):
    assert same(decode(encode(message)), message)


def test_pools_survive_the_wire_inside_welcome():
    found = decode(encode(Welcome(1, 1, [pool_dict(POOL)]))).parsed()
    assert len(found) == 1 and same(found[0], POOL)


def test_arrays_travel_as_raw_bytes():
    ask = replace(ASK, token_ids=np.arange(1000, dtype=np.int32))
    assert np.arange(1000, dtype=np.int32).tobytes() in encode(ask)


def changed(message, **changes):
    body = msgpack.unpackb(encode(message), ext_hook=lambda code, data: msgpack.ExtType(code, data))
    body.update(changes)
    return msgpack.packb({key: value for key, value in body.items() if value is not ...})


@pytest.mark.parametrize(
    ("message", "changes", "complaint"),
    [
        (ASK, {"v": 2}, "version 1"),
        (ASK, {"v": ...}, "version 1"),
        (ASK, {"kind": "Exec"}, "kind = 'Exec'"),
        (ASK, {"kind": ["Ask"]}, "kind = "),
        (ASK, {"pages": ...}, "has the fields"),
        (ASK, {"more": 1}, "has the fields"),
        (ASK, {"id": True}, "Ask.id must be of type int"),
        (ASK, {"id": 2**63}, "Ask.id must be of type int"),
        (ASK, {"id": -1}, "id = -1"),
        (ASK, {"start": 3}, "start = 3 of 3 tokens"),
        (ASK, {"seed": -1}, "seed = -1"),
        (ASK, {"salt": b"x"}, "Ask.salt must be of type str"),
        (ASK, {"sampling": []}, "Ask.sampling must be of type dict"),
        (ASK, {"retention": [1]}, "Ask.retention must be of type list"),
        (ASK, {"token_ids": [5, 6, 7]}, "Ask.token_ids must be of type Int32Array"),
        (ASK, {"token_ids": msgpack.ExtType(1, b"<i8" + bytes(8))}, "Ask.token_ids must be of type Int32Array"),
        (ASK, {"token_ids": msgpack.ExtType(1, b"<i4" + bytes(7))}, "extension 1 of 10 bytes is no array"),
        (ASK, {"token_ids": msgpack.ExtType(1, b"|O8" + bytes(8))}, "is no array"),
        (ASK, {"token_ids": msgpack.ExtType(2, b"<i4" + bytes(8))}, "extension 2"),
        (ASK, {"token_ids": msgpack.ExtType(1, b"<i4")}, "not empty"),
        (ASK, {"token_ids": msgpack.ExtType(1, b"<i4" + b"\xff" * 4)}, "must be ids"),
        (ASK, {"pages": msgpack.ExtType(1, b"<i8" + b"\xff" * 16)}, "pages must not be negative"),
        (FIRST, {"top_ids": msgpack.ExtType(1, b"<i8" + bytes(8))}, "1, 2 entries"),
        (FIRST, {"logprob": "0"}, "First.logprob"),
        (FIRST, {"token": -1}, "token = -1"),
        (MESSAGES[0], {"rank": 2}, "rank = 2 of 2"),
        (MESSAGES[0], {"kvp": 4}, "world_size = 2 of 4 x 1"),
        (MESSAGES[-1], {"state": "fine"}, "state = 'fine'"),
        (MESSAGES[1], {"pools": []}, "0 pools for 2 x 1 ranks"),
    ],
)
def test_what_does_not_keep_the_protocol_is_refused(message, changes, complaint):
    with pytest.raises(MessageError, match=complaint):
        decode(changed(message, **changes))


@pytest.mark.parametrize("change", [{"layers": ints()}, {"layers": ints(-1)}, {"num_pages": 0}, {"page_bytes": -1}])
def test_pools_without_addresses_are_refused(change):
    body = pool_dict(POOL) | change
    with pytest.raises(MessageError):
        Welcome(1, 1, [body]).parsed()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pages": ints(1)}, "1 pages for 2 blocks"),
        ({"pages": ints(0, 4)}, "page 4 of 4"),
        ({"first_owner": 2}, "first_owner = 2 of 2 KVP ranks"),
    ],
)
def test_pages_that_do_not_fit_the_prompt_or_the_pool_are_refused(changes, complaint):
    ASK.check_pages(2, 2, 4)
    with pytest.raises(MessageError, match=complaint):
        replace(ASK, **changes).check_pages(2, 2, 4)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_raise_nothing_else(data):
    with pytest.raises(MessageError):
        decode(data)


@given(st.data())
def test_damaged_messages_are_refused_or_valid_and_raise_nothing_else(data):
    packed = bytearray(encode(data.draw(st.sampled_from(MESSAGES))))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    try:
        message = decode(bytes(packed[:cut]))
        assert same(decode(encode(message)), message)
    except MessageError:
        pass
