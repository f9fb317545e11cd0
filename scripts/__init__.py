"""The commands: each is started from the root of the checkout as ``python -m scripts.NAME`` or under torchrun."""
