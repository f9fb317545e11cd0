"""The gated delta rule in plain PyTorch, in float32, on any device: the oracle of the kernels, and what CPUs run.

A head's state is a matrix S [D, W] that maps keys to values. A token decays it, and then replaces what it answers to
the token's key by the token's value, as far as beta says (arXiv 2412.06464, equation 10):

    S <- exp(g) S;   S <- S + k (beta (v - k S));   o = q S

``recurrent`` is that, token by token. ``chunked`` does tokens by 64: what they do to each other is the solution of a
triangular system, so that all but one step a chunk is matrix products (section 3.3 there).

Shape letters: T tokens, V value heads, D elements of a key, W of a value.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cache import LayerStates
from .cuts import Cuts
from .heads import CHUNK, StateHeads

NORM_EPS = 1e-6  # of the length of queries and keys


class Tokens(NamedTuple):
    """What tokens are to the rule, float32: q, k [V, T, D], v [V, T, W], g (of the decay exp(g)) and beta [V, T]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    def part(self, start: int, stop: int | None) -> Tokens:
        """Return the tokens [start, stop)."""
        return Tokens(*(each[:, start:stop] for each in self))


def advance_reference(
    flat: torch.Tensor,
    positions: torch.Tensor,
    row_seq: torch.Tensor,
    query_start: torch.Tensor,
    states: LayerStates,
    weights: dict[str, torch.Tensor],
    *,
    eps: float,
    max_run: int,
    cuts: Cuts | None = None,
    place: int = 0,
) -> torch.Tensor:
    """Run a state layer's heads over a step's rows and return their gated outputs: [R, V, W] in flat's dtype.

    Of each run of rows the first stays, whatever comes, and all of one longer than ``max_run``: they enter the matrix.
    The others' inputs are kept until a later run tells, by its first position, how many of them stay.

    Args:
        flat: [R, width], the rows' projected inputs, see ``StateHeads``.
        positions: [R] int64, ascending by one within a run; rows at -1, at the head of a run, are padding.
        row_seq: [R], the slot of each row's sequence.
        query_start: [C + 1], the first row of each run, then R.
        states: the layer's; changed.
        weights: "state_conv" [conv_size, 1, taps], "state_rates" [2 V] float32, "state_norm" [W].
        eps: of the norm of outputs.
        max_run: see above.
        cuts: what is kept of the runs on the way, of the state layer at ``place``; None for nothing.
    """
    heads = states.heads
    out = flat.new_zeros((flat.shape[0], heads.num_value, heads.value_dim))
    starts = query_start.tolist()
    for run, (start, stop) in enumerate(pairwise(starts)):
        start += int((positions[start:stop] < 0).sum())
        is_long = stop - start > max_run
        for until, kept in [(stop, -1)] if cuts is None or not is_long else cuts.of(run):
            if start < until:
                slot, first = int(row_seq[start]), int(positions[start])
                made = _advance_run(flat[start:until], first, slot, states, weights, 0 if is_long else max_run)
                gate = flat[start:until, heads.conv_size : heads.scores_at].unflatten(-1, (heads.num_value, -1))
                out[start:until] = gated_norm(made.to(flat.dtype), gate, weights["state_norm"], eps)
                start = until
            if kept >= 0 and cuts is not None and cuts.kept is not None:
                for all_kept, own in zip(cuts.kept, (states.matrix, states.position, states.inputs), strict=True):
                    all_kept[kept, place] = own[slot]
    return out


def _advance_run(
    rows: torch.Tensor,
    first: int,
    slot: int,
    states: LayerStates,
    weights: dict[str, torch.Tensor],
    max_run: int,
) -> torch.Tensor:
    """Advance a sequence by rows from position ``first`` on, and return their outputs: [T, V, W] float32."""
    heads, ring = states.heads, states.inputs[slot]
    if first == 0:
        states.matrix[slot], states.position[slot] = 0.0, 0
    known = int(states.position[slot, 0])
    if known > first:
        raise RuntimeError(f"slot {slot} holds the state of {known} tokens, and a row at {first} comes")
    before = torch.arange(known - heads.taps + 1, first, device=rows.device)
    old = ring[before % len(ring)].masked_fill((before < 0).unsqueeze(1), 0)
    given = torch.cat((rows[:, : heads.conv_size], rows[:, heads.scores_at :]), -1)
    tokens = made_of(torch.cat((old, given)), heads, weights)
    stays = first - known + (len(rows) if len(rows) > max_run else 1)
    out, matrix = chunked(tokens.part(0, stays), states.matrix[slot])
    states.matrix[slot], states.position[slot] = matrix, known + stays
    guesses, _ = recurrent(tokens.part(stays, None), matrix)
    last = torch.arange(first, first + len(rows), device=rows.device)[-len(ring) :]
    ring[last % len(ring)] = given[-len(ring) :]
    return torch.cat((out, guesses), 1)[:, first - known :].transpose(0, 1)


