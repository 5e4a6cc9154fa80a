"""Hand-off between processes of one host: the pool is a file in /dev/shm, a write is a memory copy.

The owner holds an exclusive lock on its file for as long as it lives. The kernel drops the lock with the
process, however it ends, so the lock tells writers that the owner is gone and tells newcomers which files
were left behind. The file gets its name only after it is locked: nobody can see it unlocked and alive.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...messages.memory_region import MemoryRegion
from ...runtime.completions import Completions
from ...runtime.containment import Containment
from ...runtime.errors import StartupError
from ..copy_plan import Run
from .base import (
    PAGE_ALIGNMENT,
    SCRATCH_BYTES,
    FairQueue,
    Write,
    WriteResult,
    WriteState,
    bounds_error,
    page_aligned,
)

logger = logging.getLogger(__name__)

PREFIX = "pdserve-pool-"  # of nothing else: what is abandoned under it is removed
MAX_BYTES_IN_FLIGHT = 1  # the one copier does one run at a time: more in flight would only undo the turns


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A peer's pool as this process sees it."""

    fd: int
    data: NDArray[np.uint8]

    def owner_is_gone(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True


@dataclass(frozen=True, slots=True)
class _Contact:
    handle: int
    region: MemoryRegion


class ShmBackend:
    """See TransferBackend. One thread does the copies, with the GIL released."""

    name = "shm"
    transport = "shm"
    settle_s = 0.0  # a result is given when the copier has let go: no byte can be under way after it

    def __init__(self, directory: Path = Path("/dev/shm")) -> None:
        if not directory.is_dir():
            raise StartupError(f"transfer backend shm needs {directory}; use --transfer-backend mooncake")
        self._directory = directory
        self._object_name = f"{PREFIX}{uuid.uuid4().hex}"
        self._fd = -1
        self._pool: mmap.mmap | None = None
        self._pool_bytes = 0
        self._source: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._mapped: dict[str, _Mapped] = {}  # session -> pool; the copier's own
        self._completions = Completions[WriteResult]()
        self._containment = Containment()  # the copier's own
        self._wake = threading.Condition()
        # What follows is guarded by `_wake`.
        self._queue = FairQueue(MAX_BYTES_IN_FLIGHT)
        self._contacts: list[_Contact] = []
        self._leaving: list[str] = []
        self._outstanding: set[int] = set()
        self._busy_since: float | None = None
        self._closing = False
        remove_abandoned(directory)
        self._copier = threading.Thread(target=self._copy_until_closed, name="shm-copier", daemon=True)
        self._copier.start()

    @property
    def num_outstanding(self) -> int:
        with self._wake:
            return len(self._outstanding)

    def allocate(self, num_bytes: int) -> memoryview:
        assert self._pool is None, "allocate is called once"
        total_bytes = page_aligned(num_bytes) + PAGE_ALIGNMENT
        self._fd = _create_locked(self._directory, self._object_name, total_bytes)
        self._pool = mmap.mmap(self._fd, total_bytes)
        self._pool_bytes = num_bytes
        self._source = np.frombuffer(self._pool, np.uint8, num_bytes)
        return memoryview(self._pool)[:num_bytes]

    def register(self) -> MemoryRegion:
        assert self._pool is not None, "allocate comes first"
        scratch = page_aligned(self._pool_bytes)
        return MemoryRegion(
            session=str(self._directory / self._object_name),
            address=0,
            num_bytes=scratch + PAGE_ALIGNMENT,
            scratch_address=scratch,
        )

    def release(self) -> None:
        # Of the file itself, so also where a peer has it mapped.
        assert self._pool is not None, "allocate comes first"
        self._pool.madvise(mmap.MADV_REMOVE)

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        with self._wake:
            self._outstanding.add(handle)
            self._contacts.append(_Contact(handle, region))
            self._wake.notify()

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        reason = bounds_error(run, region, self._pool_bytes)
        if reason:
            self._completions.push(_failed(handle, reason))
            return
        with self._wake:
            self._outstanding.add(handle)
            self._queue.put(Write(handle, region, run))
            self._wake.notify()

    def cancel(self, handles: Iterable[int]) -> None:
        with self._wake:
            cancelled = [handle for handle in handles if self._queue.cancel(handle)]
            self._outstanding.difference_update(cancelled)
        for handle in cancelled:
            self._completions.push(WriteResult(handle, WriteState.CANCELLED, "cancelled"))

    def disconnect(self, region: MemoryRegion) -> None:
        with self._wake:
            self._leaving.append(region.session)
            self._wake.notify()

    def poll(self) -> list[WriteResult]:
        return self._completions.drain()

    def fileno(self) -> int:
        return self._completions.fileno()

    def stuck_s(self, now: float) -> float:
        since = self._busy_since
        return 0.0 if since is None else max(0.0, now - since)

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._copier.join()
        self._completions.close()
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._directory / self._object_name)
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping has a descriptor of its own, and lives on
            os.close(self._fd)
            self._fd = -1

    # ---- the copier thread --------------------------------------------------------------------------

    def _copy_until_closed(self) -> None:
        while (work := self._next_work()) is not None:
            if isinstance(work, str):
                self._let_go(work)
                continue
            kind = "a first contact" if isinstance(work, _Contact) else "a write"
            result = self._containment.value_of(kind, partial(self._do, work), partial(_failed, work.handle))
            with self._wake:
                self._busy_since = None
                self._outstanding.discard(result.handle)
                if isinstance(work, Write):
                    self._queue.finished(work)
            self._completions.push(result)
        for session in list(self._mapped):
            self._let_go(session)

    def _do(self, work: _Contact | Write) -> WriteResult:
        return self._meet(work) if isinstance(work, _Contact) else self._copy(work)

    def _next_work(self) -> _Contact | Write | str | None:
        with self._wake:
            while not self._closing:
                if self._leaving:
                    return self._leaving.pop(0)
                work = self._contacts.pop(0) if self._contacts else self._queue.take()
                if work is not None:
                    self._busy_since = time.monotonic()
                    return work
                self._wake.wait()
        return None

    def _meet(self, contact: _Contact) -> WriteResult:
        region = contact.region
        try:
            mapped = self._map(region)
        except (OSError, ValueError) as error:  # the second: no path, or an empty file
            return _failed(contact.handle, f"cannot map {region.session!r}: {error}")
        if mapped.data.size < region.num_bytes or region.scratch_address + SCRATCH_BYTES > region.num_bytes:
            reason = (
                f"{region.session} holds {mapped.data.size} bytes where {region.num_bytes} were announced"
            )
            return _failed(contact.handle, reason)
        if mapped.owner_is_gone():
            return _failed(contact.handle, f"the owner of {region.session} is gone")
        mapped.data[region.scratch_address : region.scratch_address + SCRATCH_BYTES] = 1
        return WriteResult(contact.handle, WriteState.DONE)

    def _map(self, region: MemoryRegion) -> _Mapped:
        mapped = self._mapped.get(region.session)
        if mapped is None:
            path = Path(region.session)
            if path.parent != self._directory or not path.name.startswith(PREFIX):
                raise OSError(errno.EACCES, f"not a pool of pdserve in {self._directory}")
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                data = np.frombuffer(mmap.mmap(fd, 0), np.uint8)
            except BaseException:
                os.close(fd)
                raise
            mapped = self._mapped[region.session] = _Mapped(fd, data)
        return mapped

    def _copy(self, write: Write) -> WriteResult:
        mapped = self._mapped.get(write.region.session)
        if mapped is None:
            return _failed(write.handle, f"{write.region.session} was not met by a first contact")
        if mapped.owner_is_gone():
            return _failed(write.handle, f"the owner of {write.region.session} is gone")
        run = write.run
        dest = write.region.address + run.dest
        if dest + run.num_bytes > mapped.data.size:  # it announced less when it was met
            return _failed(write.handle, f"{write.region.session} has {mapped.data.size} bytes")
        mapped.data[dest : dest + run.num_bytes] = self._source[run.source : run.source + run.num_bytes]
        return WriteResult(write.handle, WriteState.DONE)

    def _let_go(self, session: str) -> None:
        mapped = self._mapped.pop(session, None)
        if mapped is not None:
            os.close(mapped.fd)  # the mapping goes with the last reference to its array


