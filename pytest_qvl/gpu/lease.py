"""The right to use one GPU, held by one process: a file lock under the GPU's UUID.

Two processes that load a 7B model onto one card both die, whichever tool started them. So every process that
will compute takes a lease before CUDA starts: xdist workers, separate CI jobs of one machine and children
that run another backend all follow the same rule. The lock is the kernel's (``flock``): it ends with the
process that holds it, however that process ends, and a forked child (a data loader's worker) does not prolong
it.

The holder's process number, command and start are written into the lock file, for whoever waits. They are
hints from whoever could write there, shown and never trusted; only the lock itself decides.

POSIX only: elsewhere :func:`acquire` says so. Standard library only.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qvl.gpu import PATIENCE_S
from pytest_qvl.gpu.errors import LeaseError, LeaseTimeout, NoGpu
from pytest_qvl.gpu.lock_file import DIRECTORY_VARIABLE, Holder, LockFile, unusable, usable_folder
from pytest_qvl.gpu.visible import VISIBLE_DEVICES, Visible

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    from pytest_qvl.gpu.nvml import Gpu

# Fixed, because a CI job's TMPDIR is its own and the lease must meet every other job of the machine.
DIRECTORY = Path("/tmp/pytest-qvl-gpus")
TOKEN_VARIABLE = "QVL_GPU_LEASE"
SESSION_VARIABLE = "QVL_GPU_SESSION"
REMIND_S = 30.0
# Holders come and go in minutes; polling faster than once a second only costs.
_SLOWEST_POLL_S = 1.0
_FASTEST_POLL_S = 0.02
# Between taking a lock and saying who did lie microseconds, or a process that was not scheduled for a while.
_SIGNING_S = 1.0


def join_session(environ: MutableMapping[str, str] | None = None) -> str:
    """The name of this run, made by the first process that asks and inherited by all it starts."""
    environ = os.environ if environ is None else environ
    return environ.setdefault(SESSION_VARIABLE, secrets.token_hex(8))


class Lease:
    """A GPU this process may use, and the only one CUDA will show it; from :func:`acquire`.

    Attributes:
        gpu: The device.
        inherited: Whether an ancestor holds the lock, so that releasing here leaves it held.
        waited: Seconds spent waiting.
    """

    def __init__(
        self, gpu: Gpu, lock: LockFile | None, waited: float, environ: MutableMapping[str, str], token: str
    ) -> None:
        self.gpu, self.inherited, self.waited = gpu, lock is None, waited
        self._lock, self._environ, self._pid = lock, environ, os.getpid()
        mine = {VISIBLE_DEVICES: gpu.uuid, TOKEN_VARIABLE: token}
        self._before = {name: environ.get(name) for name in mine}
        environ.update(mine)

    def release(self) -> None:
        """Let the next one in and put the environment back; does nothing twice, or in a forked child."""
        if self._pid != os.getpid():
            return
        self._pid = -1
        for name, value in self._before.items():
            if value is None:
                self._environ.pop(name, None)
            else:
                self._environ[name] = value
        if self._lock:
            self._lock.unlock()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def verify(self) -> None:
        """Compare with the device CUDA really shows, once CUDA has started; before that nothing can be said.

        Raises:
            LeaseError: CUDA computes on another device: it had been asked for its devices (``is_available``
                is enough) before the lease was taken, and never reads ``CUDA_VISIBLE_DEVICES`` again.
        """
        if not cuda_started() or not self.gpu.uuid.startswith("GPU-"):
            return
        actual = _running_on()
        if actual is not None and not actual.casefold().startswith(self.gpu.uuid.casefold()):
            raise LeaseError(
                f"this process holds the lease of {self.gpu} but CUDA computes on {actual}: something asked "
                f"CUDA for its devices before the lease was taken (a conftest or plugin that calls "
                f"torch.cuda.is_available() at import); ask later, or set {VISIBLE_DEVICES} yourself"
            )


def acquire(
    visible: Visible,
    *,
    directory: Path | None = None,
    patience: float = PATIENCE_S,
    say: Callable[[str], None] | None = None,
    environ: MutableMapping[str, str] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Take one of the allowed GPUs, waiting for it where all are held.

    Free GPUs are tried in the caller's order, except that one with less free memory (by tenths of its total)
    comes later, so that a card busy with work that takes no leases is the last choice. A descendant of a
    holder gets the holder's GPU at once. Where CUDA already runs in this process there is no choice left: only
    the GPU it computes on can be had. ``CUDA_VISIBLE_DEVICES`` of this process then names the leased device
    alone.

    Args:
        visible: The GPUs the caller allows.
        directory: Folder of the lock files; by default ``QVL_GPU_LEASES``, else one that all users of the
            machine share.
        patience: Seconds to wait while every allowed GPU is held by other runs. Time in which a process of
            this very run holds one of them is not counted: that one is waited for as long as it runs; nor is
            the first second in which a holder has not said yet who it is.
        say: Told, in whole sentences, when waiting starts, every half minute, and when it ends.
        environ: The environment to read and change; by default this process's.
        clock: Seconds, monotonic.
        sleep: Waits.

    Raises:
        NoGpu: Nothing is allowed.
        LeaseTimeout: The patience is used up.
        LeaseError: CUDA already runs in this process on a GPU that is not allowed, the lock folder cannot be
            used, or the platform has no ``flock``.
    """
    environ = os.environ if environ is None else environ
    if not visible.gpus:
        raise NoGpu(visible.reason)
    token = environ.get(TOKEN_VARIABLE, "")
    session = join_session(environ)
    folder = usable_folder(directory or Path(environ.get(DIRECTORY_VARIABLE, DIRECTORY)))
    # Another environment than this process's own chooses nothing for its CUDA.
    gpus = _open_to_cuda(visible.gpus) if environ is os.environ else visible.gpus
    locks = {gpu: LockFile(folder / (re.sub(r"[^\w-]", "_", gpu.uuid) + ".lock")) for gpu in _emptiest_first(gpus)}
    started = last = clock()
    outside, pause, next_word = 0.0, _FASTEST_POLL_S, started
    unsigned_since: float | None = None
    while True:
        holders: dict[Gpu, Holder | None] = {}
        for gpu, lock in locks.items():
            if lock.try_lock():
                mine = _sign(lock, session)
                if say and next_word > started:
                    say(f"got {gpu} after {clock() - started:.0f} s")
                return Lease(gpu, lock, clock() - started, environ, mine)
            holders[gpu] = holder = lock.holder()
            if token and holder and holder.token == token:
                return Lease(gpu, None, clock() - started, environ, token)
        now = clock()
        own = any(holder and holder.session == session for holder in holders.values())
        if None not in holders.values():
            unsigned_since = None
        elif unsigned_since is None:
            unsigned_since = now
        counts = not own and (unsigned_since is None or now - unsigned_since >= _SIGNING_S)
        outside += now - last if counts else 0.0
        last = now
        if counts and outside >= patience:
            raise LeaseTimeout(
                f"no GPU became free within {patience:.0f} s: {_describe_holders(holders)}; wait for them to end, "
                f"allow more GPUs in {VISIBLE_DEVICES}, or raise the patience"
            )
        if say and now >= next_word:
            bound = "a process of this run, waited for as long as it runs" if own else f"at most {patience:.0f} s"
            say(f"waiting for a GPU ({bound}; {now - started:.0f} s so far): {_describe_holders(holders)}")
            next_word = now + REMIND_S
        sleep(min(pause, max(patience - outside, 0.0)) if counts else pause)
        pause = min(pause * 2, _SLOWEST_POLL_S)


