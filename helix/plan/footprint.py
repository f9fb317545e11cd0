"""The bytes of one rank: its weights, and what it caches of a token.

Weights are counted from the same shapes that the decoder allocates, so they are exact. Of a world's ranks the first is
the fullest: all that is split unevenly gives its remainder to the first ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property

from attention.work import WORKSPACE_BYTES, WORKSPACE_TOKENS
from parallel.layout import Layout
from parallel.placement import BlockCyclic

from ..cache.windows import pool_pages
from ..models.kinds import FULL, STATE, WINDOW
from ..models.parts import Part, Weight
from ..models.quantization import num_blocks
from ..models.spec import ModelSpec
from ..models.weights import EXPERT_ROLES, IN_8_BITS, layer_weights, model_weights, next_weights, part_of
from ..states.heads import StateHeads

FP4_GROUP, MXFP4_GROUP = 16, 32
CHECKPOINT_SHARE = 4  # checkpoints of states take at most one byte for so many of keys and values
PLANE_ALIGNMENT = 16  # bytes; of the planes of a page in 8 bits
FORMATS = ("fp32", "bf16", "fp8", "fp4")
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "fp4": 2}  # of what stays as it is


@dataclass(frozen=True)
class Storage:
    """How weights and cache are kept.

    Attributes:
        weights: fp32, bf16 (any 16 bits), fp8 (e4m3, a float32 scale for each row and 128 columns of a checkpoint's
            matrix) or fp4 (a scale of a byte for 16 elements; where the checkpoint is in MXFP4 for 32, experts alone).
            Embedding, head, router, norms and biases keep 16 bits.
        cache: the same names: fp8 has a float32 scale for each token and head, with latents for each token, of which
            the turned elements keep 16 bits; fp4 a byte for 16 elements.
    """

    weights: str = "bf16"
    cache: str = "bf16"

    def __post_init__(self) -> None:
        for name, value in (("weights", self.weights), ("cache.dtype", self.cache)):
            if value not in FORMATS:
                raise ValueError(f"{name} = {value!r} must be one of {', '.join(FORMATS)}")

    @property
    def has_narrow_cache(self) -> bool:
        """Whether keys and values have fewer than 16 bits."""
        return self.cache in ("fp8", "fp4")

    def weight_bytes(self, weight: Weight, *, narrow: bool, fp4_group: int = FP4_GROUP) -> int:
        """Return the bytes of one parameter of a rank, scales included; only a ``narrow`` one has few bits.

        fp4_group: elements of 4 bits that share a scale.
        """
        elements = _product(weight.shape)
        if weight.exact:
            return 4 * elements
        rows, columns = weight.shape[0], weight.shape[-1]
        if not narrow:
            return elements * _ELEMENT_BYTES[self.weights]
        if self.weights == "fp8":
            return elements + 4 * rows * num_blocks(*weight.columns)
        return rows * (-(-columns // 2) + -(-columns // fp4_group))

    def token_bytes(self, spec: ModelSpec, num_kv_heads: int) -> int:
        """Return what one layer caches of a token in so many KV heads, in bytes."""
        size, latent = spec.head_dim, spec.latent
        if self.cache in ("fp32", "bf16"):
            return spec.cache_planes * num_kv_heads * size * _ELEMENT_BYTES[self.cache]
        kept = 0 if latent is None else latent.turned_dim
        packed = size - kept
        narrow = packed + 4 if self.cache == "fp8" else -(-packed // 2) + -(-packed // FP4_GROUP)
        return spec.cache_planes * num_kv_heads * (narrow + 2 * kept)


@dataclass(frozen=True)
class Matrix:
    """A parameter of one rank: its elements, its bytes, scales included, and whether it has fewer than 16 bits each."""

    elements: int
    num_bytes: int
    is_narrow: bool = False


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike: how many there are, whether they have experts, and the parameters of one, by role.

    kind: how much they keep of the tokens before, FULL, WINDOW or STATE.
    """

    count: int
    has_experts: bool
    matrices: Mapping[str, Matrix]
    kind: str = FULL


