"""What is settled of a run before it takes any memory: its settings, checked against world, model and machine.

It is cheap, so that of many runs every one can be checked before the first begins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from attention.backends import select_backend
from parallel.launch import Launch, agree, from_rank0
from parallel.layout import Layout
from parallel.symmetric import can_launch_dependently

from .config import HelixConfig, ParallelConfig, SpeculativeConfig
from .grammar.vocabulary import Vocabulary
from .models.loading import open_checkpoint, read_spec
from .models.spec import ModelSpec
from .models.tokenizer import load_tokenizer
from .models.weights import part_of
from .plan.footprint import Footprint
from .prediction import advise, case_of, find_hardware, planned_layout, storage_of
from .prompts import Prompt, PromptReader
from .room import require_room
from .speculative.loading import DrafterLoader, with_next_layer
from .states.settings import with_states
from .transfer.requirements import require as require_transfer
from .windows import with_windows

_log = logging.getLogger(__name__)


def config_of_part(config: HelixConfig, part: int) -> HelixConfig:
    """Return the settings of this rank's group.

    A prefill group never decodes, so it drafts nothing; as the first part of a split world it has a layout of its own.
    """
    if not config.transfer.prefills(part):
        return config
    prefill = config.transfer.prefill
    layout = config.parallel if config.transfer.role else ParallelConfig(kvp=prefill.kvp, tpa=prefill.tpa)
    return replace(config, parallel=layout, speculative=SpeculativeConfig())


def without_graphs(config: HelixConfig, device: torch.device) -> HelixConfig:
    """Return the settings, with decode graphs off where attention looks at its data from the host, which is said."""
    asked = device.type == "cuda" and config.runtime.graphs
    if not asked or config.attention.backend != "reference":
        return config
    _log.info("attention.backend=reference reads lengths on the host: runtime.graphs is off")
    return replace(config, runtime=replace(config.runtime, graphs=False))


def check_exchange(config: HelixConfig, layout: Layout, device: torch.device) -> None:
    """Raise ValueError for a fused exchange without GPUs, and say where there is nothing to exchange."""
    if config.attention.exchange != "fused":
        return
    if device.type != "cuda":
        raise ValueError(
            f"attention.exchange = fused writes into other GPUs' memory, but the run is on {device.type}; "
            "use attention.exchange=auto"
        )
    if layout.kvp == 1:
        _log.info("attention.exchange=fused has no effect: kvp is 1, so nothing is exchanged")


class Prepared:
    """A run that can be: what ``LLM`` builds.

    Collective over the world: every rank makes it with equal arguments. It holds the checkpoint's files open.

    Args:
        config: the settings of the run.
        launch: this rank's world.
        prompts: what will be asked first, where that is known: when none of them can run, that is said at once.

    Attributes:
        config: the settings of this rank's group.
        pdl: whether kernels launch before the one before them has ended.
        eos_token_ids: ids that end every output: those that the model's configs name, and its tokenizer's.
        vocabulary: its tokens as grammars see them.

    Raises:
        ValueError: on every rank, in one line, for settings that do not fit the world, the model or the machine, for a
            checkpoint that cannot be read, and when no prompt can run.
    """

    def __init__(self, config: HelixConfig, launch: Launch, *, prompts: Sequence[Prompt] = ()) -> None:
        self.launch = launch
        self.config = config = config_of_part(config, launch.part)
        if config.transfer.enabled:
            agree(lambda: require_transfer(config.transfer, launch))
        self.spec: ModelSpec = agree(lambda: with_next_layer(read_spec(config.model), config))
        self.config = config = agree(lambda: with_windows(with_states(self.config, self.spec), self.spec))
        if not config.parallel.planned:
            self.layout = self._resolve_layout()
        self.pdl = can_launch_dependently(launch.device)
        self.attention = select_backend(config.attention.backend, launch.device, pdl=self.pdl)
        self.config = config = without_graphs(config, launch.device)
        self.checkpoint = agree(lambda: open_checkpoint(config.model, self.spec))
        self.drafting = agree(lambda: DrafterLoader(config, self.spec))
        self.tokenizer = agree(lambda: load_tokenizer(config.model.path) if config.model.path else None)
        own = getattr(self.tokenizer, "eos_token_id", None)
        self.eos_token_ids = from_rank0(lambda: tuple({*self.spec.eos_token_ids, *(() if own is None else (own,))}))
        self.vocabulary = Vocabulary(self.tokenizer, self.spec.vocab_size, self.eos_token_ids)
        if config.sampling.structured_outputs:
            agree(self.vocabulary.require)
        self.prompts = PromptReader(self.spec, self.tokenizer)
        self.prompts.require_one(prompts)
        self.dtype = self._resolve_dtype()
        self.in_8_bits = self._resolve_cache()
        self.storage = storage_of(self.spec, self.dtype, in_8_bits=self.in_8_bits)
        self._consult(prompts)
        check_exchange(config, self.layout, launch.device)
        self.footprint = Footprint(self.spec, self.layout, self.storage, config.cache.block_size)
        agree(lambda: require_room(config, self.footprint, launch))

    def _resolve_layout(self) -> Layout:
        try:
            layout = self.config.parallel.resolve(self.launch.world_size, self.spec.num_kv_heads)
            part_of(self.spec, layout, self.launch.rank)
        except ValueError as error:
            if self.launch.store is None or not self.config.transfer.prefills(self.launch.part):
                raise
            raise ValueError(str(error).replace("parallel.", "transfer.prefill.")) from error
        return layout

    def _consult(self, prompts: Sequence[Prompt]) -> None:
        """Ask the model of cost: for the layout where it is planned, else for a faster one than the rule's to name."""
        config, ranks, storage = self.config, self.launch.world_size, self.storage
        parallel = config.parallel

        def choose() -> Layout:
            hardware = find_hardware(config, self.launch.device)
            case = case_of(config, self.spec, self.prompts, prompts)
            layout = planned_layout(config, hardware, (self.spec, storage), ranks, case)
            _log.info(
                "parallel.planned: kvp %d x tpa %d, ep %d for %d sequences of %d tokens",
                layout.kvp, layout.tpa, layout.ep, case.batch, case.context,
            )  # fmt: skip
            return layout

        def mention() -> None:
            hardware = find_hardware(config, self.launch.device)
            if hardware is not None:
                case = case_of(config, self.spec, self.prompts, prompts)
                line = advise(config, hardware, self.spec, storage, self.layout, case)
                if line is not None:
                    _log.info("%s", line)

        if parallel.planned:
            self.layout = from_rank0(choose)
        elif parallel.kvp is None and parallel.tpa is None and ranks > 1:
            from_rank0(mention)

    def _resolve_dtype(self) -> torch.dtype:
        name = self.config.model.dtype
        if name == "auto":
            name = "bfloat16" if self.launch.device.type == "cuda" else "float32"
            _log.info("model.dtype=auto: %s, for device %s", name, self.launch.device.type)
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def _resolve_cache(self) -> bool:
        """Return whether what is cached is quantised to 8 bits."""
        name, own = self.config.cache.dtype, str(self.dtype).removeprefix("torch.")
        if name == "auto":
            in_8_bits = self.spec.caches_in_8_bits
            if in_8_bits:
                _log.info("cache.dtype=auto: fp8_e4m3, as the checkpoint's kv_cache_scheme says")
            return in_8_bits
        if name not in ("fp8_e4m3", own):
            raise ValueError(
                f"cache.dtype = {name} but the model is run in {own}; use model.dtype={name}, or cache.dtype=auto or "
                "fp8_e4m3"
            )
        return name == "fp8_e4m3"
