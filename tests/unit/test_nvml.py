"""The driver's answers, from a scripted driver library, and from the real one where it is missing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from pytest_qvl.gpu.nvml import Gpu, GpuProcess, Inventory, Nvml, ProcessMemory, ProcessReading
from pytest_qvl.gpu.visible import VisibleDevicesError, auto_workers, visible_gpus

MiB = 1024**2


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(f"error {value}")
        self.value = value


@dataclass
class Card:
    uuid: str
    name: str = "NVIDIA H200"
    used: int = 3 * MiB
    reserved: int = 615 * MiB
    total: int = 143771 * MiB
    capability: tuple = (9, 0)
    compute: list = field(default_factory=list)
    graphics: list | None = None
    slices: list | None = None
    lost: bool = False


class Library:
    """What `pynvml` gives for a machine with these cards."""

    NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED, NOT_SUPPORTED, NOT_FOUND = 12, 9, 3, 6
    NVMLError = NVMLError
    nvmlMemory_v2 = 0x2000028

    def __init__(self, *cards, start_error=None, second_version=True, hides_processes=False):
        self.cards, self.start_error = list(cards), start_error
        self.second_version, self.hides_processes = second_version, hides_processes
        self.nvmlDeviceGetComputeRunningProcesses = lambda card: self._running(card.compute)
        self.nvmlDeviceGetGraphicsRunningProcesses = lambda card: self._running(card.graphics)

    def nvmlInit(self):
        if self.start_error:
            raise NVMLError(self.start_error)

    def nvmlSystemGetDriverVersion(self):
        return b"580.159.04"

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if self.cards[index].lost:
            raise NVMLError(15)
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        for card in self.cards:
            if card.uuid == uuid:
                return card
        raise NVMLError(self.NOT_FOUND)

    def nvmlDeviceGetUUID(self, card):
        return card.uuid

    def nvmlDeviceGetName(self, card):
        return card.name.encode()

    def nvmlDeviceGetMemoryInfo(self, card, version=None):
        if version is None:
            return SimpleNamespace(total=card.total, used=card.used + card.reserved)
        if not self.second_version:
            raise NVMLError(13)
        return SimpleNamespace(total=card.total, used=card.used)

    def nvmlDeviceGetCudaComputeCapability(self, card):
        return card.capability

    def nvmlDeviceGetMigMode(self, card):
        if card.slices is None:
            raise NVMLError(self.NOT_SUPPORTED)
        return [1, 1] if card.slices else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, card):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card, number):
        if number >= len(card.slices):
            raise NVMLError(self.NOT_FOUND)
        return card.slices[number]

    def nvmlSystemGetProcessName(self, pid):
        if pid == 666:
            raise NVMLError(self.NOT_FOUND)
        return f"job{pid}".encode()

    def _running(self, listed):
        if listed is None:
            raise NVMLError(self.NOT_SUPPORTED)
        if self.hides_processes:
            return []
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in listed]


def opened(*cards, **machine):
    return Nvml.open(lambda: Library(*cards, **machine))


def test_inventory_counts_memory_without_the_drivers_reserve():
    inventory = opened(Card("GPU-a"), Card("GPU-b", used=70 * MiB)).inventory()
    assert inventory.driver == "580.159.04"
    assert inventory.reason == ""
    assert [(g.uuid, g.index, g.name, g.used, g.compute_capability) for g in inventory.gpus] == [
        ("GPU-a", 0, "NVIDIA H200", 3 * MiB, (9, 0)),
        ("GPU-b", 1, "NVIDIA H200", 70 * MiB, (9, 0)),
    ]


def test_an_old_driver_is_asked_the_old_way():
    assert opened(Card("GPU-a"), second_version=False).inventory().gpus[0].used == 618 * MiB


def test_a_lost_card_does_not_hide_the_others():
    gpus = opened(Card("GPU-a", lost=True), Card("GPU-b")).inventory().gpus
    assert [(g.uuid, g.index) for g in gpus] == [("GPU-b", 1)]


def test_slices_are_listed_under_their_card():
    card = Card("GPU-a", slices=[Card("MIG-1", "H200 MIG 1g.18gb"), Card("MIG-2", "H200 MIG 1g.18gb")])
    (gpu,) = opened(card).inventory().gpus
    assert [part.uuid for part in gpu.slices] == ["MIG-1", "MIG-2"]


@pytest.mark.parametrize(
    ("code", "says"),
    [(12, "no NVIDIA driver here"), (9, "installed but not loaded"), (999, "does not answer: error 999")],
    ids=["library", "module", "other"],
)
def test_no_driver_is_a_reason(code, says):
    nvml = opened(start_error=code)
    assert says in nvml.inventory().reason
    assert nvml.inventory().gpus == ()
    assert nvml.holdings("GPU-a") is None
    assert ProcessMemory("GPU-a", nvml=nvml).read() is None


def test_no_package_is_a_reason():
    def missing():
        raise ImportError("No module named 'pynvml'")

    assert Nvml.open(missing).inventory() == Inventory(reason="the Python package nvidia-ml-py is not installed")


def test_no_card_is_a_reason():
    assert "shows no GPU" in opened().inventory().reason


def test_memory_of_others_is_told_by_name_and_size():
    card = Card("GPU-a", used=900 * MiB, compute=[(7, 100 * MiB), (42, 600 * MiB)], graphics=[(666, 50 * MiB)])
    holdings = opened(card).holdings("GPU-a", pid=42)
    assert holdings.own == 600 * MiB
    assert holdings.others == (GpuProcess(7, "job7", 100 * MiB), GpuProcess(666, "pid 666", 50 * MiB))
    assert holdings.unlisted == 150 * MiB


def test_a_process_in_both_lists_counts_once():
    card = Card("GPU-a", used=100 * MiB, compute=[(7, 100 * MiB)], graphics=[(7, 100 * MiB)])
    assert opened(card).holdings("GPU-a", pid=1).unlisted == 0


def test_memory_the_driver_does_not_tell_is_unlisted():
    card = Card("GPU-a", used=100 * MiB, compute=[(7, None)])
    holdings = opened(card).holdings("GPU-a", pid=7)
    assert holdings.own is None
    assert holdings.unlisted == 100 * MiB


def test_own_memory_comes_from_the_process_list():
    card = Card("GPU-a", used=900 * MiB, compute=[(42, 600 * MiB)])
    assert ProcessMemory("GPU-a", nvml=opened(card), pid=42).read() == ProcessReading(600 * MiB, "process")


@pytest.mark.parametrize("hidden", [True, False], ids=["empty list", "list without us"])
def test_hidden_processes_fall_back_to_what_the_device_gained(hidden):
    card = Card("GPU-a", used=40 * MiB, compute=[(7, 40 * MiB)])
    memory = ProcessMemory("GPU-a", nvml=opened(card, hides_processes=hidden), pid=42)
    card.used += 617 * MiB
    assert memory.read() == ProcessReading(617 * MiB, "device")


def test_an_unknown_device_is_no_traceback():
    assert ProcessMemory("GPU-x", nvml=opened(Card("GPU-a"))).read() is None


def test_the_real_library_here_never_raises():
    inventory = Nvml.open().inventory()
    assert bool(inventory.gpus) != bool(inventory.reason)


def test_asking_costs_no_heavy_import():
    code = (
        "import sys, pytest_qvl.gpu.lease as lease; from pytest_qvl.gpu.visible import visible_gpus; "
        "early = 'pynvml' in sys.modules; visible_gpus(); "
        "print(early, [m for m in ('torch', 'numpy', 'pytest', '_pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"


# -- CUDA_VISIBLE_DEVICES, as CUDA reads it ------------------------------------------------------------------

FOUR = Inventory(tuple(Gpu(f"GPU-{c * 4}", i, "NVIDIA A10G") for i, c in enumerate("abcd")), "580")


def seen(listed, inventory=FOUR, **environ):
    if listed is not None:
        environ["CUDA_VISIBLE_DEVICES"] = listed
    return visible_gpus(inventory, environ)


@pytest.mark.parametrize(
    ("listed", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("3, 1", [3, 1]),
        ("GPU-bbbb", [1]),
        ("gpu-c,0", [2, 0]),
        ("1,7,0", [1]),
        ("1,,0", [1]),
        ("1,-1,0", [1]),
        ("1,GPU-ffff,0", [1]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,0", []),
        ("0,GPU-aaaa", []),
    ],
    ids=repr,
)
def test_the_callers_list(listed, indices):
    visible = seen(listed)
    assert [gpu.index for gpu in visible.gpus] == indices
    assert bool(visible.gpus) != bool(visible.reason)


def test_what_is_ignored_is_said():
    assert seen("1,7,0").note == (
        "CUDA_VISIBLE_DEVICES='1,7,0': '7' names no GPU here; CUDA ignores it and all after it"
    )
    assert "allows no GPU" in seen("").reason
    assert "names no GPU here" in seen("9").reason
    assert "twice" in seen("0,0").reason


def test_an_ambiguous_beginning_names_nothing():
    twins = Inventory((Gpu("GPU-aa1", 0), Gpu("GPU-aa2", 1)))
    assert seen("GPU-aa", twins).gpus == ()
    assert [g.index for g in seen("GPU-aa2", twins).gpus] == [1]


def test_an_index_among_different_cards_is_not_guessed():
    mixed = Inventory((Gpu("GPU-a", 0, "NVIDIA T4"), Gpu("GPU-b", 1, "NVIDIA H200")))
    with pytest.raises(VisibleDevicesError, match=r"fastest first.*NVIDIA H200, NVIDIA T4.*PCI_BUS_ID"):
        seen("0", mixed)
    assert [g.uuid for g in seen("0", mixed, CUDA_DEVICE_ORDER="PCI_BUS_ID").gpus] == ["GPU-a"]
    assert [g.uuid for g in seen("GPU-b", mixed).gpus] == ["GPU-b"]
    assert len(seen(None, mixed).gpus) == 2


def test_a_divided_card_stands_for_its_slices():
    whole = Gpu("GPU-a", 0, slices=(Gpu("MIG-1", 0), Gpu("MIG-2", 0)))
    divided = Inventory((whole, Gpu("GPU-b", 1)))
    assert [g.uuid for g in seen(None, divided).gpus] == ["MIG-1", "MIG-2", "GPU-b"]
    assert [g.uuid for g in seen("0", divided).gpus] == ["MIG-1", "MIG-2"]
    assert [g.uuid for g in seen("MIG-2", divided).gpus] == ["MIG-2"]
    assert [g.uuid for g in seen("MIG-GPU-a/3/0", divided).gpus] == ["MIG-GPU-a/3/0"]


def test_without_a_driver_a_uuid_still_names_a_device():
    nothing = Inventory(reason="no NVIDIA driver here")
    assert [g.uuid for g in seen("GPU-1234", nothing).gpus] == ["GPU-1234"]
    assert seen("0", nothing).reason == "no NVIDIA driver here"
    assert seen(None, nothing).reason == "no NVIDIA driver here"


@pytest.mark.parametrize(
    ("asked", "environ", "workers"),
    [
        (True, {}, 4),
        (True, {"CUDA_VISIBLE_DEVICES": "1,2"}, 2),
        (True, {"CUDA_VISIBLE_DEVICES": ""}, 1),
        (True, {"PYTEST_XDIST_AUTO_NUM_WORKERS": "7"}, None),
        (False, {}, None),
    ],
    ids=["all", "two allowed", "none allowed", "fixed by the caller", "not asked"],
)
def test_auto_workers(asked, environ, workers):
    assert auto_workers(asked=asked, inventory=FOUR, environ=environ) == workers
