"""Compile the generic kernels for a GPU that is not there, as launches on it would be cut; a line of JSON for each.

    python -m tests.attention.compile_kernels ARCH LIMIT CASE ...

ARCH is a compute capability such as 86, LIMIT the bytes of shared memory that a program may take there, and each CASE
one of CASES. It is a process of its own because Triton's interpreter must not be on when kernels are decorated.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attention import append, latent_append, latent_kv, split_kv
from attention.backends import select_backend
from helix.models import experts, routing
from helix.models.spec import Experts
from tests.attention.cases import in_8_bits, make_case, partials_of, shard

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}  # fmt: skip
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def attend(dtype: torch.dtype, *, heads: int, kv_heads: int, head_dim: int, rows: int, value_dim: int | None = None,
           eight_bits: bool = False):  # fmt: skip
    """A step of one sequence of 600 tokens."""
    case = make_case(0, lengths=[600], num_rows=[rows], heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                     block_size=64, kvp=1, dtype=dtype, value_dim=value_dim)  # fmt: skip
    pages, step = shard(case, 0, "cpu")
    held = in_8_bits(pages, value_dim) if eight_bits else pages
    partials_of(select_backend("triton", torch.device("cpu")), case.q, held, step, 1.0, value_dim)


def append_all() -> None:
    """Keys, values and latents of four rows, as they are and in 8 bits."""
    slot, cos = torch.arange(4), torch.zeros(4, 32)
    for held in (torch.zeros(4, 2, 2, 64, 128).bfloat16(), in_8_bits(torch.zeros(4, 2, 2, 64, 128).bfloat16())):
        qkv = torch.zeros(1, 4, 12 * 128).bfloat16()
        append.append_kernel(qkv[0].unflatten(1, (12, 128))[:, :2], None, held, slot)
        append.rope_append(qkv, cos, cos, held, slot, num_heads=8, norms=None, interleaved=False)
    flat, norm = torch.zeros(1, 4, 64 + 576).bfloat16(), torch.zeros(512).bfloat16()
    for held in (torch.zeros(4, 1, 1, 64, 576).bfloat16(), in_8_bits(torch.zeros(4, 1, 1, 64, 576).bfloat16(), 512)):
        latent_append.latent_append(
            flat, cos, cos, held, slot, latent_norm=norm, q_norm=None, eps=1e-6, interleaved=True
        )


def mix(dtype: torch.dtype, rows: int) -> None:
    """A mixture of 8 experts over so many rows."""
    x, logits = torch.zeros(rows, 256, dtype=dtype), torch.zeros(rows, 8)
    gate_up, down = torch.zeros(8, 256, 256, dtype=dtype), torch.zeros(8, 256, 128, dtype=dtype)
    how = Experts(num_experts=8, num_chosen=2, ffn_size=128, normalised=True)
    experts.mix_queued(x, logits, gate_up, down, experts=how, first=0)


CASES: dict[str, Callable[[], None]] = {
    "decode": lambda: attend(torch.bfloat16, heads=32, kv_heads=8, head_dim=128, rows=1),
    "prefill": lambda: attend(torch.bfloat16, heads=32, kv_heads=8, head_dim=128, rows=64),
    "prefill-256": lambda: attend(torch.bfloat16, heads=8, kv_heads=2, head_dim=256, rows=64),
    "prefill-float32": lambda: attend(torch.float32, heads=32, kv_heads=8, head_dim=128, rows=64),
    "latents": lambda: attend(torch.bfloat16, heads=128, kv_heads=1, head_dim=576, rows=1, value_dim=512),
    "latents-float32": lambda: attend(torch.float32, heads=16, kv_heads=1, head_dim=576, rows=1, value_dim=512),
    "decode-8-bits": lambda: attend(torch.bfloat16, heads=32, kv_heads=8, head_dim=128, rows=1, eight_bits=True),
    "latents-8-bits": lambda: attend(
        torch.bfloat16, heads=16, kv_heads=1, head_dim=576, rows=1, value_dim=512, eight_bits=True
    ),
    "append": append_all,
    "experts": lambda: mix(torch.bfloat16, 1024),
    "few-experts": lambda: mix(torch.bfloat16, 8),
    "experts-float32": lambda: mix(torch.float32, 1024),
}
KERNELS = (
    split_kv._split_kernel, latent_kv._latent_kernel, experts._gate_up_kernel, experts._down_kernel,
    routing.queue_kernel, experts._combine_kernel, append._append_kernel, append._rope_append_kernel,
    latent_append._append_kernel,
)  # fmt: skip


def launches_of(case: str, limit: int) -> list[Launch]:
    """Return what a case would launch where a program may take so many bytes, launching nothing."""
    launches: list[Launch] = []

    def recorder(kernel: Any) -> Callable[..., None]:
        return lambda *args, grid, warmup, **settings: launches.append((kernel, args, settings))

    for room in (split_kv, latent_kv, experts):
        room.shared_bytes = lambda device: limit
    for kernel in KERNELS:
        kernel.run = recorder(kernel)
    triton.knobs.runtime.interpret = True  # the back end asks whether kernels could run here
    CASES[case]()
    triton.knobs.runtime.interpret = False
    return launches


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile a launch as Triton would on a GPU of this architecture, addresses and sizes aligned as they are."""
    kernel, args, settings = launch
    values = dict(zip(kernel.arg_names, args, strict=False)) | settings
    signature, constants, attributes = {}, {}, {}
    for place, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: settings[name] for name in ("num_warps", "num_stages") if name in settings}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"kernel": kernel.fn.__name__, "shared": compiled.metadata.shared, "bytes": len(compiled.asm["cubin"])}


if __name__ == "__main__":
    arch, limit, *cases = sys.argv[1:]
    for case in cases:
        for launch in launches_of(case, int(limit)):
            print(json.dumps({"case": case, **compile_launch(launch, int(arch))}), flush=True)
