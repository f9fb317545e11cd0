"""Run random requests on a GPU that is not there; print the kernels that the start had not compiled.

    python -m tests.helix.late_kernels MODEL METHOD REQUESTS [WEIGHTS]

MODEL is one of conf/model, cut to two layers, METHOD how tokens are drafted, WEIGHTS bf16 or fp8. The last line is one
of JSON.
"""

import json
import sys
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from helix import building
from helix.config import CacheConfig, HelixConfig, ModelConfig, SchedulerConfig, SpeculativeConfig
from helix.flight import Flight
from helix.graphs import PendingTokens
from helix.llm import LLM
from helix.prompt_logprobs import PromptScorer
from helix.request import Sequence, TokenLogprobs
from parallel.launch import Launch
from scripts.cli import CONF
from scripts.dummy_weights import with_weights
from tests import imaginary_gpu
from tests.helix.test_compile_ahead import draw

MODEL, METHOD, REQUESTS = sys.argv[1], sys.argv[2], int(sys.argv[3])
WEIGHTS = (sys.argv[4:] or ["bf16"])[0]
CHOSEN = Random(1)


def read(flight: Flight, runner: Any) -> Any:
    """Return tokens by chance for the rows that choose, as ``Flight.read``."""
    choice = flight.choice
    if choice is None:
        return None
    count = len(choice.rows) if isinstance(choice, PendingTokens) else choice.token_ids.shape[0]
    return SimpleNamespace(token_ids=np.array([CHOSEN.randrange(1, 50) for _ in range(count)]), logprobs=None)


def take(scorer: PromptScorer) -> list[tuple[Sequence, TokenLogprobs]]:
    """Return scores of 0 for the prompts that were scored, as ``PromptScorer.take``."""
    scored, scorer._scored = scorer._scored, []
    return [(seq, TokenLogprobs(0, 0.0, {})) for seqs, _ in scored for seq in seqs]


def main() -> None:
    """Start, and run the requests."""
    mode, launches = imaginary_gpu.install()
    for name, module in list(sys.modules.items()):
        if name.startswith("helix.") and callable(getattr(module, "upload", None)):
            module.upload = imaginary_gpu.upload  # type: ignore[attr-defined]
    building.fill = lambda decoder, checkpoint: None
    LLM._enter = lambda self, config: Launch(0, 1, 0, 1, imaginary_gpu.DEVICE)  # type: ignore[method-assign]
    PendingTokens.send = classmethod(  # type: ignore[assignment]
        lambda cls, output, sampled=None: cls(output, None, list(range(output.shape[0] - 1)))
    )
    Flight.read = read  # type: ignore[method-assign]
    PromptScorer.take = take  # type: ignore[method-assign]
    shape = yaml.safe_load((CONF / "model" / f"{MODEL}.yaml").read_text("utf-8"))["config"]
    model = ModelConfig(load="dummy", config=shape | {"num_hidden_layers": 2}, max_position=8192)
    config = HelixConfig(
        model=with_weights(model, WEIGHTS),
        cache=CacheConfig(num_pages=1024),
        scheduler=SchedulerConfig(max_batch=32, prefill_chunk=512),
        speculative=SpeculativeConfig(method=METHOD),
    )
    with mode:
        llm = LLM(config)
        at_start = len(launches.new)
        rng = Random(METHOD)
        requests = [draw(rng, llm.spec.vocab_size) for _ in range(REQUESTS)]
        outputs = llm.generate(requests)
    made = [len(output.token_ids) for output in outputs]
    wanted = [request.sampling.max_tokens for request in requests if request.sampling is not None]
    print(json.dumps({"start": at_start, "late": launches.new[at_start:], "all made": made == wanted}))


if __name__ == "__main__":
    main()
