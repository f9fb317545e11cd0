"""Pages in 8 bits: what appends write, what is read of them, and how many bytes they are."""

import pytest
import torch
import triton
import triton.language as tl

from attention.append import append_kernel, rope_append
from attention.backends import select_backend
from attention.eight_bits import as_byte, as_float
from attention.latent_append import latent_append
from attention.pages import FP8, PageLayout, QuantizedPages, quantize
from attention.ranges import PAGE
from attention.reference import partial_attention
from attention.widened import WidenedTokens
from tests.attention.cases import attend, in_8_bits, make_case, shard, widened

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SIZES = [(4, 2, 16, None), (3, 1, 80, None), (8, 1, 40, 32)]  # heads, KV heads, head size, elements of a latent
LAYOUTS = {  # what a token of 8 KV heads of 128, and a latent of 512 + 64, take in bytes
    2 * 8 * (128 + 4): PageLayout(8, 64, 128, torch.bfloat16, in_8_bits=True),
    512 + 4 + 2 * 64: PageLayout(1, 64, 576, torch.bfloat16, rank=512, in_8_bits=True),
}


@triton.jit
def _convert_kernel(value, byte, back, N: tl.constexpr):
    i = tl.arange(0, N)
    made = as_byte(tl.load(value + i))
    tl.store(byte + i, made)
    tl.store(back + i, as_float(made))


def test_kernels_round_to_8_bits_as_torch_does():
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:] + every[:-1]) / 2
    values = torch.cat((every, ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), torch.randn(1024) * 50))
    values = torch.nn.functional.pad(values, (0, 2048 - len(values))).to(DEVICE)
    byte, back = torch.empty(2048, dtype=torch.uint8, device=DEVICE), torch.empty(2048, device=DEVICE)
    _convert_kernel[(1,)](values, byte, back, N=2048)
    assert torch.equal(byte, values.to(FP8).view(torch.uint8)) and torch.equal(back, values.to(FP8).float())


@pytest.mark.parametrize("num_bytes", LAYOUTS)
def test_planes_stand_where_copies_of_tiles_can_begin(num_bytes):
    layout = LAYOUTS[num_bytes]
    assert layout.token_bytes == num_bytes and layout.page_bytes == 64 * num_bytes
    pages = layout.pages_of(layout.views(torch.zeros((3, layout.page_bytes), dtype=torch.uint8)))
    for plane in (pages.values, pages.scales, pages.turned):
        if plane is not None:
            assert plane.data_ptr() % 16 == 0 and plane.stride(0) * plane.element_size() == layout.page_bytes


def test_a_token_keeps_its_own_scale_beside_much_larger_ones():
    x = torch.randn(4, 2, 64)
    x[1], x[2] = 300 * x[1], 0
    values, scales = quantize(x)
    wide = values.float() * scales.unsqueeze(-1)
    assert ((wide - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) / 448 / 512).all()
    assert torch.equal(values[1].float().abs().amax(-1), torch.full((2,), 448.0))


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "value_dim"),
    [
        pytest.param(dtype, *size, marks=() if dtype == DTYPES[number % len(DTYPES)] else pytest.mark.slow)
        for dtype in DTYPES
        for number, size in enumerate(SIZES)
    ],
)
def test_attention_equals_that_over_what_8_bits_mean(dtype, heads, kv_heads, head_dim, value_dim):
    """The reference to its precision, and the kernels to theirs, for few rows and for many."""
    case = make_case(
        head_dim, lengths=[70, 300, 1], num_rows=[1, 40, 1], heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        block_size=16, kvp=2, value_dim=value_dim, dtype=dtype,
    )  # fmt: skip
    for rank in range(2):
        plain, rows = shard(case, rank, DEVICE)
        plain *= 1 + 99 * torch.rand(plain.shape[:-1], device=DEVICE).unsqueeze(-1) ** 8  # scales far apart
        pages, q = in_8_bits(plain, value_dim), case.q.to(DEVICE)
        exact, exact_lse = partial_attention(q.double(), widened(pages), rows, 0.01, value_dim=value_dim)
        ours, lse = partial_attention(q.float(), pages, rows, 0.01, value_dim=value_dim)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-3)
        rounded, _ = partial_attention(q, widened(pages).to(dtype), rows, 0.01, value_dim=value_dim)
        kernel, lse = attend(select_backend("triton", torch.device(DEVICE)), q, pages, rows, 0.01, value_dim)
        bound = 2 * (rounded.double() - exact).abs().max() + (2e-4 if dtype == torch.float32 else 0.1)
        assert (kernel.double() - exact).abs().max() <= bound
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


