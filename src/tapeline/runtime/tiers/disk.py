"""A file without a name for what has left the device: nothing is left of it, however the process ends."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import threading
import zlib
from pathlib import Path

import torch

from tapeline.errors import FullTierError, TierError
from tapeline.runtime.tiers.gds import DeviceFile, open_device_file
from tapeline.runtime.tiers.host_memory import HostMemory
from tapeline.runtime.tiers.regions import Regions
from tapeline.runtime.tiers.streams import Event, Machine, Stream
from tapeline.runtime.tiers.tier import DISK
from tapeline.units import format_bytes

ALIGNMENT = 4096
"""Direct I/O wants offsets, lengths and addresses at multiples of the block size."""
_CHUNK = 4 * 2**20
_CPU = torch.device("cpu")


class DiskFile:
    """Places in an anonymous file of the planned size, whose room is claimed before anything is computed.

    The file is opened without a name where the system can do that, and unlinked at once elsewhere. Reads and writes go past the
    page cache where the file system allows it, so that bytes on the disk do not take the host's memory.

    Args:
        folder: where the disk is; a folder that only this user can enter is made in it, and removed at once.
        num_bytes: size.
        device: whose tensors are read and written.
        has_checksums: compare what is read with what was written, at the cost of a pass over the bytes each way.

    Raises:
        TierError: if the folder cannot be used or has not that much room.
    """

    def __init__(
        self, folder: Path | str, num_bytes: int, device: torch.device = _CPU, *, has_checksums: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.num_bytes = -(-max(1, num_bytes) // ALIGNMENT) * ALIGNMENT
        self.regions = Regions(self.num_bytes, ALIGNMENT)
        self.has_checksums = has_checksums
        self.bytes_written = self.bytes_read = 0
        self._buffers = threading.local()
        self._opened: list[HostMemory] = []
        self.device_file: DeviceFile | None = None
        self._file, self.is_direct = self._open()
        try:
            self._claim()
        except BaseException:
            self.close()
            raise
        self.device_file = None if has_checksums else open_device_file(self._file, device)

    def _claim(self) -> None:
        """Have the room, by writing to all of it where the system has no call for that."""
        claim = getattr(os, "posix_fallocate", None)  # not on macOS
        if claim is not None:
            try:
                claim(self._file, 0, self.num_bytes)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise self._failure("claim room", error) from error
            else:
                return
        empty = HostMemory(_CHUNK, _CPU)
        assert empty.map is not None, "opened just now"
        with memoryview(empty.map) as zeros:
            for start in range(0, self.num_bytes, _CHUNK):
                size = min(_CHUNK, self.num_bytes - start)
                self._all(os.pwrite, zeros[:size], start, size)
        empty.close()

    def take(self, num_bytes: int) -> DiskSlot | None:
        """A place for so many bytes; ``None`` if there is none."""
        place = self.regions.take(num_bytes)
        return None if place is None else DiskSlot(self, place[0], num_bytes, place[1])

    def close(self) -> None:
        """Give the room back; no job may be on its way. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self.device_file is not None:
            self.device_file.close()
        while self._opened:
            self._opened.pop().close()

    def write(self, offset: int, source: torch.Tensor) -> int:
        """Write bytes; returns their checksum, or 0."""
        checksum = 0
        if self.device_file is None:
            checksum = self._in_pieces(offset, source, is_write=True)
        else:
            self.device_file.write(offset, source)
        self.bytes_written += source.nbytes
        return checksum

    def read(self, offset: int, target: torch.Tensor) -> int:
        """Read bytes; returns their checksum, or 0."""
        checksum = 0
        if self.device_file is None:
            checksum = self._in_pieces(offset, target, is_write=False)
        else:
            self.device_file.read(offset, target)
        self.bytes_read += target.nbytes
        return checksum

    def _in_pieces(self, offset: int, tensor: torch.Tensor, *, is_write: bool) -> int:
        """Through memory that begins at a page, the last piece rounded up to the alignment."""
        memory, checksum, start = self._buffer(tensor.device), 0, 0
        assert memory.map is not None, "it is open as long as its thread"
        while start < tensor.nbytes:
            size = min(_CHUNK, tensor.nbytes - start)
            rounded = -(-size // ALIGNMENT) * ALIGNMENT
            with memoryview(memory.map)[:rounded] as piece:
                if is_write:
                    _copy(memory, tensor, start, size, is_write=True)
                    self._all(os.pwrite, piece, offset + start, rounded)
                else:
                    self._all(_pread, piece, offset + start, rounded)
                    _copy(memory, tensor, start, size, is_write=False)
                if self.has_checksums:
                    checksum = zlib.crc32(piece[:size], checksum)
            start += size
        if not self.is_direct:
            self._forget(offset, tensor.nbytes, is_write=is_write)
        return checksum

    def _forget(self, offset: int, size: int, *, is_write: bool) -> None:
        """Where the page cache is in between, let it keep nothing: it would be the memory that the disk is to save."""
        if hasattr(os, "posix_fadvise"):
            if is_write:
                os.fdatasync(self._file)
            os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_DONTNEED)

    def _all(self, call: object, piece: memoryview, offset: int, size: int) -> None:
        """One call, or several where the system does less than was asked."""
        done = 0
        while done < size:
            try:
                moved = call(self._file, piece[done:], offset + done)  # type: ignore[operator]
            except OSError as error:
                raise self._failure("write" if call is os.pwrite else "read", error) from error
            if moved <= 0:
                raise TierError(f"The file in {self.folder} ends at byte {offset + done}: somebody has cut it.")
            done += moved

    def _open(self) -> tuple[int, bool]:
        direct = getattr(os, "O_DIRECT", 0)
        for flags in (direct, 0) if direct else (0,):
            try:
                return self._open_unnamed(flags), bool(flags)
            except OSError as error:
                if not flags or error.errno != errno.EINVAL:
                    raise self._failure("open a file", error) from error
        raise AssertionError("the last try opens or raises")

    def _open_unnamed(self, flags: int) -> int:
        unnamed = getattr(os, "O_TMPFILE", 0)
        if unnamed:
            try:
                return os.open(self.folder, os.O_RDWR | unnamed | flags, 0o600)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT) or not self.folder.is_dir():
                    raise
        own = Path(tempfile.mkdtemp(prefix="tapeline-", dir=self.folder))
        try:
            return os.open(own / "slots", os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o600)
        finally:
            (own / "slots").unlink(missing_ok=True)
            own.rmdir()

    def _failure(self, what: str, error: OSError) -> TierError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return FullTierError(
                f"The disk of {self.folder} has no room for {format_bytes(self.num_bytes)}: make room, name another offload_dir, or "
                "a smaller disk_budget.",
                tier=DISK,
            )
        return TierError(f"Cannot {what} in {self.folder}: {error.strerror or error}.")

    def _buffer(self, device: torch.device) -> HostMemory:
        """One for each thread."""
        found: HostMemory | None = getattr(self._buffers, "value", None)
        if found is None:
            found = self._buffers.value = HostMemory(_CHUNK, device, says=False)
            self._opened.append(found)
        return found


