"""Torch as far as the plugin asks it, on a machine with made-up GPUs; first on the path of inner pytest runs.

``MACHINE`` describes the machine: ``gpus`` (``[uuid, bytes used by others]``), ``cuda`` (version of this build).
A tensor takes bytes when it is made and gives them back when Python lets it go.
"""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

MACHINE = json.loads(os.environ["MACHINE"])
CAPACITY = 16 << 30

version = SimpleNamespace(cuda=MACHINE.get("cuda", "12.8"))
_C = SimpleNamespace()
for _name in ("_functorch", "_functorch.config"):  # set by the Unsloth backend
    sys.modules[f"{__name__}.{_name}"] = ModuleType(f"{__name__}.{_name}")
backends = SimpleNamespace(
    cuda=SimpleNamespace(
        **{f"{name}_sdp_enabled": lambda: True for name in ("flash", "mem_efficient", "math", "cudnn")},
        **{f"enable_{name}_sdp": lambda on: None for name in ("flash", "mem_efficient", "math", "cudnn")},
    )
)


class OutOfMemoryError(RuntimeError):
    pass


class AcceleratorError(RuntimeError):
    pass


class Tensor:
    dtype, device = "torch.uint8", SimpleNamespace(type="cuda")

    def __init__(self, size):
        self.shape = (size,)
        cuda.init()
        if cuda.allocated + size > CAPACITY:
            self.shape = (0,)
            raise OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / 2**30:.2f} GiB. GPU 0 has a total")
        cuda.allocated += size
        cuda.given_out += size
        cuda.peak = max(cuda.peak, cuda.allocated)

    def __del__(self):
        cuda.allocated -= self.shape[0]

    def untyped_storage(self):
        device = SimpleNamespace(type=self.device.type)
        return SimpleNamespace(data_ptr=lambda: id(self), nbytes=lambda: self.shape[0], device=device)


class Cuda:
    allocated = peak = given_out = 0
    trouble = ""

    def __init__(self):
        self._seen = None
        self._started = False

    def _devices(self):
        if self._seen is None:  # read once, as CUDA does
            listed = os.environ.get("CUDA_VISIBLE_DEVICES")
            everything = [uuid for uuid, _ in MACHINE["gpus"]]
            chosen = everything if listed is None else [e for e in listed.split(",") if e]
            self._seen = [everything[int(e)] if e.isdecimal() else e for e in chosen]
        return self._seen

    def is_available(self):
        return bool(self._devices())

    def is_initialized(self):
        return self._started

    def init(self):
        if not self._devices():
            raise RuntimeError("no device")
        self._started = True

    def device_count(self):
        return len(self._devices())

    def get_device_properties(self, index):
        return SimpleNamespace(uuid=self._devices()[index].removeprefix("GPU-"))

    def get_device_capability(self):
        return (8, 0)

    def memory_stats_as_nested_dict(self, device):
        both = {"current": self.allocated, "peak": self.peak}
        given_out = {"all": {**both, "allocated": self.given_out}}
        return {"allocated_bytes": given_out, "reserved_bytes": {"all": both}}

    def reset_peak_memory_stats(self, device):
        self.peak = self.allocated

    def synchronize(self, device=None):
        if self.trouble:
            raise AcceleratorError(f"{self.trouble}\nCUDA kernel errors might be asynchronously reported")

    empty_cache = synchronize


cuda = Cuda()
