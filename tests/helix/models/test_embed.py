import pytest
import torch

from helix.models.embed import embed
from helix.models.rope import RopeSpec


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_does_what_the_steps_do(dtype):
    half, hidden = 24, 96
    inv_freq = 10000.0 ** -(torch.arange(half) / half)
    rope = RopeSpec(inv_freq=inv_freq, attention_scaling=1.25, interleaved=False, rotary_dim=2 * half)
    token_ids, chosen, row_seq = torch.tensor([3, -1, 0, -1]), torch.tensor([7, 1, 9]), torch.tensor([0, 2, 1, 1])
    positions = torch.tensor([0, 1, 1_048_575, 4_000_000])  # far angles need an exact reduction
    embedding, weight = torch.randn(10, hidden).to(dtype), torch.randn(hidden).to(dtype)
    real = torch.where(token_ids < 0, chosen[row_seq], token_ids)
    how = {"eps": 1e-5, "rope": rope, "scale": 13.25}
    expected = embed(real, positions, embedding=embedding, weight=weight, inv_freq=inv_freq, **how)
    ours = embed(
        token_ids.cuda(), positions.cuda(), embedding=embedding.cuda(), weight=weight.cuda(), inv_freq=inv_freq.cuda(),
        chosen=(chosen.cuda(), row_seq.cuda()), **how,
    )  # fmt: skip
    assert torch.equal(ours[0].cpu(), expected[0])
    torch.testing.assert_close(ours[1].cpu(), expected[1], rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    for angle, theirs in zip(ours[2:], expected[2:], strict=True):
        torch.testing.assert_close(angle.cpu(), theirs, rtol=1e-5, atol=1e-5)
