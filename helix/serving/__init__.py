"""The HTTP server: OpenAI's API in a process of its own, beside rank 0 of a running world (docs/serving.md)."""
