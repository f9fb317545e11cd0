"""The settings of a run, one dataclass a concern; defaults and checks live here and nowhere else.

They are also the schema that the commands compose from YAML and the command line, so a field's name is its key.
``None`` means "resolve it": each such setting is resolved in one place, which logs what it chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from parallel.launch import DEVICES
from parallel.layout import Layout

from .attention_config import AttentionConfig as AttentionConfig
from .cache_config import CACHE_DTYPES as CACHE_DTYPES
from .cache_config import DTYPES as DTYPES
from .cache_config import CacheConfig as CacheConfig
from .checks import check_at_least as check_at_least
from .checks import check_choice as check_choice
from .sampling import SamplingParams
from .speculative.schedule import DraftLenSchedule
from .transfer_config import PrefillConfig as PrefillConfig
from .transfer_config import TransferConfig as TransferConfig

LOADS = ("checkpoint", "dummy")
METHODS = ("none", "ngram", "draft_model", "mtp", "eagle3")
USED_BY = {
    "max_draft_len": METHODS[1:],
    "draft_len_schedule": METHODS[1:],
    "draft_len_by_context": METHODS[1:],
    "ngram_max": ("ngram",),
    "ngram_min": ("ngram",),
    "model": ("draft_model",),
    "path": ("eagle3",),
}
SAMPLING_DEFAULTS = ("none", "model")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model to run.

    Attributes:
        path: a Hugging Face checkpoint folder, or a config.json where load is dummy.
        dtype: of weights and activations, and of the cache unless cache.dtype says otherwise; auto is bfloat16 on GPUs
            and float32 on CPUs.
        load: checkpoint reads safetensors; dummy makes random weights on the device.
        max_position: replaces the model's own limit of context, in tokens; RoPE stays as the model says.
        config: the content of a config.json, instead of a path; needs load = dummy.
    """

    path: str = ""
    dtype: str = "auto"
    load: str = "checkpoint"
    max_position: int | None = None
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.load", self.load, LOADS)
        if self.config is not None and (self.path or self.load != "dummy"):
            raise ValueError("model.config describes a model without weights; use model.load=dummy and no model.path")
        if self.max_position is not None:
            check_at_least("model.max_position", self.max_position, 1)


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks are laid out; null is TP over the KV heads as far as they go, and the sequence for the rest.

    Attributes:
        kvp: ways the sequence is sharded.
        tpa: ways the KV heads are split (beyond the KV heads, with kvp 1, they are duplicated).
        tpf: ways the feed-forward is split.
        ep: ways the experts are split.
        planned: take the layout of the lowest predicted TTL, by the constants of rank 0's GPU.
    """

    kvp: int | None = None
    tpa: int | None = None
    tpf: int | None = None
    ep: int = 1
    planned: bool = False

    def __post_init__(self) -> None:
        for axis in ("kvp", "tpa", "tpf", "ep"):
            value = getattr(self, axis)
            if value is not None:
                check_at_least(f"parallel.{axis}", value, 1)
        given = [axis for axis in ("kvp", "tpa", "tpf") if getattr(self, axis) is not None]
        if self.planned and given:
            raise ValueError(
                f"parallel.planned = true chooses the layout, but parallel.{given[0]} = {getattr(self, given[0])} is "
                "given; leave one out"
            )

    def resolve(self, world_size: int, num_kv_heads: int) -> Layout:
        """Return the layout: tensor parallelism as far as the KV heads go, the sequence for the rest.

        Raises:
            ValueError: when the axes do not multiply to the world's size.
        """
        tpa, kvp = self.tpa, self.kvp
        if tpa is None and kvp is None:
            tpa = max(ways for ways in range(1, num_kv_heads + 1) if num_kv_heads % ways == world_size % ways == 0)
        if tpa is None:
            assert kvp is not None
            tpa = max(world_size // kvp, 1)
        if kvp is None:
            kvp = max(world_size // tpa, 1)
        layout = Layout(kvp=kvp, tpa=tpa, tpf=self.tpf or 0, ep=self.ep)
        layout.check_world(world_size)
        return layout


@dataclass(kw_only=True, slots=True)
class SchedulerConfig:
    """What one step may hold.

    Attributes:
        max_batch: sequences that run at once.
        prefill_chunk: prompt tokens a step computes, over all sequences, beside one decode row of each.
        short_prompt_share: the part of a chunk that goes to prompts with less left than the one whose turn it is, the
            shortest first; from 0, which slows the longest prompt least, to 0.5.
        decode_steps_per_chunk: steps of decode rows for each chunk while sequences decode: 1 computes a chunk beside
            every one, 4 beside every fourth, so that decode rows wait for chunks less often and prompts take longer.
        max_logprobs: likely tokens that a request may ask for beside each of its own; a step pays for the most asked.
    """

    max_batch: int = 64
    prefill_chunk: int = 2048
    short_prompt_share: float = 0.25
    decode_steps_per_chunk: int = 1
    max_logprobs: int = 20

    def __post_init__(self) -> None:
        check_at_least("scheduler.max_batch", self.max_batch, 1)
        check_at_least("scheduler.prefill_chunk", self.prefill_chunk, 1)
        if not 0.0 <= self.short_prompt_share <= 0.5:
            raise ValueError(f"scheduler.short_prompt_share = {self.short_prompt_share} must lie in [0, 0.5]")
        check_at_least("scheduler.decode_steps_per_chunk", self.decode_steps_per_chunk, 1)
        check_at_least("scheduler.max_logprobs", self.max_logprobs, 0)


@dataclass(kw_only=True, slots=True)
class DraftModelConfig:
    """The model that drafts: of any supported family, with the target's vocabulary and dtype.

    Attributes:
        path, load, config: as those of the model itself.
    """

    path: str = ""
    load: str = "checkpoint"
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            self.as_model()
        except ValueError as error:
            raise ValueError(f"speculative.{error}") from error

    def as_model(self) -> ModelConfig:
        """Return it as the settings of a model."""
        return ModelConfig(path=self.path, load=self.load, config=self.config)


@dataclass(kw_only=True, slots=True)
class SpeculativeConfig:
    """Whether and how to draft tokens that the model verifies several at a time.

    Attributes:
        method: ngram looks a sequence's last tokens up in the sequence itself; draft_model asks a smaller model; mtp
            the layer of a DeepSeek-V3 or GLM-4.5 checkpoint that predicts one token further; eagle3 a head for that.
        max_draft_len: the most tokens that a sequence drafts in a step.
        draft_len_schedule: "up to this batch size" -> draft length, above the last 0; None is always max_draft_len.
        draft_len_by_context: "up to so many tokens of all sequences that decode" -> the most that each drafts, above
            the last 0; None is no limit.
        ngram_max: the longest run of last tokens that is looked up.
        ngram_min: the shortest one.
        model: the draft model.
        path: the folder of the EAGLE-3 head.
    """

    method: str = "none"
    max_draft_len: int = 4
    draft_len_schedule: Any = None  # dict[int, int] | None: of that type OmegaConf 2.3 takes no override of a dict
    draft_len_by_context: Any = None
    ngram_max: int = 4
    ngram_min: int = 2
    model: DraftModelConfig = field(default_factory=DraftModelConfig)
    path: str = ""

    def __post_init__(self) -> None:
        check_choice("speculative.method", self.method, METHODS)
        check_at_least("speculative.max_draft_len", self.max_draft_len, 0)
        check_at_least("speculative.ngram_min", self.ngram_min, 1)
        check_at_least("speculative.ngram_max", self.ngram_max, 1)
        if self.ngram_max < self.ngram_min:
            raise ValueError(
                f"speculative.ngram_max = {self.ngram_max} must be at least speculative.ngram_min = {self.ngram_min}"
            )
        schedule = self.schedule
        self.draft_len_schedule, self.draft_len_by_context = schedule.lengths, schedule.by_context

    def check_used(self) -> None:
        """Raise ValueError when a setting that the method does not use differs from its default.

        Not done at once: a program may hold the settings of several methods in one object.
        """
        for key, value in _changed(self):
            methods = USED_BY.get(key.partition(".")[0], METHODS)
            if self.method not in methods:
                raise ValueError(
                    f"speculative.{key} = {value!r} has no effect with speculative={self.method}; "
                    f"use {' or '.join(f'speculative={method}' for method in methods)}"
                )

    @property
    def most_drafts(self) -> int:
        """The most tokens that a sequence drafts in a step; 0 without a method."""
        return 0 if self.method == "none" else self.max_draft_len

    @property
    def schedule(self) -> DraftLenSchedule:
        """The draft length by batch size and context."""
        return DraftLenSchedule(self.max_draft_len, self.draft_len_schedule, self.draft_len_by_context)


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how carefully to run.

    Attributes:
        device: auto is CUDA where every rank has a GPU.
        check_ranks: compare a digest of the decision state over all ranks every step (debugging; costs a collective).
        timeout_s: bound of a collective, in seconds.
        graphs: on GPUs, capture the decode steps of every batch bucket at the start.
        look_ahead: launch a step before the tokens of the one before it are read; not with check_ranks.
        hardware: constants to predict with: a name of conf/hardware/ or a FILE.yaml; None finds them by the GPU's name.
    """

    device: str = "auto"
    check_ranks: bool = False
    timeout_s: float = 600.0
    graphs: bool = True
    look_ahead: bool = True
    hardware: str | None = None

    def __post_init__(self) -> None:
        check_choice("runtime.device", self.device, DEVICES)
        check_at_least("runtime.timeout_s", self.timeout_s, 1.0)