def _open_to_cuda(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs that this process can still compute on: all, or once CUDA runs the one that it runs on."""
    if not cuda_started():
        return gpus
    running = _running_on()
    same: tuple[Gpu, ...] = gpus if len(gpus) == 1 else ()
    if running is not None and all(gpu.uuid.startswith("GPU-") for gpu in gpus):  # CUDA names no MIG slices
        same = tuple(gpu for gpu in gpus if running.casefold().startswith(gpu.uuid.casefold()))
    if not same:
        raise LeaseError(
            f"CUDA already runs in this process, on {running or 'a GPU that it does not name'}, so a lease can no "
            f"longer choose among {', '.join(map(str, gpus))}; take the lease first (something computed on the GPU "
            "while pytest was starting: a conftest or plugin at import)"
        )
    return same


def _sign(lock: LockFile, session: str) -> str:
    """Write down who holds the lock; returns the token that processes started from here inherit."""
    holder = Holder(os.getpid(), _command(sys.argv), time.time(), session, secrets.token_hex(16))
    try:
        lock.sign(holder)
    except OSError as error:
        lock.drop()
        raise LeaseError(unusable(lock.path, error)) from None
    return holder.token


def _emptiest_first(gpus: Sequence[Gpu]) -> list[Gpu]:
    return sorted(gpus, key=lambda gpu: int(10 * gpu.used / gpu.total) if gpu.total else 0)


def _describe_holders(holders: dict[Gpu, Holder | None]) -> str:
    return "; ".join(
        f"{gpu} is held by {holder or 'a process that has not said who it is'}" for gpu, holder in holders.items()
    )


def _command(argv: Sequence[str]) -> str:
    program = Path(argv[0]).name if argv and argv[0] not in ("", "-c", "-m") else "python"
    return shlex.join([program, *argv[1:]])[:200]


def cuda_started() -> bool:
    """Whether torch has started CUDA in this process."""
    torch = sys.modules.get("torch")
    return bool(torch and getattr(torch, "cuda", None) and torch.cuda.is_initialized())


def _running_on() -> str | None:
    """UUID of the GPU that CUDA calls its first; ``None`` where this torch does not tell."""
    try:
        properties = sys.modules["torch"].cuda.get_device_properties(0)
    except AssertionError:  # torch counts devices by what the variable says now, CUDA by what it said at its start
        return f"a GPU that {VISIBLE_DEVICES} does not name"
    return f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else None
