"""Verification: which drafts the target accepts, and which token follows them.

The target computes the last known token and all drafts of a sequence as rows of one step, and chooses a token at every
row exactly as it would without speculation: the argmax, or a draw whose noise is a function of (seed, position). A
draft is accepted when it is the token that the row before it chose; the first row whose choice is no draft ends the
run, and its choice is kept.

This is rejection sampling (arXiv 2211.17192). A drafter that is certain of its token x, as n-gram look-up and a greedy
draft model are, proposes with all its mass on x: x is accepted with the target's probability p(x), and otherwise the
token is drawn from p without x, scaled up. A draw from p that is compared with x does both at once: it is x with
probability p(x), and where it is not, it is distributed as p without x. Since it is the draw that decoding without
drafts would make, speculation changes no token of a request, with temperature as without, whatever was drafted, by
whom and beside which other requests.
"""

from __future__ import annotations

from collections.abc import Sequence as Many


def num_accepted(drafts: Many[int], choices: Many[int]) -> int:
    """Return how many leading drafts are the tokens that the rows before them chose."""
    count = 0
    for draft, choice in zip(drafts, choices, strict=False):
        if draft != choice:
            break
        count += 1
    return count
