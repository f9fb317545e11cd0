"""One attention step over a paged KV cache that is sharded along the sequence (arXiv 2507.07120, section 2.1).

Shape letters, for the whole house: R query rows, Q query heads, K KV heads, D head size, B sequences, S tokens,
N ranks, P pages, T row tiles. ``lse`` is the natural log-sum-exp of a row's scaled scores, in float32.
"""
