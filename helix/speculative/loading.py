"""From the settings to a speculator, in the order that memory asks for: checks, a draft model's weights, its pages."""

from __future__ import annotations

from dataclasses import replace

from attention.exchange import NoExchange
from attention.partial import PartialAttention
from parallel.grid import HelixGrid
from parallel.launch import agree
from parallel.layout import Layout
from parallel.placement import BlockCyclic
from parallel.symmetric import Faults

from ..cache.pages import PagedCache, page_layout
from ..config import HelixConfig
from ..models.decoder import Decoder
from ..models.eagle import EagleDecoder, EagleHead, read_head
from ..models.loading import fill, open_checkpoint, read_spec
from ..models.spec import ModelSpec
from ..runner import Runner
from .draft_model import DraftModel
from .next_layer import NextLayerSpeculator
from .ngram import NgramDrafter
from .speculator import Speculator

NEXT_LAYERS = ("deepseek_v3", "glm4_moe")


def with_next_layer(spec: ModelSpec, config: HelixConfig) -> ModelSpec:
    """Return a model's spec, with the layer that predicts one token further where drafts are asked of it.

    Raises:
        ValueError: in one line, when such models have none, or another group computes the prompts.
    """
    method = config.speculative.method
    if method not in ("mtp", "eagle3"):
        return spec
    if method == "mtp" and spec.family not in NEXT_LAYERS:
        raise ValueError(
            f"speculative.method = mtp drafts by a layer that {' and '.join(NEXT_LAYERS)} checkpoints have, and the "
            f"model is a {spec.family}; use speculative=ngram or speculative=draft_model"
        )
    if config.transfer.enabled:
        raise ValueError(
            f"speculative.method = {method} needs the hidden states of prompts, which a transfer does not bring; "
            "use speculative=ngram or speculative=draft_model, or leave transfer.* out"
        )
    return replace(spec, predicts_next=True) if method == "mtp" else replace(spec, has_head=True)


class DrafterLoader:
    """Makes the speculator of a run, and the draft model where there is one.

    Args:
        config: the settings of the run.
        target: the model that is drafted for.

    Attributes:
        head: of the model, where it has one of another checkpoint.

    Raises:
        ValueError: in one line, when the draft model or the head cannot be read, or its vocabulary is not the target's.
    """

    def __init__(self, config: HelixConfig, target: ModelSpec) -> None:
        self._config, self._target = config, target
        self._runner: Runner | None = None
        self._spec: ModelSpec | None = None
        self.head: EagleHead | None = None
        if config.speculative.method == "eagle3":
            self.head = read_head(config.speculative.path, target)
            try:
                self._head_checkpoint = self.head.open()
            except ValueError as error:
                raise ValueError(f"speculative.path = {error}") from error
        if config.speculative.method == "draft_model":
            model = config.speculative.model.as_model()
            try:
                self._spec = read_spec(model)
                self._checkpoint = open_checkpoint(model, self._spec)
            except ValueError as error:
                name = "speculative." if str(error).startswith("model.") else "speculative.model: "
                raise ValueError(f"{name}{error}") from error
            if self._spec.kinds:
                bounded = next(kind for kind in self._spec.kinds if kind.is_bounded)
                raise ValueError(
                    f"speculative.model is a {self._spec.family} with {bounded.name} layers; draft models attend fully"
                )
            if self._spec.vocab_size != target.vocab_size:
                raise ValueError(
                    f"speculative.model has a vocabulary of {self._spec.vocab_size} tokens and the model one of "
                    f"{target.vocab_size}; a draft model must share the model's tokenizer"
                )

    def load_weights(
        self,
        target: Decoder,
        attention: PartialAttention,
        *,
        in_8_bits: bool,
        faults: Faults | None,
        pdl: bool = False,
    ) -> None:
        """Load the draft model beside a target's decoder, with its dtypes and on its device. Collective over the world.

        Raises:
            ValueError: on every rank, when a file cannot be read.
        """
        if isinstance(target, EagleDecoder):
            agree(lambda: target.fill_head(self._head_checkpoint))
        if self._spec is None:
            return
        self._in_8_bits = in_8_bits
        scheduler, alone = self._config.scheduler, HelixGrid(Layout(), rank=0, kvp_group=None, world_group=None)
        decoder = Decoder(self._spec, alone, dtype=target.dtype, device=target.device, attention=attention, pdl=pdl)
        agree(lambda: fill(decoder, self._checkpoint))
        self._runner = Runner(
            decoder,
            NoExchange(target.dtype, pdl=pdl),
            self._cache(decoder, 1),
            BlockCyclic(self._config.cache.block_size, 1),
            max_batch=scheduler.max_batch,
            max_len=min(self._spec.max_position, self._target.max_position),
            share_qkv_rows=0,
            faults=faults,
        )
        self._group = target.grid.world_group

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the draft model's cache; 0 where there is no draft model."""
        if self._runner is None:
            return 0
        return self._runner.cache.page_bytes

    def make_speculator(self, num_pages: int, target: Runner) -> Speculator | None:
        """Return what drafts for a runner, with so many pages for a draft model's cache; None without speculation.

        Collective over the world.
        """
        config = self._config.speculative
        if config.method == "none":
            return None
        if config.method in ("mtp", "eagle3"):
            target.prepare_drafts(config.max_draft_len, captured=self._config.runtime.graphs)
            return NextLayerSpeculator(config.schedule, target)
        if self._runner is None:
            return Speculator(config.schedule, NgramDrafter(config.ngram_min, config.ngram_max))
        runner = self._runner
        runner.cache = agree(lambda: self._cache(runner.decoder, num_pages))
        drafter = DraftModel(
            runner,
            num_pages=num_pages,
            prefill_chunk=self._config.scheduler.prefill_chunk,
            max_draft_len=config.max_draft_len,
            group=self._group,
        )
        if runner.faults is not None and self._config.runtime.graphs:
            drafter.capture()
        return Speculator(config.schedule, drafter)

    def _cache(self, decoder: Decoder, num_pages: int) -> PagedCache:
        layout = page_layout(
            decoder.spec, decoder.num_kv_heads, self._config.cache.block_size, decoder.dtype, in_8_bits=self._in_8_bits
        )
        return PagedCache(layout, num_layers=decoder.spec.num_layers, num_pages=num_pages, device=decoder.device)
