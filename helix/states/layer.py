"""What mixes tokens in a state layer: input projection, convolution, gated delta rule, norm and gate of the outputs.

Every rank does it for its own value heads, with what it keeps of each sequence alone: nothing is exchanged before the
output projection, which is summed over all ranks as that of any layer.
"""

from __future__ import annotations

from typing import Any

import torch

from attention.rows import Rows

from ..models.linear import split_linear
from .cache import StateCache
from .cuts import Cuts
from .decode_kernel import advance_few
from .inputs import Inputs
from .prompt_kernels import advance_many
from .reference import advance_reference


def advance(
    normed: torch.Tensor,
    rows: Rows,
    states: StateCache,
    place: int,
    weights: dict[str, Any],
    *,
    eps: float,
    longest: int,
    pdl: bool = False,
    chunk: bool = False,
    cuts: Cuts | None = None,
) -> torch.Tensor:
    """Return the gated outputs of this rank's value heads for a step's rows, [R, V, W], and advance their states.

    Args:
        normed: [R, h], the layer's input, equal on all ranks.
        rows: the step's rows; a sequence has one run of them at most.
        states: what is kept of each sequence, in the slot of its row of the page table.
        place: which of the state layers this is.
        weights: the layer's.
        eps: of the norm of outputs.
        longest: rows of the longest run, at least.
        pdl: launch programmatically dependent.
        chunk: as for ``split_linear``.
        cuts: what is kept of the runs on the way; None for nothing.
    """
    flat, scores = split_linear(normed, weights["state_in"], pdl=pdl, chunk=chunk), weights.get("state_scores")
    inputs = Inputs(flat, None if scores is None else split_linear(normed, scores, pdl=pdl))
    layer, heads = states.layers[place], states.heads
    given = rows.positions, rows.row_seq, rows.query_start, layer, weights
    if not flat.is_cuda:
        return advance_reference(inputs.joined(), *given, eps=eps, max_run=states.max_run, cuts=cuts, place=place)
    out = torch.empty((flat.shape[1], heads.num_value, heads.value_dim), dtype=normed.dtype, device=flat.device)
    advance_few(inputs, *given, out, eps=eps, max_run=states.max_run, pdl=pdl)
    if longest > states.max_run:
        advance_many(inputs, *given, out, eps=eps, max_run=states.max_run, cuts=cuts, place=place)
    return out
