"""What a checkpoint calls the tensors of each role; families differ, and the tools that write files."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class WeightNames:
    """Checkpoint tensor names of the weight roles; "{layer}" and "{expert}" stand for their numbers.

    up = None means that `gate` holds both matrices, [2 * ffn_size, hidden_size] with the gate's rows first.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    input_norm: str = "model.layers.{layer}.input_layernorm.weight"
    q: str = "model.layers.{layer}.self_attn.q_proj.weight"
    k: str = "model.layers.{layer}.self_attn.k_proj.weight"
    v: str = "model.layers.{layer}.self_attn.v_proj.weight"
    q_bias: str = "model.layers.{layer}.self_attn.q_proj.bias"
    k_bias: str = "model.layers.{layer}.self_attn.k_proj.bias"
    v_bias: str = "model.layers.{layer}.self_attn.v_proj.bias"
    q_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
    o: str = "model.layers.{layer}.self_attn.o_proj.weight"
    q_a: str = "model.layers.{layer}.self_attn.q_a_proj.weight"
    q_a_norm: str = "model.layers.{layer}.self_attn.q_a_layernorm.weight"
    q_b: str = "model.layers.{layer}.self_attn.q_b_proj.weight"
    kv_a: str = "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"
    kv_a_norm: str = "model.layers.{layer}.self_attn.kv_a_layernorm.weight"
    kv_b: str = "model.layers.{layer}.self_attn.kv_b_proj.weight"
    post_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    mixed_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    fed_norm: str = "model.layers.{layer}.post_feedforward_layernorm.weight"
    gate: str = "model.layers.{layer}.mlp.gate_proj.weight"
    up: str | None = "model.layers.{layer}.mlp.up_proj.weight"
    down: str = "model.layers.{layer}.mlp.down_proj.weight"
    router: str = "model.layers.{layer}.mlp.gate.weight"
    router_bias: str = "model.layers.{layer}.mlp.gate.e_score_correction_bias"
    shared_gate: str = "model.layers.{layer}.mlp.shared_experts.gate_proj.weight"
    shared_up: str = "model.layers.{layer}.mlp.shared_experts.up_proj.weight"
    shared_down: str = "model.layers.{layer}.mlp.shared_experts.down_proj.weight"
    expert_gate: str = "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
    expert_up: str = "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    expert_down: str = "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    shared_router: str = "model.layers.{layer}.mlp.shared_expert_gate.weight"
    experts_gate_up: str = "model.layers.{layer}.mlp.experts.gate_up_proj"
    experts_down: str = "model.layers.{layer}.mlp.experts.down_proj"
    experts_gate_up_bias: str = "model.layers.{layer}.mlp.experts.gate_up_proj_bias"
    experts_down_bias: str = "model.layers.{layer}.mlp.experts.down_proj_bias"
    score_bias: str = "model.layers.{layer}.mlp.router.bias"
    o_bias: str = "model.layers.{layer}.self_attn.o_proj.bias"
    sinks: str = "model.layers.{layer}.self_attn.sinks"
    state_qkvz: str = "model.layers.{layer}.linear_attn.in_proj_qkvz.weight"
    state_ba: str = "model.layers.{layer}.linear_attn.in_proj_ba.weight"
    state_qkv: str = "model.layers.{layer}.linear_attn.in_proj_qkv.weight"
    state_z: str = "model.layers.{layer}.linear_attn.in_proj_z.weight"
    state_b: str = "model.layers.{layer}.linear_attn.in_proj_b.weight"
    state_a: str = "model.layers.{layer}.linear_attn.in_proj_a.weight"
    state_conv: str = "model.layers.{layer}.linear_attn.conv1d.weight"
    state_log_rate: str = "model.layers.{layer}.linear_attn.A_log"
    state_bias: str = "model.layers.{layer}.linear_attn.dt_bias"
    state_norm: str = "model.layers.{layer}.linear_attn.norm.weight"
    state_out: str = "model.layers.{layer}.linear_attn.out_proj.weight"
    next_embedding_norm: str = "model.layers.{layer}.enorm.weight"
    next_hidden_norm: str = "model.layers.{layer}.hnorm.weight"
    next_input: str = "model.layers.{layer}.eh_proj.weight"
    next_norm: str = "model.layers.{layer}.shared_head.norm.weight"

    @cached_property
    def linear_modules(self) -> frozenset[str]:
        """How the layers' linear modules are called, which a quantised checkpoint holds in few bits."""
        latents = (self.q_a, self.q_b, self.kv_a, self.kv_b)
        shared = (self.shared_gate, self.shared_up, self.shared_down)
        expert = (self.expert_gate, self.expert_up, self.expert_down)
        plain = (self.q, self.k, self.v, self.o, self.gate, self.up or self.gate, self.down)
        states = (self.state_qkvz, self.state_ba, self.state_qkv, self.state_z, self.state_b, self.state_a)
        return frozenset(module_of(name) for name in (*plain, *latents, *shared, *expert, *states, self.state_out))


def module_of(name: str) -> str:
    """Return what the module is called that a tensor belongs to."""
    return name.split(".")[-2]
