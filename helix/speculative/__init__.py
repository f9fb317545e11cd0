"""Speculative decoding: drafters, the draft length that follows the batch, verification."""
