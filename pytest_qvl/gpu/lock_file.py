"""One lock file per GPU: who holds it, by the kernel's ``flock``, and what its holder says of itself.

POSIX only: elsewhere :meth:`LockFile.try_lock` says so. Standard library only.
"""

from __future__ import annotations

import json
import os
import stat
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytest_qvl.gpu.errors import LeaseError

DIRECTORY_VARIABLE = "QVL_GPU_LEASES"
_NOTE_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, by its own account.

    Attributes:
        pid: Process number, as the holder sees it.
        command: Its command line, shortened.
        since: Seconds since the epoch.
        session: The run it belongs to; equal for the processes that one ``pytest`` command started.
        token: What its descendants inherit.
    """

    pid: int
    command: str
    since: float
    session: str
    token: str

    def __str__(self) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} ({self.command}) since {since}"


def usable_folder(folder: Path) -> Path:
    """The folder of the lock files, made if it is missing, for every user of the machine.

    Raises:
        LeaseError: It cannot be made, or is a link or a file.
    """
    try:
        folder.mkdir(parents=True)
        # Any user of the machine may lease, and nobody may take away another's lock file.
        folder.chmod(0o1777)
    except FileExistsError:
        pass
    except OSError as error:
        raise LeaseError(unusable(folder, error)) from None
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise LeaseError(unusable(folder, "it is no directory (a link is not followed)"))
    return folder


def unusable(path: Path, why: object) -> str:
    """The sentence for a folder or lock file that cannot be used."""
    return f"GPU leases need {path}, which cannot be used: {why}; fix it, or set {DIRECTORY_VARIABLE} to another folder"


class LockFile:
    """One lock file; never deleted, since a deleted file that is still locked lets two in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def try_lock(self) -> bool:
        """Whether the lock was free and is now held."""
        try:
            import fcntl
        except ImportError:
            raise LeaseError("GPU leases need flock, which this platform does not have") from None
        while True:
            fd = self._open()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            except OSError as error:
                os.close(fd)
                raise LeaseError(unusable(self.path, error)) from None
            if self._still_named(fd):
                break
            os.close(fd)
        self._fd = fd
        _held.add(self)
        return True

    def sign(self, holder: Holder) -> None:
        """Write down who holds the lock, for whoever waits.

        Raises:
            OSError: The disk is full, or the file is gone.
        """
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(asdict(holder)).encode(), 0)

    def holder(self) -> Holder | None:
        """The holder as the file names it; ``None`` where nobody has signed yet, or the content is no signature."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return _parse(os.read(fd, _NOTE_BYTES))
        finally:
            os.close(fd)

    def unlock(self) -> None:
        """Erase the signature and release the lock."""
        os.ftruncate(self._fd, 0)
        self.drop()

    def drop(self) -> None:
        """Close this process's handle; the lock itself ends with its last handle."""
        _held.discard(self)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> int:
        # O_NOFOLLOW, the link count and the file type: the folder is everybody's, and this process will
        # write. Without O_CREAT first: the kernel refuses that on other people's files in such a folder.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            try:
                fd = os.open(self.path, flags)
            except FileNotFoundError:
                fd = self._create(flags)
        except OSError as error:
            raise LeaseError(unusable(self.path, error)) from None
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(fd)
            raise LeaseError(unusable(self.path, "it is no plain file of its own"))
        return fd

    def _create(self, flags: int) -> int:
        try:
            fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return os.open(self.path, flags)
        os.fchmod(fd, 0o666)
        return fd

    def _still_named(self, fd: int) -> bool:
        # Somebody tidied the folder between open and lock: the lock is then on a file that nobody else will
        # find.
        try:
            return os.path.samestat(os.fstat(fd), self.path.lstat())
        except FileNotFoundError:
            return False


def _parse(note: bytes) -> Holder | None:
    try:
        data: Any = json.loads(note)
        holder = Holder(
            int(data["pid"]),
            str(data["command"]),
            float(data["since"]),
            str(data["session"]),
            str(data["token"]),
        )
        time.localtime(holder.since)
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return None
    # Shown on a terminal, and anybody may have written it.
    return Holder(**{**asdict(holder), "command": "".join(c if c.isprintable() else "?" for c in holder.command)[:200]})


_held: weakref.WeakSet[LockFile] = weakref.WeakSet()


def _drop_in_child() -> None:
    # A fork shares the lock: left open there, an orphaned child would hold the GPU after its parent was
    # killed.
    for lock in list(_held):
        lock.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
