"""KV transfer: a prefill group hands the cache of a sequence to a decode group with another layout."""
