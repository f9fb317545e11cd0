"""What the decode group's cache holds after a transfer is, bit for bit, what the prefill group's holds.

Two ranks prefill and two decode, over 8 bits, with other layouts: on GPUs of their own where there are four.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helix.transfer.contents import BLOCK, LENGTH

ROOT = Path(__file__).parents[3]


def load(folder, side):
    """K and V of each (block, head) with their scales: [L, 2, tokens, bytes]; and the kind of device."""
    found, devices = {}, set()
    for rank in range(2):
        heads, device, blocks = torch.load(folder / f"{side}{rank}.pt")
        devices.add(device)
        for number, tokens in blocks.items():
            for head in range(*heads):
                assert (number, head) not in found
                found[number, head] = tokens[:, :, head - heads[0]]
    return found, devices


@pytest.mark.slow
def test_cache_contents_are_bit_for_bit_those_of_the_prefill_group(model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    ended = subprocess.run(
        [*command, "-m", "tests.helix.transfer.contents", model, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    (ours, devices), (theirs, _) = load(tmp_path, "decode"), load(tmp_path, "prefill")
    assert devices == {"cuda" if torch.cuda.device_count() >= 4 else "cpu"}
    assert set(ours) == set(theirs) == {(block, head) for block in range(-(-LENGTH // BLOCK)) for head in range(4)}
    for place, tokens in ours.items():
        assert tokens.dtype == torch.uint8 and tokens.any()
        assert torch.equal(tokens, theirs[place]), f"(block, head) = {place}"
