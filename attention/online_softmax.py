"""What the attention kernels share: logarithms to base 2, and in Triton a softmax that grows a turn at a time.

Scores are in units of log 2; ``top`` and ``total`` are the largest score of each row so far and the sum of all weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)


@gluon.jit
def divisor(total):
    """Return what sums are divided by: ``total``, 1 where nothing was seen."""
    return gl.where(total == 0.0, 1.0, total)


@gluon.jit
def natural_lse(top, total):
    """Return the natural log of total * 2 ** top, -inf where nothing was seen."""
    return gl.where(total == 0.0, float("-inf"), (top + gl.log2(divisor(total))) / _LOG2_E)


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
    natural = tl.where(empty, float("-inf"), (top + tl.log2(whole)) / _LOG2_E)
    return acc / whole[:, None], natural
