"""What the NVIDIA driver says about the GPUs of this machine, without starting CUDA.

Standard library only at import; the driver's library (through ``nvidia-ml-py``) is loaded at the first
question. Where it is missing there are no GPUs and a reason, never a traceback.

Two habits of the driver matter (both seen on an H200 with driver 580):

* The first version of its memory query counts memory that the driver keeps for itself (615 MiB there, with no
  process at all); the second version does not. The second is used wherever the driver has it.
* In a container the process list can be empty, or lack the process that asks. The memory of this process is
  then what the whole device uses beyond what it used before CUDA started here.
"""

from __future__ import annotations

import functools
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG slice of a GPU, as something a process can compute on.

    Attributes:
        uuid: The driver's name for it, ``GPU-…`` or ``MIG-…``; the only name that means the same in every
            process.
        index: Position in the driver's order (by PCI bus), ``-1`` for what the driver did not list.
        name: Product name.
        total: Memory in bytes, as the driver counts it.
        used: Bytes in use by all processes when it was asked (without the driver's own reserve where it can
            tell).
        compute_capability: Such as ``(7, 5)``; ``(0, 0)`` for what the driver did not list.
        slices: Its MIG slices; CUDA then computes on those and not on the whole.
    """

    uuid: str
    index: int = -1
    name: str = "GPU"
    total: int = 0
    used: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    slices: tuple[Gpu, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({self.uuid})"


@dataclass(frozen=True)
class Inventory:
    """Every GPU the driver shows to this process, whatever ``CUDA_VISIBLE_DEVICES`` says.

    Attributes:
        gpus: In the driver's order.
        driver: Driver version, empty without a driver.
        reason: Why there is no GPU; empty when there is one.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    reason: str = ""


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU.

    Attributes:
        pid: Its number, as the driver sees it (a container may number it otherwise).
        name: Its command, or ``pid N`` where the driver does not tell.
        used: Bytes; ``None`` where the driver does not tell.
    """

    pid: int
    name: str
    used: int | None


@dataclass(frozen=True)
class Holdings:
    """Who holds the memory of a GPU.

    Attributes:
        used: Bytes in use on the whole device.
        own: Bytes of this process; ``None`` where the driver hides it.
        others: The other processes the driver lists, biggest first.
        unlisted: Bytes that no listed process accounts for; processes of other containers are found here.
            Where this process itself is hidden its memory is in this number.
    """

    used: int
    own: int | None
    others: tuple[GpuProcess, ...]
    unlisted: int


@dataclass(frozen=True)
class ProcessReading:
    """Memory of this process.

    Attributes:
        used: Bytes, with the CUDA context and all libraries.
        source: ``process`` from the driver's process list, ``device`` as what the whole device gained since
            the baseline; then other processes that came or went meanwhile are in it.
    """

    used: int
    source: Literal["process", "device"]


@dataclass
class Nvml:
    """The driver's library, opened or missing.

    Args:
        library: The ``pynvml`` module, initialised; ``None`` where there is none.
        reason: Why there is none.
    """

    library: Any = None
    reason: str = ""
    _handles: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, load: Callable[[], Any] | None = None) -> Nvml:
        """Load and initialise the driver's library; where that fails, the result says why in :attr:`reason`.

        Args:
            load: Gives the ``pynvml`` module; by default it is imported.
        """
        try:
            library = (load or _import_pynvml)()
        except ImportError:
            return cls(None, "the Python package nvidia-ml-py is not installed")
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            return cls(None, _why_not(library, error))
        return cls(library)

    def inventory(self) -> Inventory:
        """All GPUs with their memory now; empty with a reason where the driver cannot answer."""
        nvml = self.library
        if nvml is None:
            return Inventory(reason=self.reason)
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            gpus = []
            for index in range(nvml.nvmlDeviceGetCount()):
                with self._lost_is_skipped():
                    gpus.append(self._gpu(nvml.nvmlDeviceGetHandleByIndex(index), index))
        except nvml.NVMLError as error:
            return Inventory(reason=f"the NVIDIA driver does not answer: {error}")
        return Inventory(tuple(gpus), driver, "" if gpus else "the NVIDIA driver shows no GPU to this process")

    def used(self, uuid: str) -> int | None:
        """Bytes in use on the whole device; ``None`` where the driver does not tell."""
        return self._asked(lambda nvml: int(_memory(nvml, self._handle(uuid)).used))

    def processes(self, uuid: str) -> tuple[GpuProcess, ...] | None:
        """Processes on the device, biggest first; ``None`` where the driver does not tell."""
        return self._asked(lambda nvml: _processes(nvml, self._handle(uuid)))

    def holdings(self, uuid: str, *, pid: int | None = None) -> Holdings | None:
        """Who holds the device's memory; ``None`` where the driver does not tell.

        Args:
            uuid: The device.
            pid: Which process counts as this one.
        """
        used, processes = self.used(uuid), self.processes(uuid)
        if used is None or processes is None:
            return None
        me = os.getpid() if pid is None else pid
        own = next((p.used for p in processes if p.pid == me), None)
        listed = sum(p.used or 0 for p in processes)
        others = tuple(p for p in processes if p.pid != me)
        return Holdings(used, own, others, max(0, used - listed))

    def _gpu(self, handle: Any, index: int) -> Gpu:
        """One GPU with its MIG slices; the handles of all of them are kept by UUID for later questions."""
        nvml = self.library
        memory, uuid = _memory(nvml, handle), _text(nvml.nvmlDeviceGetUUID(handle))
        self._handles[uuid] = handle
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        gpu = Gpu(
            uuid,
            index,
            _text(nvml.nvmlDeviceGetName(handle)),
            int(memory.total),
            int(memory.used),
            (major, minor),
        )
        slices = []
        for number in range(self._slice_count(handle)):
            with self._lost_is_skipped():
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                memory, uuid = _memory(nvml, part), _text(nvml.nvmlDeviceGetUUID(part))
                self._handles[uuid] = part
                name = _text(nvml.nvmlDeviceGetName(part))
                slices.append(Gpu(uuid, index, name, int(memory.total), int(memory.used), (major, minor)))
        return Gpu(**{**vars(gpu), "slices": tuple(slices)})

    def _slice_count(self, handle: Any) -> int:
        nvml = self.library
        try:
            current, _ = nvml.nvmlDeviceGetMigMode(handle)
            return int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) if current else 0
        except nvml.NVMLError:
            return 0

    @contextmanager
    def _lost_is_skipped(self) -> Iterator[None]:
        # A card that fell off the bus, or a slice number that is not in use, must not hide the others.
        with suppress(self.library.NVMLError):
            yield

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            self._handles[uuid] = self.library.nvmlDeviceGetHandleByUUID(uuid)
        return self._handles[uuid]

    def _asked(self, question: Callable[[Any], T]) -> T | None:
        if self.library is None:
            return None
        try:
            return question(self.library)
        except self.library.NVMLError:
            return None


@functools.cache
def driver() -> Nvml:
    """The driver's library, opened once per process."""
    return Nvml.open()


