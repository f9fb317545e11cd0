"""The settings of KV transfer."""

from __future__ import annotations

from dataclasses import dataclass, field

from .checks import check_at_least, check_choice

ROLES = ("prefill", "decode")


@dataclass(kw_only=True, slots=True)
class PrefillConfig:
    """The layout of the prefill group where one world is split; null is resolved as for ``parallel``.

    Attributes:
        kvp: ways the sequence is sharded there.
        tpa: ways the KV heads are split there.
    """

    kvp: int | None = None
    tpa: int | None = None

    def __post_init__(self) -> None:
        for axis in ("kvp", "tpa"):
            value = getattr(self, axis)
            if value is not None:
                check_at_least(f"transfer.prefill.{axis}", value, 1)


@dataclass(kw_only=True, slots=True)
class TransferConfig:
    """KV transfer: a prefill group computes prompts, the other ranks decode. Off unless one of the first two is set.

    Attributes:
        prefill_ranks: so many first ranks of this world prefill; the others decode, laid out by ``parallel``.
        role: prefill or decode: this whole world is one of the groups, and the other is another world.
        prefill: the layout of the prefill ranks of this world.
        address: HOST:PORT where two worlds meet (IPv6: [HOST]:PORT): the decode group listens there, the prefill group
            connects to it.
        bind: the address of the interface that the decode group listens on.
        connect_timeout_s: how long the groups wait for each other at the start, in seconds.
        timeout_s: how long the prefill group may be silent while something is asked of it, in seconds.
        min_tokens: a prompt of which fewer tokens are missing here, when it arrives, is computed by the decode group.
        retry: a request whose transfer failed is computed by the decode group itself; else it fails alone.
    """

    prefill_ranks: int = 0
    role: str | None = None
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    address: str | None = None
    bind: str = "127.0.0.1"
    connect_timeout_s: float = 300.0
    timeout_s: float = 120.0
    min_tokens: int = 64
    retry: bool = True

    def __post_init__(self) -> None:
        check_at_least("transfer.prefill_ranks", self.prefill_ranks, 0)
        check_at_least("transfer.connect_timeout_s", self.connect_timeout_s, 1.0)
        check_at_least("transfer.timeout_s", self.timeout_s, 0.1)
        check_at_least("transfer.min_tokens", self.min_tokens, 0)
        if self.role is not None:
            check_choice("transfer.role", self.role, ROLES)
            if self.prefill_ranks:
                raise ValueError(
                    f"transfer.prefill_ranks = {self.prefill_ranks} splits one world and transfer.role = {self.role} "
                    "makes a whole world one group; give one of them"
                )
            if self.address is None:
                raise ValueError(
                    f"transfer.role = {self.role} needs transfer.address=HOST:PORT, where the two worlds meet"
                )
        elif self.address is not None and not self.prefill_ranks:
            raise ValueError(f"transfer.address = {self.address} needs transfer.role=prefill or decode")
        if (self.prefill.kvp or self.prefill.tpa) and not self.prefill_ranks:
            raise ValueError(
                "transfer.prefill.kvp and transfer.prefill.tpa lay out the prefill ranks of a world that "
                "transfer.prefill_ranks splits; set it, or use parallel.* in a world of transfer.role=prefill"
            )
        if self.address is not None:
            self.host_and_port()

    @property
    def enabled(self) -> bool:
        """True where prompts are computed by another group than the one that decodes."""
        return self.prefill_ranks > 0 or self.role is not None

    def prefills(self, part: int) -> bool:
        """Return whether the ranks of a part of the world prefill for others (0, or 1 for the second part)."""
        return self.role == "prefill" or (self.prefill_ranks > 0 and part == 0)

    def host_and_port(self) -> tuple[str, int]:
        """Return the two parts of ``address``; ValueError where it has others."""
        host, _, port = (self.address or "").rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise ValueError(f"transfer.address = {self.address} must be HOST:PORT, such as 127.0.0.1:29600")
        return host.removeprefix("[").removesuffix("]"), int(port)
