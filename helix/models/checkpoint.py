"""Reading a rank's weights out of a safetensors checkpoint, slice by slice.

Opening a checkpoint checks all of it against the model's spec (files, tensor names, shapes, dtypes) from the files'
headers alone, before any model memory is taken, so that every rank comes to the same verdict. Reading then maps the
files and copies only the rank's own slices: beyond the destination, host memory holds one piece at a time.
"""

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .spec import ModelSpec
from .tensor_names import is_unread
from .weight_files import CheckpointError, few, open_files
from .weights import Piece, Weight, tensor_shapes

if TYPE_CHECKING:
    import torch

DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; anything else is quantised or no weight


__all__ = ["Checkpoint", "CheckpointError", "fill_dummy"]


class Checkpoint:
    """The weights of one model on disk, checked against its spec.

    path: a folder with safetensors files, see ``open_files``. spec: named as they are, see ``named_as_stored``.
    Raises CheckpointError for missing, truncated or pickle files, and for tensors that are missing or not as expected.
    Each rank opens the checkpoint for itself. Use as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path, spec: ModelSpec) -> None:
        self.path = Path(path).expanduser()
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name, file in open_files(self.path).items():
            self._files[name] = file
            self._file_of |= dict.fromkeys(file.keys(), name)
        self._check(spec)

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

    def read(self, weight: Weight, out: "torch.Tensor") -> None:
        """Fill `out`, of shape weight.shape and any floating dtype, device and strides, with the weight's pieces.

        Converts to out's dtype. Only the pieces' own bytes are read, one piece at a time.
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
            out[filled:stop].copy_(data)
            filled = stop
        if filled != out.shape[0]:
            names = ", ".join(piece.name for piece in weight.pieces)
            raise ValueError(f"the pieces of {names} fill {filled} rows, must be {out.shape[0]}")

    def _slice(self, piece: Piece) -> "torch.Tensor":
        handle = self._files[self._file_of[piece.name]].get_slice(piece.name)
        rows, cols = (slice(*span) if span else slice(None) for span in (piece.rows, piece.cols))
        data: torch.Tensor = handle[rows] if len(handle.get_shape()) == 1 else handle[rows, cols]
        return data

    def _check(self, spec: ModelSpec) -> None:
        """Raise CheckpointError unless the tensors are those that `spec` implies."""
        expected = tensor_shapes(spec)
        missing = [name for name in expected if name not in self._file_of]
        if missing:
            raise CheckpointError(f"{self.path} lacks {len(missing)} tensors of a {spec.family} model: {few(missing)}")
        for name, shape in expected.items():
            handle = self._files[self._file_of[name]].get_slice(name)
            found, dtype = tuple(handle.get_shape()), handle.get_dtype()
            if found != shape:
                raise CheckpointError(f"{self.path}: {name} has shape {found}, config.json implies {shape}")
            if dtype not in DTYPES:
                raise CheckpointError(f"{self.path}: {name} has dtype {dtype}, must be one of {', '.join(DTYPES)}")
        layers = spec.names.q.partition("{layer}")[0]
        prefixes = tuple(f"{layers}{layer}." for layer in range(spec.num_layers))
        unused = sorted(
            name for name in self._file_of if name.startswith(prefixes) and name not in expected and not is_unread(name)
        )
        if unused:
            raise CheckpointError(
                f"{self.path} has {len(unused)} tensors that a {spec.family} model does not use: {few(unused)}"
            )


def fill_dummy(role: str, columns: int, out: "torch.Tensor", generator: "torch.Generator | None" = None) -> None:
    """Fill one rank's weight of this `role` with random values, made on its own device: norms 1, biases small.

    Matrices get a standard deviation of 1 / sqrt(columns), embeddings 1; `columns` are those of the whole matrix, so
    that what row-parallel ranks sum is as large in every layout. `generator` must be of out's device; ranks that hold
    copies of one weight agree only if they fill from the same seed.
    """
    if role.endswith("norm"):
        out.fill_(1.0)
    elif role.endswith("bias"):
        out.normal_(0.0, 0.02, generator=generator)
    elif role == "embedding":
        out.normal_(0.0, 1.0, generator=generator)
    else:
        out.normal_(0.0, columns**-0.5, generator=generator)
