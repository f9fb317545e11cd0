"""One attention step over a paged KV cache that is sharded along the sequence (arXiv 2507.07120, section 2.1).

Shapes are given in the letters of docs/design.md; ``lse`` is the natural log-sum-exp of a row's scaled scores, float32.
"""
