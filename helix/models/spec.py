"""What the runtime needs to know of a model, independent of how it is spread over ranks.

A `ModelSpec` is built once, from a checkpoint's config.json alone (``families.py``), before any model memory is taken.
Every rank reads the same file and so holds the same spec.
"""

from dataclasses import dataclass, field
from functools import cached_property

from .kinds import FULL, FULL_KIND, STATE, WINDOW, Kind
from .quantization import Quantization
from .rope import RopeSpec
from .states import States
from .weight_names import WeightNames, module_of


@dataclass(frozen=True)
class Latent:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434): of a token one latent is cached, of which every head makes its
    key and value, and one key that all heads share and RoPE turns.

    rank: elements of the latent; turned_dim: of the key that RoPE turns, and of what each query has for it.
    plain_dim: elements of a head's query and key that RoPE does not turn. value_dim: of a head's value.
    q_rank: elements of the latent that queries are made of; None where they are made of the hidden state.
    scale: what scores are multiplied by. eps: of the norms of both latents.
    """

    rank: int
    turned_dim: int
    plain_dim: int
    value_dim: int
    q_rank: int | None
    scale: float
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("rank", "turned_dim", "plain_dim", "value_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"latent.{name} = {value!r}, must be an integer of at least 1")

    @property
    def q_dim(self) -> int:
        """Elements of a head's query as the checkpoint projects it."""
        return self.plain_dim + self.turned_dim