def test_tokens_are_widened_to_pages_of_their_own():
    plain = torch.randn(9, 2, 3, 4, 24, device=DEVICE) * 100
    pages, slots = in_8_bits(plain), torch.randint(0, 36, (2 * PAGE,), device=DEVICE).int()
    layout = PageLayout(3, 4, 24, torch.float32, in_8_bits=True)
    made = WidenedTokens(layout, 2 * PAGE, torch.device(DEVICE))
    made.make(slots, pages, {})
    expected = widened(pages, torch.float32).transpose(2, 3).transpose(1, 2).flatten(0, 1)[slots.long()]
    assert torch.equal(made.workspace.permute(0, 3, 1, 2, 4).flatten(0, 1), expected)


def same(ours: QuantizedPages, theirs: QuantizedPages) -> bool:
    """Whether two pages hold the same bytes; where 16 bits are rounded, which the interpreter does not, about."""
    if ours.turned is not None and theirs.turned is not None:
        torch.testing.assert_close(ours.turned, theirs.turned, rtol=2**-7, atol=0)
    return torch.equal(ours.bytes, theirs.bytes) and torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fixed", [None, (0.5, 0.125)])
def test_kernels_append_what_the_steps_do(dtype, fixed):
    fixed = None if fixed is None else torch.tensor(fixed, device=DEVICE)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    slot = torch.tensor([3, -1, 12, 9, -1], device=DEVICE)
    page, offset = slot[slot >= 0] // 4, slot[slot >= 0] % 4
    k, v = (randn(5, 2, 24).to(dtype) * 40 for _ in range(2))
    empty = torch.zeros(4, 2, 2, 4, 24, dtype=dtype, device=DEVICE)
    expected = in_8_bits(empty)
    for part, x in enumerate((k, v)):
        expected.write(part, x[slot >= 0], page, offset, fixed)
    pages = in_8_bits(empty)
    append_kernel(k, v, pages, slot, fixed)
    assert same(pages, expected)
    pages, qkv = in_8_bits(empty), torch.cat((randn(5, 3, 24).to(dtype), k, v), 1)
    still = torch.ones(5, 12, device=DEVICE), torch.zeros(5, 12, device=DEVICE)
    rope_append(
        qkv.flatten(1).unsqueeze(0), *still, pages, slot, num_heads=3, norms=None, interleaved=False, fixed=fixed
    )
    assert same(pages, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_latent_kernel_appends_what_the_steps_do(dtype):
    generator, slot = torch.Generator().manual_seed(0), torch.tensor([3, -1, 12], device=DEVICE)
    flat = torch.randn(3, 8 + 24 + 8, generator=generator).to(DEVICE, dtype)
    still = torch.ones(3, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    norm = torch.ones(24, dtype=dtype, device=DEVICE)
    plain, both = (torch.zeros(4, 1, 1, 4, 32, dtype=dtype, device=DEVICE) for _ in range(2))
    pages = in_8_bits(plain, 24)
    how = {"latent_norm": norm, "q_norm": None, "eps": 1e-6, "interleaved": True}
    latent_append(flat.unsqueeze(0), *still, pages, slot, **how)
    latent_append(flat.unsqueeze(0), *still, both, slot, **how)
    assert same(pages, in_8_bits(both, 24))