class ProcessMemory:
    """Memory of this process on one GPU, context and libraries included.

    Make it before CUDA starts: what the device uses at that moment is the baseline for drivers that hide
    processes.

    Args:
        uuid: The device.
        nvml: The driver's library; by default the process's own.
        pid: Which process counts as this one.
    """

    def __init__(self, uuid: str, *, nvml: Nvml | None = None, pid: int | None = None) -> None:
        self.uuid = uuid
        self._nvml = driver() if nvml is None else nvml
        self._pid = pid
        self._baseline = self._nvml.used(uuid)

    def read(self) -> ProcessReading | None:
        """The memory now; ``None`` where the driver tells neither process nor device."""
        holdings = self._nvml.holdings(self.uuid, pid=self._pid)
        if holdings is not None and holdings.own is not None:
            return ProcessReading(holdings.own, "process")
        used = self._nvml.used(self.uuid)
        if used is None or self._baseline is None:
            return None
        return ProcessReading(max(0, used - self._baseline), "device")


def _import_pynvml() -> Any:
    import pynvml

    return pynvml


def _why_not(nvml: Any, error: Exception) -> str:
    code = getattr(error, "value", None)
    if code == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "no NVIDIA driver here (its library libnvidia-ml was not found)"
    if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "the NVIDIA driver is installed but not loaded"
    return f"the NVIDIA driver does not answer: {error}"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _memory(nvml: Any, handle: Any) -> Any:
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    found: dict[int, int | None] = {}
    for running in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            listed = running(handle)
        except nvml.NVMLError:
            if running is nvml.nvmlDeviceGetComputeRunningProcesses:
                raise
            continue
        for process in listed:
            # A process that computes and draws is in both lists, with the same total.
            found[process.pid] = process.usedGpuMemory
    everyone = [GpuProcess(pid, _name(nvml, pid), used) for pid, used in found.items()]
    return tuple(sorted(everyone, key=lambda p: -(p.used or 0)))


def _name(nvml: Any, pid: int) -> str:
    try:
        return _text(nvml.nvmlSystemGetProcessName(pid)) or f"pid {pid}"
    except nvml.NVMLError:
        return f"pid {pid}"