@dataclass(frozen=True)
class ClampedGate:
    """(up + 1) * gate * sigmoid(alpha * gate), the gate at most ``limit``, up within it; with biases on all of it."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """The mixture that stands in for the feed-forward network of a layer.

    num_experts: of a layer. num_chosen: experts that a token goes through. ffn_size: units of one expert.
    normalised: the weights of those chosen sum to one. dense_layers: layers that keep a plain feed-forward.
    sigmoid: experts are weighted by the sigmoid of their score, not by a softmax, and chosen by that plus a bias of
        each expert, which the checkpoint holds (DeepSeek-V3, arXiv 2412.19437).
    groups, groups_chosen: experts stand in so many groups, and only those of the best are chosen from: a group counts
        as its best expert, with sigmoid as its best two.
    scale: what the weights are multiplied by in the end.
    shared_size: units of experts that every token goes through, taken as one; 0 for none.
    gates_shared: what these add is multiplied by the sigmoid of a score of the token.
    stacked: the checkpoint holds the experts' matrices of a layer as two tensors.
    clamped: what stands in for silu(gate) * up; None for that. Experts and router have biases then.
    in_4_bits: the checkpoint holds those in MXFP4, which is widened when it is read.
    """

    num_experts: int
    num_chosen: int
    ffn_size: int
    normalised: bool
    dense_layers: frozenset[int] = frozenset()
    sigmoid: bool = False
    groups: int = 1
    groups_chosen: int = 1
    scale: float = 1.0
    shared_size: int = 0
    gates_shared: bool = False
    stacked: bool = False
    clamped: ClampedGate | None = None
    in_4_bits: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_chosen", "ffn_size", "groups", "groups_chosen"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"experts.{name} = {value!r}, must be an integer of at least 1")
        if self.num_chosen > self.num_experts:
            raise ValueError(f"experts.num_chosen = {self.num_chosen} exceeds experts.num_experts = {self.num_experts}")
        if self.num_experts % self.groups or not self.groups_chosen <= self.groups:
            raise ValueError(
                f"experts.groups = {self.groups} must divide experts.num_experts = {self.num_experts}, and "
                f"experts.groups_chosen = {self.groups_chosen} not exceed it"
            )
        if self.num_chosen > self.groups_chosen * (self.num_experts // self.groups):
            raise ValueError(
                f"experts.num_chosen = {self.num_chosen} exceeds the experts of {self.groups_chosen} of {self.groups} "
                f"groups of {self.num_experts}"
            )


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """One decoder-only model: sizes, switches, RoPE and the names of its checkpoint tensors.

    Every layer is: RMSNorm, grouped-query attention with RoPE or, as its kind says, states in its place, residual,
    RMSNorm, SiLU-gated feed-forward, residual; the feed-forward may be a mixture of experts.
    num_kv_heads, head_dim: of what is cached of a token; with latents one head of latent and turned key.
    qkv_bias: q, k and v projections have biases.
    qk_norm: RMSNorm over each head of q and k, before RoPE, with weights [head_dim] shared by all heads.
    tied_embeddings: the output head is the embedding matrix; false where the checkpoint's files hold a head beside it.
    max_position: the longest context the model takes, in tokens.
    eos_token_ids: ids that end a generation; may be empty.
    experts: None for a model without. latent: None where keys and values are cached.
    quantization: how the weights of its linear modules are quantised; None where they are not.
    predicts_next: the checkpoint's layer after the last, which predicts one token further, is loaded beside the model.
    has_head: a head of another checkpoint predicts one token further (``eagle``), and caches what a layer does.
    kinds: the kind of each layer; empty where all are full, as layers are whose window is no shorter than the longest
        context. Layers with a window all have the same one.
    states: what state layers are made of; None for a model without.
    output_gate: attention's output is multiplied by a sigmoid; a head's gate stands behind its query in q's matrix.
    norms_exceed_one: the files hold what the weights of norms exceed one by (not of those of state layers).
    o_bias: the output projection has a bias.
    sinks: in layers of these kinds each head has a score without a value, which joins its softmax.
    gelu: dense feed-forwards are gated by GELU (its tanh form). normalises_added: what attention and feed-forward add
        is normalised, by weights of its own. embedding_scale: what embeddings are multiplied by.
    score_scale: what scores are multiplied by; None for 1 / sqrt(head_dim), or what latents say.
    window_rope, window_kv_heads: how positions rotate, and how many KV heads there are, in layers with a window; None
        for as in others.
    narrow_values: elements of a head's value where these are fewer than ``head_dim``; they are cached with zeros behind
        them. value_scale: what attention's output is multiplied by.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    rms_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_position: int
    rope: RopeSpec
    eos_token_ids: tuple[int, ...] = ()
    names: WeightNames = field(default_factory=WeightNames)
    experts: Experts | None = None
    latent: Latent | None = None
    quantization: Quantization | None = None
    predicts_next: bool = False
    has_head: bool = False
    kinds: tuple[Kind, ...] = ()
    states: States | None = None
    output_gate: bool = False
    norms_exceed_one: bool = False
    o_bias: bool = False
    sinks: tuple[str, ...] = ()
    gelu: bool = False
    normalises_added: bool = False
    embedding_scale: float = 1.0
    score_scale: float | None = None
    window_rope: RopeSpec | None = None
    window_kv_heads: int | None = None
    narrow_values: int | None = None
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in "num_layers hidden_size num_heads num_kv_heads head_dim ffn_size vocab_size max_position".split():
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}, must be an integer of at least 1")
        for num_kv_heads in (self.num_kv_heads, self.kv_heads_of(WINDOW)):
            if self.num_heads % num_kv_heads:
                raise ValueError(
                    f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {num_kv_heads}; "
                    f"every KV head must serve the same number of query heads"
                )
        if self.rope.rotary_dim > self.head_dim:
            raise ValueError(f"rope.rotary_dim = {self.rope.rotary_dim} exceeds head_dim = {self.head_dim}")
        if self.kinds and len(self.kinds) != self.num_layers:
            raise ValueError(
                f"kinds of {len(self.kinds)} layers are given, the model has num_layers = {self.num_layers}"
            )
        windows = sorted({kind.window for kind in self.kinds if kind.window})
        if len(windows) > 1:
            raise ValueError(
                f"windows of {', '.join(map(str, windows))} tokens; Helix computes one size of window a model"
            )
        if self.layers_of(STATE) and self.states is None:
            raise ValueError(
                f"layer {self.layers_of(STATE)[0]} is a state layer, and what these are made of is missing"
            )

    def kind_of(self, layer: int) -> Kind:
        """Return the kind of a layer; that which predicts one token further is full."""
        return self.kinds[layer] if layer < len(self.kinds) else FULL_KIND

    def kv_heads_of(self, name: str) -> int:
        """Return the KV heads of the model's layers of a kind, FULL or WINDOW."""
        return self.window_kv_heads or self.num_kv_heads if name == WINDOW else self.num_kv_heads

    def layers_of(self, name: str) -> tuple[int, ...]:
        """Return the numbers of the model's layers of a kind, FULL, WINDOW or STATE."""
        return tuple(layer for layer in range(self.num_layers) if self.kind_of(layer).name == name)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The place of each layer among the layers of its kind."""
        return tuple(self.layers_of(self.kind_of(layer).name).index(layer) for layer in range(self.num_layers))

    @property
    def window(self) -> int:
        """Tokens of the windows of the layers that have one; 0 where none has."""
        return max((kind.window for kind in self.kinds), default=0)

    @property
    def num_cached_layers(self) -> int:
        """Layers that a sharded page holds tokens of: full ones, and that which predicts one token further."""
        return len(self.layers_of(FULL)) + self.looks_further

    @property
    def looks_further(self) -> bool:
        """Say whether a layer beside the model's, in it or in a head, predicts one token further."""
        return self.predicts_next or self.has_head

    @property
    def value_dim(self) -> int:
        """Elements of what attention returns of a head."""
        return self.head_dim if self.latent is None else self.latent.rank

    @property
    def caches_in_8_bits(self) -> bool:
        """Say whether the checkpoint's keys and values are meant to be cached in 8 bits."""
        return self.quantization is not None and self.quantization.caches_in_8_bits

    @property
    def cache_planes(self) -> int:
        """Planes of a cached page: K and V, or latents alone."""
        return 2 if self.latent is None else 1

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        if self.latent is not None:
            return self.latent.scale
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    @property
    def expert_sizes(self) -> tuple[int, int]:
        """How many experts a layer has, and the units of each; (0, 0) for a model without."""
        return (0, 0) if self.experts is None else (self.experts.num_experts, self.experts.ffn_size)

    @property
    def shared_size(self) -> int:
        """Units of the experts that every token goes through; 0 for none."""
        return 0 if self.experts is None else self.experts.shared_size

    def is_quantized(self, name: str) -> bool:
        """Return whether the checkpoint tensor `name` is a matrix of 8 bits, whose scale is another tensor."""
        if self.quantization is None or not name.endswith(".weight"):
            return False
        if name == self.names.lm_head:
            return self.quantization.head
        return module_of(name) in self.names.linear_modules and self.quantization.covers(name)

    def experts_of(self, layer: int) -> Experts | None:
        """Return the experts of a layer; None where its feed-forward is a plain one."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts
