import pytest
import torch

from attention.append import append, append_kernel, rope_append, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("write", [append, append_kernel])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_owned_rows_land_in_their_slots_and_nothing_else_changes(write, block_size):
    pages = torch.zeros(6, 2, 3, block_size, 16, device=DEVICE)
    slot = torch.tensor([block_size * 5, -1, block_size - 1, -1, 2 * block_size], device=DEVICE)
    qkv = torch.randn(5, 10, 16, device=DEVICE)
    k, v = qkv[:, 4:7], qkv[:, 7:10]  # strided rows, as a fused projection leaves them
    write(k, v, pages, slot)
    expected = torch.zeros_like(pages)
    for row, at in enumerate(slot.tolist()):
        if at >= 0:
            expected[at // block_size, 0, :, at % block_size] = k[row]
            expected[at // block_size, 1, :, at % block_size] = v[row]
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_rotation_equals_transformers(family):
    if family == "llama":
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    else:
        from transformers.models.glm.modeling_glm import apply_rotary_pos_emb
    half = 8 if family == "llama" else 4  # glm turns half of each head
    x = torch.randn(5, 3, 16)
    angle = torch.tensor([0, 1, 7, 100, 9999]).unsqueeze(1) * (10000.0 ** -(torch.arange(half) / half))
    emb = torch.cat((angle, angle), -1)
    expected, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], emb.cos()[None], emb.sin()[None]
    )
    ours = rotate(x, angle.cos(), angle.sin(), interleaved=family == "glm")
    torch.testing.assert_close(ours, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("interleaved", "half"), [(False, 8), (False, 4), (True, 8), (True, 4)])
@pytest.mark.parametrize("many_rows", [5, 6])
def test_one_kernel_does_what_the_steps_do(monkeypatch, norm, interleaved, half, many_rows):
    monkeypatch.setattr("attention.append.MANY_ROWS", many_rows)
    rows, heads, kv_heads, head_dim, block_size = 5, 4, 2, 16, 4
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    cos, sin = torch.randn(2, rows, half, device=DEVICE).unbind(0)
    slot = torch.tensor([3, -1, 9, 0, -1], device=DEVICE)
    weights = torch.randn(2, head_dim, device=DEVICE).unbind(0)
    pages, expected_pages = torch.zeros(2, 4, 2, kv_heads, block_size, head_dim, device=DEVICE).unbind(0)
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 1)
    if norm:
        q = torch.nn.functional.rms_norm(q, (head_dim,), weights[0], 1e-5)
        k = torch.nn.functional.rms_norm(k, (head_dim,), weights[1], 1e-5)
    append(rotate(k, cos, sin, interleaved=interleaved), v, expected_pages, slot)
    expected = rotate(q, cos, sin, interleaved=interleaved)
    norms = (*weights, 1e-5) if norm else None
    ours = rope_append(qkv.unsqueeze(0), cos, sin, pages, slot, num_heads=heads, norms=norms, interleaved=interleaved)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pages, expected_pages, rtol=1e-5, atol=1e-5)
