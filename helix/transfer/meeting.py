"""How the two groups find each other, agree on what they must agree on, and connect their pools.

1. The decode group's rank 0 listens: at ``transfer.address``, or, where one world is split, at a port that it tells
   through the world's own store, with a secret made for this run.
2. Every prefill rank connects to it, proves that it knows the secret, and says hello with its facts.
3. Where a fact differs, both groups end with an error that holds both values. Otherwise the decode group answers with
   the pools of all its ranks.
4. Every prefill rank connects to the pools that it will write, and is ready; the decode ranks let NIXL make progress
   until all are.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.launch import Launch, agree, from_rank0, host_group
from parallel.layout import Layout

from ..config import HelixConfig
from ..engine import Engine
from ..models.spec import ModelSpec
from .channel import Channel, ChannelLost, Listener, connect, wait_for
from .facts import Process, make_facts
from .hearing import Hearing
from .lobby import Lobby, Writer
from .protocol import Hello, Pool, Ready, Refuse, Welcome
from .receiver import Receiver
from .regions import Side
from .requirements import naming_the_setting, place_to_listen, shared_secret
from .sender import Prepare, Sender
from .stores import Bounded, Pages, Store, bounded_memory
from .transport import AnyPeer, Transport

STORE_KEY = "helix/transfer"
TURN_S = 0.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """This rank and its group: its settings, its layout, and the engine that computes ``spec``."""

    config: HelixConfig
    launch: Launch
    layout: Layout
    spec: ModelSpec
    engine: Engine

    def facts(self) -> dict[str, Any]:
        """Return what both groups must agree on; reads the weight files."""
        model, pages = self.config.model, self.engine.runner.cache.layout
        return make_facts(
            self.spec,
            block_size=self.config.cache.block_size,
            dtypes=(pages.dtype, pages.cache_dtype),
            weights=Path(model.path) if model.load == "checkpoint" else None,
        )

    def side(self, layout: Layout) -> Side:
        """Return a group of some layout as one end of a transfer."""
        return Side(layout, self.config.cache.block_size)

    @cached_property
    def bounded(self) -> Bounded | None:
        """What the rank has of layers of bounded memory; None where the model has none."""
        return bounded_memory(self.spec, self.engine)

    @cached_property
    def stores(self) -> list[Store]:
        """What is transferred, alike on all ranks of both groups."""
        pages: Store = Pages(self.spec, self.engine.runner.cache)
        return [pages] if self.bounded is None else [pages, self.bounded]

    def transports(self, role: str) -> list[Transport]:
        """Return the transport of each store. Collective."""
        name = f"{role}-{self.launch.rank}-{secrets.token_hex(4)}"
        return agree(lambda: [Transport(f"{name}-{number}", each.memory) for number, each in enumerate(self.stores)])


# --- the decode group -------------------------------------------------------------------------------------------------


def meet_prefill_group(group: Group) -> Receiver:
    """Wait for the prefill group and return what asks it. Collective over the decode group.

    Raises:
        ValueError: on all ranks, when NIXL, the address or the secret cannot be used, nobody comes, or the groups do
            not agree.
    """
    transports = group.transports("decode")
    pools = [_gather(transport.pool) for transport in transports]
    config = group.config.transfer
    deadline = time.monotonic() + config.connect_timeout_s
    lobbies: list[Lobby] = []  # rank 0's
    writers: list[Writer] = []

    def listen() -> None:
        facts = group.facts()
        secret = shared_secret() if group.launch.store is None else secrets.token_bytes(32)
        with naming_the_setting(config):
            listener = Listener(*place_to_listen(config), secret, config.timeout_s)
        _announce(group, listener, secret)
        lobbies.append(Lobby(listener, facts, Welcome(group.layout.kvp, group.layout.tpa, pools)))

    def let_in() -> int:
        try:
            party = lobbies[0].poll(TURN_S)
            if party is None and time.monotonic() > deadline:
                raise ValueError(lobbies[0].late(config.connect_timeout_s))
        except ValueError:
            lobbies[0].listener.close()
            raise
        writers.extend(party.writers if party is not None else [])
        return len(writers)

    from_rank0(listen)
    num_writers = 0
    while not num_writers:
        num_writers = from_rank0(let_in)
        for transport in transports:
            transport.progress()
    _log.info("transfer: %d prefill ranks are connected", num_writers)
    return Receiver(
        group.engine,
        config,
        num_writers=num_writers,
        hearing=Hearing(
            writers, lobbies[0] if lobbies else None, timeout_s=config.timeout_s, vocabulary=group.spec.vocab_size
        ),
        transports=transports,
        speaks=group.launch.speaks,
    )


def _gather(pool: Pool) -> list[Pool]:
    if not dist.is_initialized():
        return [pool]
    pools: list[Pool] = [pool] * dist.get_world_size()
    dist.all_gather_object(pools, pool, group=host_group())
    return pools


def _announce(group: Group, listener: Listener, secret: bytes) -> None:
    """Tell the other part of a split world where to go; its store is this world's own, and nobody else's."""
    config = group.config.transfer
    if group.launch.store is not None:
        host = config.host_and_port()[0] if config.address is not None else config.bind
        place = {"host": host, "port": listener.port, "secret": secret.hex()}
        group.launch.store.set(STORE_KEY, json.dumps(place))
    else:
        _log.info("transfer: waiting for the prefill group at %s:%d", config.bind, listener.port)


# --- the prefill group ------------------------------------------------------------------------------------------------


def meet_decode_group(group: Group, prepare: Prepare) -> Sender:
    """Connect to the decode group and return what serves it. Collective over the prefill group.

    Args:
        group: this rank's.
        prepare: settles a request.

    Raises:
        ValueError: on all ranks, when NIXL or the secret cannot be used, nobody listens, or the groups do not agree.
    """
    transports = group.transports("prefill")
    facts, timeout_s = from_rank0(group.facts), group.config.transfer.connect_timeout_s

    def join() -> Welcome:
        channel.send(Hello(group.launch.rank, group.layout.kvp, group.layout.tpa, facts, Process.current()))
        return _await_welcome(channel, timeout_s)

    # In two steps: where one rank is refused, the others do not wait for a welcome that cannot come.
    channel = agree(lambda: connect(*_where_to_go(group), timeout_s, group.config.transfer.timeout_s))
    welcome = agree(join)
    layout = Layout(kvp=welcome.kvp, tpa=welcome.tpa)
    found = agree(
        lambda: [_connect(group, layout, *each) for each in zip(group.stores, transports, welcome.pools, strict=True)]
    )
    channel.send(Ready([process for process in welcome.lost if process.has_ended()]))
    _log.info("transfer: connected to %d decode ranks", layout.world_size)
    return Sender(
        group.engine,
        rank=group.launch.rank,
        channel=channel,
        source=group.side(group.layout),
        target=group.side(layout),
        bounded=group.bounded,
        peers=found,
        num_pages=[min(pool.num_pages for pool in pools) for pools in welcome.pools],
        transports=transports,
        prepare=prepare,
    )


def _where_to_go(group: Group) -> tuple[str, int, bytes]:
    store, config = group.launch.store, group.config.transfer
    if store is None:
        return *config.host_and_port(), shared_secret()
    try:
        store.wait([STORE_KEY], timedelta(seconds=config.connect_timeout_s))
    except dist.DistStoreError as error:
        timeout_s = config.connect_timeout_s
        raise ChannelLost(
            f"the decode ranks were not there within transfer.connect_timeout_s = {timeout_s:g} s; raise it"
        ) from error
    place = json.loads(store.get(STORE_KEY))
    return place["host"], place["port"], bytes.fromhex(place["secret"])


def _await_welcome(channel: Channel, timeout_s: float) -> Welcome:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        wait_for([channel], TURN_S)
        for message in channel.messages():
            if isinstance(message, Welcome):
                return message
            if isinstance(message, Refuse):
                channel.close()
                raise ValueError(message.reason)
        if channel.lost is not None:
            raise ChannelLost(f"the decode group at {channel.name} left before it answered: {channel.lost}")
    channel.close()
    raise ChannelLost(f"the decode group at {channel.name} did not answer within {timeout_s:g} s")


def _connect(group: Group, layout: Layout, store: Store, transport: Transport, pools: list[Pool]) -> list[AnyPeer]:
    """Return the pools of a group of some layout that this rank writes: those with heads that it sends."""
    mine = group.layout, group.launch.rank
    if not store.sends(*mine):
        return []
    source, peers = store.map(transport.pool, *mine), list[AnyPeer]()
    for number, pool in enumerate(pools):
        target = store.map(pool, layout, number)
        if max(source.heads[0], target.heads[0]) < min(source.heads[1], target.heads[1]):
            peers.append(transport.connect(pool, source, target, rank=number))
    return peers
