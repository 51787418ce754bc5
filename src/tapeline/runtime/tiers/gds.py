"""A file that a CUDA device reads and writes itself (GPUDirect Storage), where the package kvikio is installed.

Where the system lacks the driver for it, kvikio goes through the host on its own.
"""

from __future__ import annotations

from typing import Any

import torch

from tapeline.errors import TierError


class DeviceFile:
    """An open file, for tensors on a device.

    Args:
        file: its descriptor, readable and writable; it stays the caller's, and open.

    Raises:
        ImportError: if kvikio is not installed.
        OSError, RuntimeError: from kvikio, if it cannot use the file.
    """

    def __init__(self, file: int) -> None:
        import kvikio  # the extra

        self._file: Any = kvikio.CuFile(f"/proc/self/fd/{file}", "r+")

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Write bytes, and wait for them."""
        self._all(self._file.pwrite, source, offset)

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Read bytes, and wait for them."""
        self._all(self._file.pread, target, offset)

    def close(self) -> None:
        """Let go of the file; safe to call twice."""
        self._file.close()

    def _all(self, call: Any, tensor: torch.Tensor, offset: int) -> None:
        try:
            moved = call(tensor, size=tensor.nbytes, file_offset=offset).get()
        except (OSError, RuntimeError) as error:
            raise TierError(f"kvikio cannot move {tensor.nbytes} bytes at {offset}: {error}") from error
        if moved != tensor.nbytes:
            raise TierError(f"kvikio moved {moved} bytes of {tensor.nbytes} at {offset}.")


def open_device_file(file: int, device: torch.device) -> DeviceFile | None:
    """The file as `device` sees it; ``None`` for what is no CUDA device, or without kvikio."""
    if device.type != "cuda":
        return None
    try:
        return DeviceFile(file)
    except (ImportError, OSError, RuntimeError):
        return None
