import pytest
import torch

from attention.packed import lse_words, merge_packed, pack, pack_reference, unpack
from parallel.layout import split_evenly
from tests.attention.test_merge import DEVICE, adversarial, oracle, with_sinks

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])  # no bf16 in the interpreter


def joined(out, lse):
    return torch.cat([out, lse.unsqueeze(-1).view(out.dtype)], -1).contiguous()


@pytest.mark.parametrize("sinks_join", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "heads", "padded", "head_dim"), [(2, 4, 4, 64), (8, 3, 4, 128), (5, 1, 2, 16), (4, 2, 2, 80), (2, 5, 6, 512)]
)
def test_kernel_matches_the_oracle(dtype, n, heads, padded, head_dim, sinks_join):
    out, lse = adversarial(n, n, 7, padded, head_dim)
    out, sinks = out.to(dtype), torch.linspace(-3, 5, padded)
    merged = merge_packed(
        joined(out, lse).to(DEVICE), heads, head_dim, sinks[:heads].to(DEVICE) if sinks_join else None
    ).cpu()
    assert merged.shape == (7, heads, head_dim)
    expected = oracle(*(with_sinks(out, lse, sinks) if sinks_join else (out, lse)))[:, :heads]
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(merged.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "heads", "head_dim"), [(2, 8, 128), (4, 7, 80), (3, 11, 512)])
def test_every_rank_is_sent_its_heads_to_the_bit(dtype, n, heads, head_dim):
    [out], [lse] = adversarial(heads, 1, 5, heads, head_dim)
    out = out.to(dtype)
    message = pack(out.to(DEVICE), lse.to(DEVICE), n).cpu()
    assert message.shape == (n, 5, -(-heads // n), head_dim + lse_words(dtype))
    assert torch.equal(message.view(torch.uint8), pack_reference(out, lse, n).view(torch.uint8))
    for rank in range(n):
        first, stop = split_evenly(heads, n, rank)
        sent, sent_lse = unpack(message[rank, :, : stop - first], head_dim)
        torch.testing.assert_close(sent, out[:, first:stop], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(sent_lse, lse[:, first:stop])


def test_kernels_take_no_rows():
    message = pack(torch.empty(0, 8, 16, device=DEVICE), torch.empty(0, 8, device=DEVICE), 2)
    assert message.shape == (2, 0, 4, 16 + lse_words(torch.float32))
    assert merge_packed(message, 4, 16).shape == (0, 4, 16)
