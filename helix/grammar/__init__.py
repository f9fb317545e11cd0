"""Structured answers: a compiler in processes that can be killed, and rank 0's word on which tokens may come next."""
