"""Keys from a secret are those of RFC 5869 (appendix A, its tests 1 to 3), and the two ends have pairs of their own."""

import pytest
import zmq

from helix.transfer.keys import hkdf_sha256, key_pair


@pytest.mark.parametrize(
    ("secret", "salt", "info", "key"),
    [
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            b"\x0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_keys_are_those_of_the_rfc(secret, salt, info, key):
    assert hkdf_sha256(secret, info, salt=salt).hex() == key[:64]


def test_each_end_has_a_pair_of_its_own_that_follows_from_the_secret():
    made = {end: key_pair(b"a secret of some length", end) for end in ("listener", "connector")}
    assert made == {end: key_pair(b"a secret of some length", end) for end in made}
    other = key_pair(b"another secret, as long", "listener")
    assert len({*made["listener"], *made["connector"], *other}) == 6
    assert all(public == zmq.curve_public(private) for public, private in made.values())