@dataclass(frozen=True)
class Footprint:
    """What the fullest rank of a layout keeps of a model.

    Raises:
        ValueError: when ``part`` is first used, where the layout does not fit the model.
    """

    spec: ModelSpec
    layout: Layout
    storage: Storage = field(default_factory=Storage)
    block_size: int = 64

    @cached_property
    def part(self) -> Part:
        """The slices that the rank keeps."""
        return part_of(self.spec, self.layout, 0)

    @cached_property
    def placement(self) -> BlockCyclic:
        """Which rank holds which token."""
        return BlockCyclic(self.block_size, self.layout.kvp)

    @cached_property
    def top(self) -> Mapping[str, Matrix]:
        """The parameters outside the layers, by role."""
        return self._matrices(model_weights(self.spec, self.part))

    @cached_property
    def layers(self) -> tuple[LayerKind, ...]:
        """The layers, those that are alike together."""
        alike: dict[tuple[str, bool, tuple[bool, ...]], list[int]] = {}
        for layer in range(self.spec.num_layers):
            kind, has_experts = self.spec.kind_of(layer).name, self.spec.experts_of(layer) is not None
            alike.setdefault((kind, has_experts, self._kept_in_8_bits(layer)), []).append(layer)
        kinds = []
        for (kind, has_experts, _), numbers in sorted(alike.items()):
            weights = self._matrices(layer_weights(self.spec, numbers[0], self.part))
            kinds.append(LayerKind(len(numbers), has_experts, weights, kind))
        return tuple(kinds)

    def _kept_in_8_bits(self, layer: int) -> tuple[bool, ...]:
        """Which matrices of a layer a checkpoint holds in 8 bits; experts of a layer are alike."""
        if self.spec.quantization is None:
            return ()
        names = (str(value) for value in asdict(self.spec.names).values() if value is not None)
        return tuple(self.spec.is_quantized(name.format(layer=layer, expert=0)) for name in names if "{layer}" in name)

    @cached_property
    def num_heads(self) -> int:
        """Query heads of the rank before the exchange."""
        return self.part.q_heads[1] - self.part.q_heads[0]

    @cached_property
    def out_share(self) -> float:
        """The share of these heads that the rank has after the exchange."""
        return (self.part.out_heads[1] - self.part.out_heads[0]) / self.num_heads

    @cached_property
    def num_kv_heads(self) -> int:
        """KV heads of the rank."""
        return self.part.kv_heads[1] - self.part.kv_heads[0]

    @cached_property
    def num_window_heads(self) -> int:
        """Query heads of the rank in layers with a window."""
        return self.part.window_q_heads[1] - self.part.window_q_heads[0]

    @cached_property
    def num_window_kv_heads(self) -> int:
        """KV heads of the rank in layers with a window."""
        return self.part.window_kv_heads[1] - self.part.window_kv_heads[0]

    @cached_property
    def weights_bytes(self) -> int:
        """All weights of the rank, in bytes."""
        layers = sum(kind.count * _sum_bytes(kind.matrices) for kind in self.layers)
        further = self._matrices(next_weights(self.spec, self.part)) if self.spec.predicts_next else {}
        return layers + _sum_bytes(self.top) + _sum_bytes(further)

    @cached_property
    def token_bytes(self) -> int:
        """What the rank caches of a token that it owns, all layers, in bytes."""
        return self.spec.num_cached_layers * self.storage.token_bytes(self.spec, self.num_kv_heads)

    @property
    def page_bytes(self) -> int:
        """The bytes of one page, all layers; what stands between planes of small pages included."""
        return self._page_bytes(self.spec.num_cached_layers, self.num_kv_heads)

    @property
    def window_page_bytes(self) -> int:
        """The bytes of one page of the second pool, all layers with a window."""
        return self._page_bytes(len(self.spec.layers_of(WINDOW)), self.num_window_kv_heads)

    def windows_bytes(self, num_sequences: int, *, prefill_chunk: int) -> int:
        """Return what the second pool takes for so many sequences that decode beside a chunk, checkpoints included."""
        if not self.spec.window:
            return 0
        pages = pool_pages(
            self.spec.window + self.spec.looks_further,
            self.block_size,
            max_batch=num_sequences,
            max_run=2,
            prefill_chunk=prefill_chunk,
            max_len=self.spec.max_position,
            twice=True,
        )
        return pages * self.window_page_bytes

    def _page_bytes(self, num_layers: int, num_kv_heads: int) -> int:
        if self.storage.cache != "fp8":
            return self.block_size * num_layers * self.storage.token_bytes(self.spec, num_kv_heads)
        kept = 0 if self.spec.latent is None else self.spec.latent.turned_dim
        vectors = self.block_size * self.spec.cache_planes * num_kv_heads
        planes = (vectors * (self.spec.head_dim - kept), vectors * 2 * kept, vectors * 4)
        return num_layers * sum(-(-plane // PLANE_ALIGNMENT) * PLANE_ALIGNMENT for plane in planes)

    def states_bytes(self, num_sequences: int, max_run: int) -> int:
        """Return what state layers keep of so many sequences and a slot of nobody's, whose runs may be so long."""
        return (num_sequences + 1) * self.state_bytes(max_run)

    def state_bytes(self, max_run: int) -> int:
        """Return what all state layers keep of one sequence, whose runs may be so long, in bytes."""
        if self.spec.states is None:
            return 0
        heads = StateHeads.of(self.spec.states, self.part.value_heads)
        return len(self.spec.layers_of(STATE)) * heads.slot_bytes(max_run, _ELEMENT_BYTES[self.storage.weights])

    @cached_property
    def matrices_bytes(self) -> int:
        """The matrices of one state layer and one sequence, in bytes: what a step reads and writes; 0 without any."""
        if self.spec.states is None:
            return 0
        return StateHeads.of(self.spec.states, self.part.value_heads).matrices_bytes

    def cache_bytes_per_token(self, context: int) -> float:
        """Return the cache of one sequence of ``context`` tokens on the fullest rank, in bytes a token of it."""
        return self.pages_of(context) * self.page_bytes / context

    def num_pages(self, free_bytes: int, *, page_bytes_beside: int = 0) -> int:
        """Return how many pages fit into so many bytes; each page takes ``page_bytes_beside`` more elsewhere."""
        return max(0, free_bytes) // max(1, self.page_bytes + page_bytes_beside)  # pages of no full layer are free

    def pages_of(self, context: int) -> int:
        """Return the pages a rank that a sequence of ``context`` tokens takes where it takes most."""
        return self.placement.num_local_blocks(context, 0)

    def max_tokens(self, num_pages: int) -> int:
        """Return how many tokens so many pages a rank hold in all."""
        return num_pages * self.layout.kvp * self.block_size

    def workspace_tokens(self, wanted: int | None = None) -> int:
        """Return how many tokens a workspace holds: as many as are ``wanted``, or what ``attention.work`` says."""
        if wanted is not None:
            return wanted
        most = WORKSPACE_BYTES // max(1, self.workspace_bytes(1))
        return max(WORKSPACE_TOKENS, min(most, self.spec.max_position))

    def workspace_bytes(self, num_tokens: int) -> int:
        """Return what a workspace for the keys and values of so many tokens takes: of latents, or of 8 bits."""
        latent = self.spec.latent
        if latent is None:
            wide = 2 * self.num_kv_heads * self.spec.head_dim * _ELEMENT_BYTES[self.storage.weights]
            return num_tokens * wide if self.storage.cache == "fp8" else 0
        made = self.num_heads * (latent.plain_dim + latent.value_dim)
        return num_tokens * (made + self.spec.head_dim) * _ELEMENT_BYTES[self.storage.weights]

    def activation_bytes(self, num_rows: int, *, workspace_tokens: int | None = None) -> int:
        """Return about what a step of so many rows takes beside weights and cache.

        Its widest moments: the gated units of the rows, some copies of the stream, and the partials of attention; and
        the workspace of so many tokens.
        """
        spec, part = self.spec, self.part
        units = part.ffn[1] - part.ffn[0]
        if spec.experts is not None:
            held = part.expert_ffn[1] - part.expert_ffn[0]
            units = max(units, spec.experts.num_chosen * (held + spec.hidden_size) // 3)
        width = 3 * units + 6 * spec.hidden_size + 2 * self.num_heads * spec.value_dim
        rows_bytes = num_rows * width * _ELEMENT_BYTES[self.storage.weights]
        return rows_bytes + self.workspace_bytes(self.workspace_tokens(workspace_tokens))

    def _is_narrow(self, role: str, weight: Weight) -> bool:
        """Whether a parameter is kept in few bits: as its checkpoint says, else wherever it could be."""
        if self.spec.quantization is not None and self.storage.weights == "fp8":
            return weight.quantized
        if self.storage.weights == "fp4" and self._has_mxfp4:
            return role in EXPERT_ROLES
        return role in IN_8_BITS

    @property
    def _has_mxfp4(self) -> bool:
        """Whether the checkpoint's experts, and nothing else, have 4 bits."""
        return self.spec.experts is not None and self.spec.experts.in_4_bits

    def _matrices(self, weights: Mapping[str, Weight]) -> dict[str, Matrix]:
        matrices = {}
        for role, weight in weights.items():
            narrow = self.storage.weights in ("fp8", "fp4") and self._is_narrow(role, weight)
            group = MXFP4_GROUP if self._has_mxfp4 else FP4_GROUP
            num_bytes = self.storage.weight_bytes(weight, narrow=narrow, fp4_group=group)
            matrices[role] = Matrix(_product(weight.shape), num_bytes, narrow)
        return matrices


def _sum_bytes(matrices: Mapping[str, Matrix]) -> int:
    return sum(matrix.num_bytes for matrix in matrices.values())


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
