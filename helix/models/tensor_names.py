"""How a checkpoint's files name the tensors of a model, which is not always how its family does.

Tools put a prefix before all names or take one away, and write an output head beside embeddings that the config calls
tied. A spec is changed accordingly here, once, so that whoever reads weights finds them by the spec's names.
"""

import re
from collections.abc import Set
from dataclasses import fields, replace

from .spec import ModelSpec
from .weight_files import CheckpointError, few

FIRST_NORM = "layers.0.input_layernorm.weight"
# ends of names of buffers that older files hold and nothing needs: RoPE's tables, and masks of attention
UNREAD = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias|causal_mask)|\.causal_mask)$"
)
PREDICTS_NEXT = "mtp."  # before the names of a layer beside the model, which has numbers of its own
OF_OTHER_MODULES = re.compile(r"\.(eh_proj|enorm|hnorm)\.")  # a layer that has them predicts several tokens


def is_unread(name: str) -> bool:
    """Return whether a tensor is a buffer that nothing needs."""
    return UNREAD.search(name) is not None


def named_as_stored(spec: ModelSpec, stored: Set[str]) -> ModelSpec:
    """Return `spec` with the names that the files have, with a head of its own where they have one, and in 8 bits where
    they have its scale.

    As in transformers, an output head in the file is used even where the config ties it to the embeddings, and of the
    two one that is there stands in for one that is not.
    Raises CheckpointError for tensors that would change results: biases of the head or the last norm, more layers.
    """
    spec = _with_prefix(spec, stored)
    names = spec.names
    if spec.experts is not None and any(
        names.experts_gate_up.format(layer=n) in stored for n in range(spec.num_layers)
    ):
        spec = replace(spec, experts=replace(spec.experts, stacked=True))
    if spec.tied_embeddings and names.lm_head in stored:
        if names.embedding in stored:
            spec = replace(spec, tied_embeddings=False)
        else:
            spec = replace(spec, names=replace(names, embedding=names.lm_head))
    if (how := spec.quantization) is not None:
        spec = replace(spec, quantization=replace(how, head=how.scale_of(spec.names.lm_head) in stored))
    biases = [name.removesuffix("weight") + "bias" for name in (names.lm_head, names.final_norm)]
    if used := sorted(name for name in biases if name in stored):
        raise CheckpointError(f"the checkpoint has {few(used)}, which a {spec.family} model here does not add")
    _require_no_more_layers(spec, stored)
    return spec


def _with_prefix(spec: ModelSpec, stored: Set[str]) -> ModelSpec:
    names = spec.names
    if names.input_norm.format(layer=0) in stored:
        return spec
    found = [name for name in stored if name == FIRST_NORM or name.endswith("." + FIRST_NORM)]
    found = [name for name in found if not name.startswith(PREDICTS_NEXT)]
    if len(found) != 1:
        return spec  # what is missing is said of the family's own names
    prefix = found[0].removesuffix(FIRST_NORM)
    heads = [name for name in stored if name == "lm_head.weight" or name.endswith(".lm_head.weight")]
    changed = {
        field.name: prefix + value.removeprefix("model.")
        for field in fields(names)
        if isinstance(value := getattr(names, field.name), str) and value.startswith("model.")
    }
    if len(heads) == 1:
        changed["lm_head"] = heads[0]
    return replace(spec, names=replace(names, **changed))


def _require_no_more_layers(spec: ModelSpec, stored: Set[str]) -> None:
    before = spec.names.input_norm.partition("{layer}")[0]
    numbered = re.compile(re.escape(before) + r"(\d+)\.")
    layers: dict[int, list[str]] = {}
    for name in stored:
        if (match := numbered.match(name)) and int(match[1]) >= spec.num_layers:
            layers.setdefault(int(match[1]), []).append(name)
    more = sorted(number for number, its in layers.items() if not any(map(OF_OTHER_MODULES.search, its)))
    if more:
        raise CheckpointError(
            f"the checkpoint has layers up to {more[-1]}, but config.json has num_hidden_layers = {spec.num_layers}; "
            f"set it to {more[-1] + 1}"
        )
