"""The driver's library of the machine that ``torch`` beside it describes."""

import json
import os
from types import SimpleNamespace

MACHINE = json.loads(os.environ["MACHINE"])
NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED = 12, 9
nvmlMemory_v2 = 2
GIB = 1 << 30


class NVMLError(Exception):
    value = 3


def nvmlInit():
    pass


def nvmlSystemGetDriverVersion():
    return "580.00"


def nvmlDeviceGetCount():
    return len(MACHINE["gpus"])


def nvmlDeviceGetHandleByIndex(index):
    return MACHINE["gpus"][index]


def nvmlDeviceGetHandleByUUID(uuid):
    return next(gpu for gpu in MACHINE["gpus"] if gpu[0] == uuid)


def nvmlDeviceGetUUID(gpu):
    return gpu[0]


def nvmlDeviceGetName(gpu):
    return "NVIDIA T4"


def nvmlDeviceGetMemoryInfo(gpu, version=None):
    return SimpleNamespace(total=16 * GIB, used=gpu[1])


def nvmlDeviceGetCudaComputeCapability(gpu):
    return (7, 5)


def nvmlDeviceGetMigMode(gpu):
    raise NVMLError


def nvmlDeviceGetComputeRunningProcesses(gpu):
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=0)
    return [mine, SimpleNamespace(pid=7, usedGpuMemory=gpu[1])] if gpu[1] else [mine]


def nvmlDeviceGetGraphicsRunningProcesses(gpu):
    raise NVMLError


def nvmlSystemGetProcessName(pid):
    return "/usr/bin/trainer"
