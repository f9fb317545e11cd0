"""The KV cache: a control plane that tracks the pages of all KVP ranks (no torch), and the pages themselves."""