@dataclass(kw_only=True, slots=True)
class SamplingConfig(SamplingParams):
    """How requests sample that do not say.

    Attributes:
        defaults: whose values the settings have that are left at their defaults: none is those, greedy; model is the
            checkpoint's generation_config.json.
    """

    defaults: str = "none"

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        check_choice("sampling.defaults", self.defaults, SAMPLING_DEFAULTS)

    def with_overrides(self, overrides: Mapping[str, Any]) -> SamplingParams:
        """Return the settings of one request, which has no defaults of its own to name."""
        own = {each.name: getattr(self, each.name) for each in fields(SamplingParams)}
        return SamplingParams(**own).with_overrides(overrides)


@dataclass(kw_only=True, slots=True)
class HelixConfig:
    """Everything that ``helix.LLM`` needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)

    def __post_init__(self) -> None:
        for each in fields(HelixConfig):  # commands add keys of their own, of any kind
            kind: Any = each.default_factory
            if not isinstance(value := getattr(self, each.name), kind):
                raise TypeError(f"HelixConfig.{each.name} is a {type(value).__name__}, must be a {kind.__name__}")


def _changed(config: Any, group: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of every setting that differs from its default."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from _changed(value, f"{group}{each.name}.")
        elif value != each.default:
            yield group + each.name, value
