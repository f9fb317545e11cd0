"""What the attention kernels in Triton share: a softmax that grows a turn at a time.

Scores are in units of log 2; ``top`` and ``total`` are the largest score of each row so far and the sum of all weights.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(scores, top, total):
    """Take in a turn's scores [M, N]: their weights, what earlier sums shrink by, and the new top and total."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(top - shift)
    return weight, decay, new_top, total * decay + tl.sum(weight, 1)


@triton.jit
def finish(acc, top, total):
    """Return normalised sums, and the natural log of the sum of exponentials: 0 and -inf where nothing was seen."""
    empty = total == 0.0
    whole = tl.where(empty, 1.0, total)
    natural = tl.where(empty, float("-inf"), (top + tl.log2(whole)) / 1.4426950408889634)
    return acc / whole[:, None], natural
