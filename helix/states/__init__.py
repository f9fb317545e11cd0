"""State layers: the gated delta rule with its short convolution, and the memory of it that sequences have."""