class DiskSlot:
    """A place in the file."""

    def __init__(self, file: DiskFile, begin: int, num_bytes: int, busy: list[Event]) -> None:
        self.file, self.begin, self.num_bytes, self.busy = file, begin, num_bytes, busy
        self._checksum = 0
        self._is_free = False

    def write(self, machine: Machine, stream: Stream, source: torch.Tensor) -> None:
        machine.run(stream, lambda: self._write(source))

    def read(self, machine: Machine, stream: Stream, target: torch.Tensor) -> None:
        machine.run(stream, lambda: self._read(target))

    def free(self) -> None:
        if not self._is_free:
            self._is_free = True
            self.file.regions.give_back(self.begin, self.num_bytes, self.busy)

    def _write(self, source: torch.Tensor) -> None:
        self._checksum = self.file.write(self.begin, source)

    def _read(self, target: torch.Tensor) -> None:
        checksum = self.file.read(self.begin, target)
        if checksum != self._checksum and self.file.has_checksums:
            raise TierError(
                f"The disk of {self.file.folder} gave other bytes than were written ({target.nbytes} at {self.begin}): do not trust it."
            )


def _pread(file: int, piece: memoryview, offset: int) -> int:
    return os.preadv(file, [piece], offset)


def _copy(memory: HostMemory, tensor: torch.Tensor, start: int, size: int, *, is_write: bool) -> None:
    """Between the beginning of host memory and a part of a tensor; over when the call returns."""
    assert memory.tensor is not None, "it is open"
    if tensor.device.type != "cpu":
        here, there = memory.tensor[:size], tensor[start : start + size]
        here.copy_(there) if is_write else there.copy_(here)
        return
    place = tensor.data_ptr() + start
    ctypes.memmove(*((memory.address, place) if is_write else (place, memory.address)), size)
