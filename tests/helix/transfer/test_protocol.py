"""Messages survive the wire as they are, and nothing else does."""

import re
from types import GenericAlias

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from helix.request import TokenLogprobs
from helix.transfer.facts import Process
from helix.transfer.protocol import (
    VERSION,
    Ask,
    Bye,
    Cancel,
    End,
    First,
    Hello,
    Int32Array,
    MessageError,
    Pool,
    Progress,
    Ready,
    Refuse,
    Welcome,
    decode,
    encode,
    pack_array,
    unpack_array,
)


def ints(*values, dtype=np.int64):
    return np.array(values, dtype)


POOL = Pool(b"md", ints(4096, 8192), 512, 3, "DRAM", 0)
ASK = Ask(7, ints(5, 6, 7, dtype=np.int32), 1, 0, ints(2, 0), {"temperature": 0.5, "stop": ["x"]}, 9, "salt")
FIRST = First(7, 3, 9, TokenLogprobs(3, -0.5, {3: -0.5, 1: -1.5}))
MESSAGES = [
    Hello(1, 2, 1, {"cache.block_size": 16, "model.dtype": "float32"}, Process("host", 12, 34)),
    Welcome(2, 1, [[POOL, POOL]]),
    Refuse("block size"),
    Ready(),
    ASK,
    Cancel(7),
    Bye(),
    Progress(7, 2048),
    FIRST,
    replace(FIRST, logprobs=None),
    End(7, "unknown", "lost"),
]


def same(one, other):
    return type(one) is type(other) and encode(one) == encode(other)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message):
    assert same(decode(encode(message)), message)


def test_arrays_travel_as_raw_bytes():
    ask = replace(ASK, token_ids=np.arange(1000, dtype=np.int32))
    assert np.arange(1000, dtype=np.int32).tobytes() in encode(ask)


def test_arrays_are_read_whatever_numpy_makes_of_their_type():
    """From 2.5 on its alias and what msgspec hands to the hook are unequal."""
    asked = GenericAlias(np.ndarray, (object, np.dtype[np.int32]))
    assert asked != Int32Array
    assert unpack_array(asked, pack_array(ints(5, 6, dtype=np.int32))).tolist() == [5, 6]


def changed(message, **changes):
    body = msgspec.msgpack.decode(encode(message)) | changes
    return msgspec.msgpack.encode({key: value for key, value in body.items() if value is not ...})


@pytest.mark.parametrize(
    ("message", "changes", "complaint"),
    [
        (ASK, {"kind": "Ask 1"}, "Invalid value 'Ask 1'"),
        (ASK, {"kind": ...}, "missing required field `kind`"),
        (ASK, {"kind": f"Exec {VERSION}"}, f"Invalid value 'Exec {VERSION}'"),
        (ASK, {"kind": [f"Ask {VERSION}"]}, "Expected `str`, got `array` - at `$.kind`"),
        (ASK, {"pages": ...}, "missing required field `pages`"),
        (ASK, {"more": 1}, "unknown field `more`"),
        (ASK, {"id": True}, "Expected `int`, got `bool` - at `$.id`"),
        (ASK, {"id": 2**63}, "`int` <= 9223372036854775807 - at `$.id`"),
        (ASK, {"id": -1}, "`int` >= 0 - at `$.id`"),
        (ASK, {"start": 3}, "start = 3 of 3 tokens"),
        (ASK, {"seed": -1}, "`int` >= 0 - at `$.seed`"),
        (ASK, {"salt": b"x"}, "Expected `str`, got `bytes` - at `$.salt`"),
        (ASK, {"sampling": []}, "Expected `object`, got `array` - at `$.sampling`"),
        (ASK, {"retention": [1]}, "Expected `object`, got `int` - at `$.retention[0]`"),
        (ASK, {"token_ids": [5, 6, 7]}, "an array of <i4 begins with its dtype - at `$.token_ids`"),
        (ASK, {"token_ids": b"<i8" + bytes(8)}, "an array of <i4 begins with its dtype"),
        (ASK, {"token_ids": b"<i4" + bytes(7)}, "buffer size must be a multiple"),
        (ASK, {"token_ids": b"|O8" + bytes(8)}, "an array of <i4 begins with its dtype"),
        (ASK, {"token_ids": b"<i4"}, "not empty"),
        (ASK, {"token_ids": b"<i4" + b"\xff" * 4}, "must be ids"),
        (ASK, {"pages": b"<i8" + b"\xff" * 16}, "pages must not be negative"),
        (
            FIRST,
            {"logprobs": {"token_id": 3, "logprob": 0.5, "top": {"x": 0.5}}},
            "got `str` - at `key` in `$.logprobs.top`",
        ),
        (ASK, {"retention": [{"priority": 101}]}, "retention.priority = 101"),
        (FIRST, {"logprobs": {"token_id": 3, "logprob": "0", "top": {}}}, "at `$.logprobs.logprob`"),
        (FIRST, {"token": -1}, "`int` >= 0 - at `$.token`"),
        (MESSAGES[0], {"rank": 2}, "rank = 2 of 2 x 1"),
        (MESSAGES[0], {"kvp": 0}, "`int` >= 1 - at `$.kvp`"),
        (MESSAGES[0], {"process": {"machine": "host", "pid": 12}}, "missing required field `started`"),
        (MESSAGES[-1], {"state": "fine"}, "Invalid enum value 'fine' - at `$.state`"),
        (MESSAGES[1], {"pools": [[]]}, "0 pools for 2 x 1 ranks"),
        (MESSAGES[1], {"pools": []}, "length >= 1 - at `$.pools`"),
        *(
            (
                MESSAGES[1],
                {"pools": [[msgspec.msgpack.decode(encode(MESSAGES[1]))["pools"][0][0] | change] * 2]},
                complaint,
            )
            for change, complaint in [
                ({"layers": b"<i8"}, "layers must be addresses"),
                ({"layers": b"<i8" + b"\xff" * 8}, "layers must be addresses"),
                ({"num_pages": 0}, "`int` >= 1 - at `$.pools[0][0].num_pages`"),
                ({"page_bytes": -1}, "`int` >= 1 - at `$.pools[0][0].page_bytes`"),
            ]
        ),
    ],
)
def test_what_does_not_keep_the_protocol_is_refused(message, changes, complaint):
    with pytest.raises(MessageError, match=re.escape(complaint)):
        decode(changed(message, **changes))


def test_what_nests_without_end_is_refused():
    body = msgspec.msgpack.encode({"kind": f"Ask {VERSION}"})[:-1]
    with pytest.raises(MessageError):
        decode(b"\x82" + body[1:] + b"2\xa8sampling" + b"\x81\xa1a" * 100_000 + b"\xc0")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pages": ints(1)}, "1 pages for 2 blocks"),
        ({"pages": ints(0, 4)}, "page 4 of 4"),
        ({"first_owner": 2}, "first_owner = 2 of 2 KVP ranks"),
    ],
)
def test_places_that_do_not_fit_the_prompt_or_the_pools_are_refused(changes, complaint):
    ASK.check_places(2, 2, 4)
    with pytest.raises(MessageError, match=complaint):
        replace(ASK, **changes).check_places(2, 2, 4)


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
