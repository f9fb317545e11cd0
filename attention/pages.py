"""Pages by plane: where in a page each thing stands that is cached of a token, for every kind of layer and dtype.

    cached                  planes of a page, one after the other, each at a multiple of 16 bytes
    K and V as they are     values [2, K, block_size, D] of the model's dtype
    latents as they are     values [1, 1, block_size, C + T] of the model's dtype
    K and V in 8 bits       values [2, K, block_size, D] e4m3, scales [2, K, block_size] float32
    latents in 8 bits       values [1, 1, block_size, C] e4m3, turned [1, 1, block_size, T] of 16 bits,
                            scales [1, 1, block_size] float32

Every token of every KV head has a scale of its own, so that tokens of any size keep 4 bits of each element: K biases
of some models are a hundred times as large as the rest of a key. What RoPE has turned of a latent's key keeps 16 bits.
Everything else (copies, host pages, transfers) sees bytes, and planes where it needs single tokens or heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
ALIGNMENT = 16  # bytes: what engines that copy tiles ask of a stride
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plane:
    """One part of a page.

    Attributes:
        name: values, turned or scales.
        dtype: of its elements.
        shape: [K and V, KV heads, block_size] and, but for scales, the elements of a token.
        offset: bytes of the page before it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one head of K or V."""
        return prod(self.shape[3:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the plane of one page."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class QuantizedPages:
    """One layer's pages in 8 bits: element d of a token's key or value is values[..., d] * scales[...].

    Attributes:
        values: [P, 2, K, block_size, D] float8_e4m3fn; of latents [P, 1, 1, block_size, C].
        scales: [P, 2, K, block_size] float32; of latents [P, 1, 1, block_size].
        turned: [P, 1, 1, block_size, T] of 16 bits, the end of each latent; None where there are no latents.
        dtype: of the queries that attend to them.
    """

    values: torch.Tensor
    scales: torch.Tensor
    turned: torch.Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape that pages as they are would have: [P, 2, K, block_size, D]."""
        *others, width = self.values.shape
        return torch.Size((*others, width + (0 if self.turned is None else self.turned.shape[-1])))

    @property
    def bytes(self) -> torch.Tensor:
        """``values`` as uint8, for kernels: not every GPU, and no interpreter, knows e4m3."""
        return self.values.view(torch.uint8)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.values.device

    def widen(self, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some pages [n] as they are meant, in float32 or a wider ``dtype``: [n, 2, K, block_size, D]."""
        dtype = torch.promote_types(dtype, torch.float32)
        wide = self.values[pages].to(dtype) * self.scales[pages].to(dtype).unsqueeze(-1)
        return wide if self.turned is None else torch.cat((wide, self.turned[pages].to(dtype)), -1)

    def tokens(self, slots: torch.Tensor) -> torch.Tensor:
        """Return what is meant in slots [n] (page * block_size + offset), in float32: [n, 2, K, D]."""
        page, offset = slots // self.shape[3], slots % self.shape[3]
        wide = self.bytes[page, :, :, offset].view(FP8).float() * self.scales[page, :, :, offset].unsqueeze(-1)
        return wide if self.turned is None else torch.cat((wide, self.turned[page, :, :, offset].float()), -1)

    def write(
        self,
        part: int,
        x_RKD: torch.Tensor,
        page: torch.Tensor,
        offset: torch.Tensor,
        fixed: torch.Tensor | None = None,
    ) -> None:
        """Quantise keys (part 0) or values (part 1) [R, K, D] and write them to offsets [R] of pages [R].

        ``fixed``, [2] float32, are the scales of all keys and of all values, where those are not made here.
        """
        width = self.values.shape[-1]
        values, scales = quantize(x_RKD[..., :width], None if fixed is None else fixed[part])
        self.values.view(torch.uint8)[page, part, :, offset] = values.view(torch.uint8)  # no e4m3 kernel indexes
        self.scales[page, part, :, offset] = scales
        if self.turned is not None:
            self.turned[page, part, :, offset] = x_RKD[..., width:].to(self.turned.dtype)


Pages = torch.Tensor | QuantizedPages
"""One layer's pages: [P, 2, K, block_size, D], K before V, or [P, 1, 1, block_size, D] of latents."""


def quantize(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [..., D] in 8 bits, and the float32 scales [...]: ``scale``, or what maps the largest of D to 448."""
    exact = x.float()
    largest = exact.abs().amax(-1)
    made = torch.where(largest == 0, 1.0, largest * (1.0 / LARGEST))
    scales = made if scale is None else scale.expand_as(made)
    return (exact / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(FP8), scales


def pages_to_wide(pages: Pages, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return some pages [n] of a layer, as they are or as they are meant: [n, 2, K, block_size, D]."""
    return pages.widen(index, dtype) if isinstance(pages, QuantizedPages) else pages[index]


def planes_of(pages: Pages) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return what kernels take of a layer's pages: values, scales, and whether there are any; else values twice."""
    if isinstance(pages, QuantizedPages):
        return pages.bytes, pages.scales, True
    return pages, pages, False


@dataclass(frozen=True)
class PageLayout:
    """What one layer's pages are made of, on one rank.

    Attributes:
        num_kv_heads: KV heads of the rank.
        block_size: tokens of a page.
        head_dim: elements of a head; of a latent with its turned key.
        dtype: of the model.
        rank: elements of a latent before its turned key; None where K and V are cached.
        in_8_bits: whether what is cached is quantised.
    """

    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    rank: int | None = None
    in_8_bits: bool = False

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of what is cached."""
        return FP8 if self.in_8_bits else self.dtype

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """The planes of a page."""
        parts = (2 if self.rank is None else 1, self.num_kv_heads, self.block_size)
        if not self.in_8_bits:
            return (Plane("values", self.dtype, (*parts, self.head_dim), 0),)
        kept = self.dtype if self.dtype in SIXTEEN_BITS else torch.bfloat16
        shapes = [("values", FP8, (*parts, self.rank or self.head_dim)), ("scales", torch.float32, parts)]
        if self.rank is not None:
            shapes.insert(1, ("turned", kept, (*parts, self.head_dim - self.rank)))
        planes: list[Plane] = []
        for name, dtype, shape in shapes:
            end = planes[-1].offset + planes[-1].num_bytes if planes else 0
            planes.append(Plane(name, dtype, shape, -(-end // ALIGNMENT) * ALIGNMENT))
        return tuple(planes)

    @property
    def page_bytes(self) -> int:
        """Bytes from one page of a layer to the next; a single plane has no padding behind it."""
        end = self.planes[-1].offset + self.planes[-1].num_bytes
        return -(-end // ALIGNMENT) * ALIGNMENT if self.in_8_bits else end

    @property
    def token_bytes(self) -> int:
        """Bytes that a layer caches of a token."""
        return sum(plane.num_bytes for plane in self.planes) // self.block_size

    def views(self, pool: torch.Tensor) -> list[torch.Tensor]:
        """Return the planes of a pool of bytes [..., page_bytes], uint8: each [..., *shape] of its dtype."""
        return [
            pool[..., plane.offset : plane.offset + plane.num_bytes].view(plane.dtype).unflatten(-1, plane.shape)
            for plane in self.planes
        ]

    def pages_of(self, views: Sequence[torch.Tensor]) -> Pages:
        """Return one layer's pages of the views [P, *shape] of its planes."""
        if not self.in_8_bits:
            return views[0]
        return QuantizedPages(views[0], views[-1], views[1] if self.rank is not None else None, self.dtype)
