"""Talk to a running server (scripts.serve) with OpenAI's client: python examples/chat.py [URL].

A key, where the server wants one, is taken from HELIX_API_KEY.
"""

import os
import sys

import openai


def main() -> None:
    """Ask one question and print the answer as it comes."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("HELIX_API_KEY", "none"))
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_completion_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} made")


if __name__ == "__main__":
    main()
