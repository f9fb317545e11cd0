"""Reading a rank's weights out of a safetensors checkpoint, slice by slice.

Opening a checkpoint checks all of it against the model's spec (files, tensor names, shapes, dtypes) from the files'
headers alone, before any model memory is taken, so that every rank comes to the same verdict. Reading then maps the
files and copies only the rank's own slices: beyond the destination, host memory holds one piece at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from parallel.layout import Range

from .fp4 import BLOCKS, GROUP, SCALES, widen_fp4
from .parts import Piece, Weight
from .quantization import BLOCK, SCALE_DTYPES, Quantization, num_blocks
from .quantized import TILE, VALUES, Matrix, Quantized, widen_slice
from .spec import ModelSpec
from .tensor_names import is_unread
from .weight_files import CheckpointError, few, open_files
from .weights import tensor_shapes

DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
DTYPE_8_BITS = "F8_E4M3"
DTYPE_4_BITS = "U8"  # two elements a byte
DUMMY_SPREAD = 16.0  # the standard deviation of random 8-bit values, whose largest is 448
# ends of names of tensors of quantised files that no weight needs: scales of activations, and of keys and values
UNREAD_SCALES = (
    "_proj.input_scale", "_proj.activation_scale", "_proj.k_scale", "_proj.v_scale", "self_attn.k_scale",
    "self_attn.v_scale", "self_attn.kv_scale",
)  # fmt: skip


__all__ = ["Checkpoint", "CheckpointError", "fill_dummy"]


class Checkpoint:
    """The weights of one model on disk, checked against its spec.

    path: a folder with safetensors files, see ``open_files``. spec: named as they are, see ``named_as_stored``.
    shapes: of the tensors that must be there, where they are not those of the spec's model.
    Raises CheckpointError for missing, truncated or pickle files, and for tensors that are missing or not as expected.
    Each rank opens the checkpoint for itself. Use as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path, spec: ModelSpec, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        self.path = Path(path).expanduser()
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._spec = spec
        for name, file in open_files(self.path).items():
            self._files[name] = file
            self._file_of |= dict.fromkeys(file.keys(), name)
        self._check(tensor_shapes(spec) if shapes is None else shapes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files; reading afterwards is an error. Closing twice does nothing."""
        self._files.clear()
        self._file_of.clear()

    def read(self, weight: Weight, out: Matrix) -> None:
        """Fill `out`, of shape weight.shape and any floating dtype, device and strides, with the weight's pieces.

        Converts to out's dtype, so that quantised pieces are widened one by one; but where `out` is quantised too,
        pieces and their scales are copied as they are. Only the pieces' own bytes are read, one piece at a time.
        Raises ValueError when the shapes differ or the pieces do not fill `out` exactly.
        """
        if tuple(out.shape) != weight.shape:
            raise ValueError(f"out has shape {tuple(out.shape)}, must be the weight's {weight.shape}")
        if out.numel() == 0:
            return
        filled = 0
        for piece in weight.pieces:
            if piece.rows is not None and piece.rows[0] == piece.rows[1]:
                continue
            data = self._slice(piece)
            stop = filled + data.shape[0]
            if data.shape[1:] != out.shape[1:] or stop > out.shape[0]:
                raise ValueError(
                    f"{piece} has shape {tuple(data.shape)}, which does not fit rows {filled} on of {weight.shape}"
                )
            _put(data, out, filled)
            filled = stop
        if weight.plus and isinstance(out, torch.Tensor):
            out += weight.plus
        if filled != out.shape[0]:
            names = ", ".join(piece.name for piece in weight.pieces)
            raise ValueError(f"the pieces of {names} fill {filled} rows, must be {out.shape[0]}")

    def cache_scales(self, layer: int) -> torch.Tensor | None:
        """Return the scales of all keys and all values that a layer caches: [2] float32; None where there are none.

        Files have two, or one for both. Raises CheckpointError where one of two is missing, or is no single positive
        number.
        """
        module = self._spec.names.k.format(layer=layer).removesuffix("k_proj.weight")
        parts = (("k", "v"), ("k_proj.k", "v_proj.v"), ("kv", "kv"))
        choices = [[f"{module}{part}_scale" for part in each] for each in parts]
        names = next((names for names in choices if any(name in self._file_of for name in names)), None)
        if names is None:
            return None
        scales = []
        for name in names:
            if name not in self._file_of:
                raise CheckpointError(f"{self.path} lacks {name}, whose shape must be (1,)")
            scale = self._files[self._file_of[name]].get_tensor(name).float()
            if scale.numel() != 1 or not 0 < float(scale) < torch.inf:
                shown = f"shape {tuple(scale.shape)}" if scale.numel() != 1 else f"the value {float(scale)}"
                raise CheckpointError(f"{self.path}: {name} has {shown}, must be one positive number")
            scales.append(scale.reshape(1))
        return torch.cat(scales)

    def _slice(self, piece: Piece) -> torch.Tensor | _EightBits:
        handle = self._tensor(piece.name)
        rows, cols = (slice(*span) if span else slice(None) for span in (piece.rows, piece.cols))
        if piece.index is not None and piece.name.endswith(BLOCKS):
            return self._widened(piece, piece.index)
        if piece.index is not None:
            which = slice(piece.index, piece.index + 1)
            if len(handle.get_shape()) == 2:
                found: torch.Tensor = handle[which, rows][0]
            else:
                found = handle[which, cols, rows][0].T if piece.turned else handle[which, rows, cols][0]
            return found if piece.parity is None else found[piece.parity :: 2]
        data: torch.Tensor = handle[rows] if len(handle.get_shape()) == 1 else handle[rows, cols]
        if not self._spec.is_quantized(piece.name):
            return _with_zeros(data, piece.zeros)
        whole = handle.get_shape()
        columns = piece.cols or (0, whole[1])
        scales = self._scales(piece.name, piece.rows or (0, whole[0]), columns)
        data = _with_zeros(data.view(torch.uint8), piece.zeros).view(VALUES)
        return _EightBits(data, _with_zeros(scales.T, piece.zeros).T, columns[0] % BLOCK)

    def _widened(self, piece: Piece, index: int) -> torch.Tensor:
        """Return a piece of one of a stack of matrices in 4 bits, in float32."""
        blocks, scales = self._tensor(piece.name), self._tensor(piece.name.removesuffix(BLOCKS) + SCALES)
        start, stop = piece.cols or (0, blocks.get_shape()[2] * GROUP)
        rows, first = slice(*piece.rows) if piece.rows else slice(None), start // GROUP
        groups = slice(first, -(-stop // GROUP))
        wide = widen_fp4(blocks[index : index + 1, rows, groups][0], scales[index : index + 1, rows, groups][0])
        wide = wide[:, start - first * GROUP : stop - first * GROUP]
        return wide if piece.parity is None else wide[piece.parity :: 2]

    def _scales(self, name: str, rows: Range, columns: Range) -> torch.Tensor:
        """Return the scale of each block of the columns and each of the rows of a matrix: [B, N] float32."""
        how, blocks = self._quantization, num_blocks(*columns)
        scale = how.scale_of(name)
        if how.grain == "block":
            top, left = rows[0] // BLOCK, columns[0] // BLOCK
            grid = self._finite(scale, self._tensor(scale)[top : top + num_blocks(*rows), left : left + blocks])
            return grid[torch.arange(*rows) // BLOCK - top].T
        flat = self._finite(scale, self._files[self._file_of[scale]].get_tensor(scale)).reshape(1, -1)
        return (flat if how.grain == "tensor" else flat[:, slice(*rows)]).expand(blocks, rows[1] - rows[0])

    def _finite(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """Return scales in float32; CheckpointError where one is no number."""
        scales = scales.float()
        if not bool(scales.isfinite().all()):
            raise CheckpointError(f"{self.path}: {name} has scales that are no finite numbers; fetch the file again")
        return scales

    @property
    def _quantization(self) -> Quantization:
        assert self._spec.quantization is not None
        return self._spec.quantization

    def _tensor(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)

    def integers(self, name: str, length: int, *, up_to: int) -> torch.Tensor:
        """Return a tensor of integers [length] that are distances of ids to others below ``up_to``; 0 without one.

        Raises CheckpointError when it is none such.
        """
        if name not in self._file_of:
            return torch.zeros(length, dtype=torch.int64)
        values = self._files[self._file_of[name]].get_tensor(name).long()
        ids = values + torch.arange(len(values))
        if len(values) != length or int(ids.min()) < 0 or int(ids.max()) >= up_to:
            raise CheckpointError(f"{self.path}: {name} must lead {length} ids to some of {up_to}")
        return values

    def _check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the tensors are those that are expected."""
        spec = self._spec
        missing = [name for name in expected if name not in self._file_of]
        further = spec.names.next_input.format(layer=spec.num_layers)
        if spec.predicts_next and further in missing:
            raise CheckpointError(
                f"{self.path} has no layer that predicts one token further ({further} is not there); use "
                "speculative=ngram or speculative=draft_model instead of mtp"
            )
        if missing:
            raise CheckpointError(f"{self.path} lacks {len(missing)} tensors of a {spec.family} model: {few(missing)}")
        scales = set()
        for name, shape in expected.items():
            handle = self._tensor(name)
            found, dtype = tuple(handle.get_shape()), handle.get_dtype()
            if found != shape:
                raise CheckpointError(f"{self.path}: {name} has shape {found}, config.json implies {shape}")
            if spec.is_quantized(name):
                self._check_quantized(name, shape, dtype)
                scales.add(self._quantization.scale_of(name))
            elif name.endswith((BLOCKS, SCALES)):
                if dtype != DTYPE_4_BITS:
                    raise CheckpointError(f"{self.path}: {name} has dtype {dtype}, must be {DTYPE_4_BITS}, of MXFP4")
            elif dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: {name} has dtype {dtype}, must be one of {', '.join(DTYPES)}{self._why_not(dtype)}"
                )
        if spec.caches_in_8_bits and spec.latent is None:
            for layer in range(spec.num_layers):
                self.cache_scales(layer)
        layers = spec.names.q.removesuffix("self_attn.q_proj.weight")
        prefixes = tuple(layers.format(layer=layer) for layer in range(spec.num_layers))

        def ignored(name: str) -> bool:
            return is_unread(name) or (spec.quantization is not None and name.endswith(UNREAD_SCALES))

        unused = sorted(
            name
            for name in self._file_of
            if name.startswith(prefixes) and name not in expected and name not in scales and not ignored(name)
        )
        if unused:
            raise CheckpointError(
                f"{self.path} has {len(unused)} tensors that a {spec.family} model does not use: {few(unused)}"
            )

    def _why_not(self, dtype: str) -> str:
        """Return why a tensor of this dtype is not taken for a quantised one, where it may be meant as one."""
        if not dtype.startswith(("F8_", "I", "U")):
            return ""
        if self._spec.quantization is None:
            return "; config.json has no quantization_config that says what it means"
        return "; quantization_config does not name it among what is quantised"

    def _check_quantized(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise CheckpointError unless a matrix has 8 bits, and the scale that its shape and the config imply."""
        if dtype != DTYPE_8_BITS:
            raise CheckpointError(
                f"{self.path}: {name}, of shape {shape}, has dtype {dtype}, but quantization_config implies "
                f"{DTYPE_8_BITS}; name its module among those that are not quantised"
            )
        scale, shapes = self._quantization.scale_of(name), self._quantization.scale_shapes(shape)
        rule = f"must be {shapes[0]}, a scale for each {self._quantization.grain} of {name} {shape}"
        if scale not in self._file_of:
            raise CheckpointError(f"{self.path} lacks {scale}, whose shape {rule}")
        handle = self._tensor(scale)
        found, dtype = tuple(handle.get_shape()), handle.get_dtype()
        if found not in shapes:
            turned = "; it is transposed" if found[::-1] in shapes else ""
            raise CheckpointError(f"{self.path}: {scale} has shape {found}, {rule}{turned}")
        if dtype not in SCALE_DTYPES:
            raise CheckpointError(f"{self.path}: {scale} has dtype {dtype}, must be one of {', '.join(SCALE_DTYPES)}")


@dataclass(frozen=True)
class _EightBits:
    """A slice as the file has it: values [N, K], the scales of its rows in each block of columns, and its shift."""

    values: torch.Tensor
    scales: torch.Tensor
    shift: int

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def _with_zeros(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat((rows, rows.new_zeros(count, *rows.shape[1:]))) if count else rows


def _put(data: torch.Tensor | _EightBits, out: Matrix, start: int) -> None:
    """Copy rows of `data` to those of `out` from `start` on."""
    if isinstance(out, Quantized):
        assert isinstance(data, _EightBits) and data.shift == out.shift, "a quantised weight has quantised pieces only"
        out.put(start, data.values, data.scales)
        return
    if isinstance(data, _EightBits):
        data = widen_slice(data.values, data.scales, data.shift, out.dtype)
    out[start : start + data.shape[0]].copy_(data)


def fill_dummy(role: str, columns: int, out: Matrix, generator: torch.Generator | None = None) -> None:
    """Fill one rank's weight of this `role` with random values, made on its own device: norms 1, biases small.

    Matrices get a standard deviation of 1 / sqrt(columns), embeddings 1; `columns` are those of the whole matrix, so
    that what row-parallel ranks sum is as large in every layout. `generator` must be of out's device; ranks that hold
    copies of one weight agree only if they fill from the same seed.
    """
    if isinstance(out, Quantized):
        out.scales.fill_(columns**-0.5 / DUMMY_SPREAD)
        num_rows, width = out.shape
        step = max(1, TILE // max(1, width))
        for start in range(0, num_rows, step):
            shape = (min(step, num_rows - start), width)
            values = torch.empty(shape, device=out.values.device).normal_(0.0, DUMMY_SPREAD, generator=generator)
            out.put_values(start, values.to(VALUES))
    elif role.endswith("norm"):
        out.fill_(1.0)
    elif role.endswith(("bias", "sinks")):
        out.normal_(0.0, 0.02, generator=generator)
    elif role == "embedding":
        out.normal_(0.0, 1.0, generator=generator)
    else:
        out.normal_(0.0, columns**-0.5, generator=generator)
