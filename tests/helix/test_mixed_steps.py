"""Steps that hold decode rows and a prompt's chunk: neither changes what the other computes."""

import pytest

from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import make_llm

SHORT, LONG = list(range(3, 20)), [1 + i % 90 for i in range(60)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("mixed") / "model", layers=2)
    llm = make_llm(str(path), graphs=True, look_ahead=True, max_batch=4, prefill_chunk=6)
    yield llm
    llm.close()


def run(llm, *prompts, tokens=8):
    outputs = llm.generate(list(prompts), SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=2))
    return [(output.token_ids, output.logprobs) for output in outputs]


def test_a_chunk_beside_it_changes_no_bit_of_a_decode_row(llm):
    run(llm, SHORT)  # all but its last token are cached from here on, so it is never part of a chunk
    [alone] = run(llm, SHORT)
    beside, _ = run(llm, SHORT, LONG)
    assert beside == alone  # log-probabilities too, to the last bit


def test_rows_come_in_the_order_of_their_chunks(llm):
    """A long prompt that came first is still computed while one that came later decodes."""
    [expected], [short] = run(llm, LONG), run(llm, SHORT)
    first, second = run(llm, LONG, SHORT)
    assert first[0] == expected[0] and second[0] == short[0]
