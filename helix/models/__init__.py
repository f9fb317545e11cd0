"""Model families, their weights and their checkpoints: what the runtime knows of a model, and what computes it.

Importing this package loads nothing: a process that wants the tokenizer alone needs no torch.
"""