def made_of(inputs: torch.Tensor, heads: StateHeads, weights: dict[str, torch.Tensor]) -> Tokens:
    """Return what tokens are to the rule.

    inputs: [taps - 1 + T, input_size]; the first ones are what the convolution sees before the tokens.
    """
    key_size = heads.num_key * heads.key_dim
    channels, scores = inputs.float().split((heads.conv_size, 2 * heads.num_value), -1)
    mixed = F.conv1d(channels.T.unsqueeze(0), weights["state_conv"].float(), groups=heads.conv_size)[0].T
    # rounded where the model's own dtype rounds
    mixed = F.silu(mixed.to(inputs.dtype).float()).to(inputs.dtype).float()
    q, k, v = mixed.split((key_size, key_size, heads.num_value * heads.value_dim), -1)
    of_value = (torch.arange(heads.num_value, device=inputs.device) + heads.offset) // heads.group
    q, k = (unit(each.unflatten(-1, (heads.num_key, -1)))[:, of_value].transpose(0, 1) for each in (q, k))
    b, a = scores[heads.taps - 1 :].T.split((heads.num_value, heads.num_value))
    log_rate, bias = weights["state_rates"].float().unsqueeze(1).split((heads.num_value, heads.num_value))
    g = -log_rate.exp() * F.softplus(a + bias)
    v = v.unflatten(-1, (heads.num_value, -1)).transpose(0, 1)
    return Tokens(q * heads.key_dim**-0.5, k, v, g, b.sigmoid())


def unit(x: torch.Tensor) -> torch.Tensor:
    """Return vectors of length one."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return RMSNorm(x) * weight * silu(gate), in x's dtype."""
    exact = x.float()
    normed = weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed * F.silu(gate.float())).to(x.dtype)


def recurrent(tokens: Tokens, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of tokens [V, T, W] and the states [V, D, W] after them, float32, token by token.

    matrix: [V, D, W] float32, the states before them.
    """
    q, k, v, g, beta = tokens
    out = torch.empty_like(v)
    for t in range(v.shape[1]):
        matrix = matrix * g[:, t, None, None].exp()
        error = v[:, t] - torch.einsum("vd,vdw->vw", k[:, t], matrix)
        matrix = matrix + torch.einsum("vd,vw->vdw", k[:, t], beta[:, t, None] * error)
        out[:, t] = torch.einsum("vd,vdw->vw", q[:, t], matrix)
    return out, matrix


def chunked(tokens: Tokens, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what ``recurrent`` does, CHUNK tokens at a time."""
    q, k, v, g, beta = tokens
    length = v.shape[1]
    if length <= 2:
        return recurrent(tokens, matrix)
    more = -length % CHUNK
    q, k, v = (F.pad(each, (0, 0, 0, more)).unflatten(1, (-1, CHUNK)) for each in (q, k, v))
    g, beta = (F.pad(each, (0, more)).unflatten(1, (-1, CHUNK)) for each in (g, beta))
    decay = g.cumsum(-1)  # of each token since the chunk's beginning, in logarithms
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    system = beta.unsqueeze(-1) * (k @ k.mT) * between
    asked = torch.cat((v, k * decay.exp().unsqueeze(-1)), -1) * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(system, asked, upper=False, unitriangular=True)
    values, erased = solved.split((v.shape[-1], k.shape[-1]), -1)
    scores = (q @ k.mT) * between
    q_from, k_to = q * decay.exp().unsqueeze(-1), k * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    out = torch.empty_like(v)
    for chunk in range(v.shape[1]):
        new = values[:, chunk] - erased[:, chunk] @ matrix
        out[:, chunk] = q_from[:, chunk] @ matrix + scores[:, chunk] @ new
        matrix = matrix * decay[:, chunk, -1, None, None].exp() + k_to[:, chunk].mT @ new
    return out.flatten(1, 2)[:, :length], matrix