def _failed(handle: int, reason: str) -> WriteResult:
    return WriteResult(handle, WriteState.FAILED, reason)


def remove_abandoned(directory: Path) -> None:
    """Unlinks the pools whose owners died without closing them."""
    for path in directory.glob(f"{PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            logger.info("removed %s, left behind by a dead process", path)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
                logger.warning("cannot remove %s: %s", path, error)
        finally:
            os.close(fd)


def _create_locked(directory: Path, name: str, num_bytes: int) -> int:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Reserves the memory now: a page that tmpfs cannot provide later would be a SIGBUS.
        os.posix_fallocate(fd, 0, num_bytes)
        _give_name(fd, directory, name)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.ENOSPC:
            raise
        stat = os.statvfs(directory)
        free_bytes = stat.f_bavail * stat.f_frsize
        raise StartupError(
            f"{directory} has {free_bytes >> 20} MiB free and {num_bytes >> 20} MiB are needed: make the KV "
            f"pool smaller, enlarge {directory} (docker run --shm-size) or use --transfer-backend mooncake"
        ) from None
    return fd


def _give_name(fd: int, directory: Path, name: str) -> None:
    directory_fd = os.open(directory, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Only with a directory's descriptor does Python follow the link of /proc to the file behind it.
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory_fd, follow_symlinks=True)
    finally:
        os.close(directory_fd)
