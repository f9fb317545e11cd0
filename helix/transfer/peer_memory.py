"""Memory of a GPU that another process of this machine owns, mapped into this one: CUDA's handles between processes.

A handle names the allocation that memory lies in; what travels is the handle and where in it the memory begins.
"""

from __future__ import annotations

import ctypes
import logging

import torch

HANDLE_BYTES, _OFFSET_BYTES = 64, 8
_ENABLE_PEER_ACCESS = 1
_log = logging.getLogger(__name__)


class _Handle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_byte * HANDLE_BYTES)]


class Mapped:
    """Memory of another process, mapped here until it is closed.

    Args:
        exported: what ``export`` returned there.
        device: the GPU whose kernels are to reach it.

    Attributes:
        address: where it begins, for this process.

    Raises:
        OSError: when it cannot be mapped.
    """

    def __init__(self, exported: bytes, device: torch.device) -> None:
        base, self._device = ctypes.c_uint64(), device
        handle = _Handle.from_buffer_copy(exported)
        _call(device, "cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, ctypes.c_uint(_ENABLE_PEER_ACCESS))
        self._base = base.value
        self.address = base.value + int.from_bytes(exported[HANDLE_BYTES:], "little")

    def close(self) -> None:
        """Unmap it; no kernel may be using it."""
        _call(self._device, "cuIpcCloseMemHandle", ctypes.c_uint64(self._base))


def export(memory: torch.Tensor) -> bytes:
    """Return what other processes of this machine map a GPU's memory by; nothing where they cannot."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    try:
        address = ctypes.c_uint64(memory.data_ptr())
        _call(memory.device, "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        _call(memory.device, "cuIpcGetMemHandle", ctypes.byref(handle), base)
    except OSError as error:
        _log.info("transfer: pages on %s cannot be mapped by other processes: %s", memory.device, error)
        return b""
    return bytes(handle) + (memory.data_ptr() - base.value).to_bytes(_OFFSET_BYTES, "little")


def _call(device: torch.device, name: str, *args: object) -> None:
    """Call the driver in a device's context; OSError says what it answered."""
    driver = ctypes.CDLL("libcuda.so.1")
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # which makes the context this thread's
        status = getattr(driver, name)(*args)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise OSError(f"{name}: {(text.value or b'an unknown error').decode()}")
