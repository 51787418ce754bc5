"""How fast a disk writes and reads, with the page cache out of the way."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tapeline.cost.limits import free_disk_bytes
from tapeline.errors import UsageError
from tapeline.units import format_bytes

logger = logging.getLogger(__name__)

_FILE_BYTES = 256 * 2**20
_CHUNK_BYTES = 8 * 2**20
_THREADS = 4
_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskRates:
    """What one disk reaches with large sequential chunks from a few threads."""

    write_bandwidth: float
    """Bytes per second, until they are on the disk."""
    read_bandwidth: float
    """Bytes per second, from the disk."""
    is_direct: bool
    """Whether the page cache was bypassed; else it was flushed after writing, and dropped before reading."""


def measure_disk(
    folder: Path | str, *, num_bytes: int = _FILE_BYTES, max_seconds: float = _SECONDS
) -> DiskRates | None:
    """Write a file in a folder and read it back.

    The file has no name: whatever happens, nothing is left. On a slow disk less is written.

    Args:
        folder: where.
        num_bytes: size of the file; rounded up to whole chunks of 8 MiB.
        max_seconds: after this time of writing, no further chunk is begun; the same for reading.

    Returns:
        The rates; ``None`` outside Linux, where there is no way around the page cache that is used here.

    Raises:
        UsageError: if the folder does not exist, cannot be written, or is full.
    """
    if sys.platform != "linux":
        return None
    num_chunks = -(-num_bytes // _CHUNK_BYTES)
    free = free_disk_bytes(folder)
    if free < 2 * num_chunks * _CHUNK_BYTES:
        raise UsageError(
            f"Too little room in {str(folder)!r} to measure the disk: {format_bytes(free)} are free, "
            f"{format_bytes(2 * num_chunks * _CHUNK_BYTES)} are wanted. Choose another folder with --offload_dir."
        )
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return _measured(file.fileno(), num_chunks, max_seconds)
    except OSError as error:
        raise UsageError(
            f"Cannot write in {str(folder)!r} to measure the disk: {error.strerror or error}. "
            "Choose another folder with --offload_dir."
        ) from error


def _measured(handle: int, num_chunks: int, max_seconds: float) -> DiskRates:
    is_direct = _bypass_page_cache(handle)
    with mmap.mmap(-1, _CHUNK_BYTES) as content:  # direct I/O wants whole pages
        content.write(os.urandom(_CHUNK_BYTES))  # what a file system cannot compress
        written, seconds = _timed(lambda start: os.pwrite(handle, content, start), num_chunks, max_seconds, handle)
    write_bandwidth = written / seconds
    if not is_direct:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    with mmap.mmap(-1, _CHUNK_BYTES) as unused:  # all threads read into it: nobody looks
        read, seconds = _timed(lambda start: os.preadv(handle, [unused], start), written // _CHUNK_BYTES, max_seconds)
    return DiskRates(write_bandwidth=write_bandwidth, read_bandwidth=read / seconds, is_direct=is_direct)


def _bypass_page_cache(handle: int) -> bool:
    """Switch to direct I/O; whether the file system has it."""
    import fcntl

    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        logger.info("no direct I/O here: the page cache is flushed and dropped instead")
        return False
    return True


def _timed(
    move: Callable[[int], int], num_chunks: int, max_seconds: float, flushed: int | None = None
) -> tuple[int, float]:
    """Move chunks from a few threads; bytes moved and seconds."""
    start = time.perf_counter()

    def one(number: int) -> int:
        late = number > 0 and time.perf_counter() - start > max_seconds
        return 0 if late else move(number * _CHUNK_BYTES)

    with ThreadPoolExecutor(_THREADS) as pool:
        moved = sum(pool.map(one, range(num_chunks)))
    if flushed is not None:
        os.fsync(flushed)
    return moved, time.perf_counter() - start
