"""Which tokens top-k, then top-p, then min-p keep: the rule, in PyTorch; ``choose_kernels`` finds the same on a GPU.

Every filter keeps all tokens from some logit up. Tokens as likely as the last one that is kept are kept with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mass import distance, mass


def kept(logits: Tensor, floats: Tensor, doubles: Tensor, integers: Tensor) -> Tensor:
    """Return bool [B, V]: which tokens the filters of each row keep of its logits [B, V] float32.

    ``floats``, ``doubles`` and ``integers`` are those of ``choose_kernels.choose``.
    """
    far = distance(logits, logits.amax(-1, keepdim=True), floats[1][:, None])
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    last = integers[1].clamp(max=logits.shape[1])[:, None] - 1
    allowed = ordered >= ordered.gather(1, last)
    weights = mass(far.gather(1, ids)).masked_fill_(~allowed, 0)
    through = weights.cumsum(-1)
    first = torch.searchsorted(-ordered, -ordered)  # of the tokens that are as likely
    above = torch.where(first > 0, through.gather(1, (first - 1).clamp_(min=0)), 0)
    allowed &= above.to(torch.float64) < doubles[:, None] * through[:, -1:].to(torch.float64)
    return torch.zeros_like(allowed).scatter_(1, ids, allowed) & (far <= floats[2][:, None])
