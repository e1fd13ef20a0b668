"""What a run ran on: versions, machine, GPUs."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from pytest_qvl.releases import installed

PACKAGES = (
    "pytest-qvl",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "unsloth",
    "unsloth_zoo",
    "triton",
    "tokenizers",
    "pillow",
    "numpy",
    "pytest",
)
# What changes how torch, CUDA's libraries and Unsloth compute or allocate, where it is set.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CI",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "UNSLOTH_COMPILE_DISABLE",
)
# Extensions by which torch, oneDNN, MKL and bitsandbytes choose their kernels, as Linux names them.
CPU_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "sve", "sve2", "bf16", "i8mm"),
)


def environment(folder: Path) -> dict[str, Any]:
    """Versions, machine, GPUs and the commit of ``folder``; nothing that names a host or a user."""
    from pytest_qvl.gpu.nvml import driver

    inventory = driver().inventory()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "driver": inventory.driver or None,
        "gpus": [
            {"name": gpu.name, "total": gpu.total, "compute_capability": list(gpu.compute_capability)}
            for gpu in inventory.gpus
        ],
        "commit": _commit(folder),
    }


def machine() -> dict[str, Any]:
    """What of the machine changes arithmetic on the CPU, and the distribution; nothing that names a host or a user."""
    told = _cpu_info()
    flags = set(told.get("flags", told.get("Features", "")).split())
    return {
        "os": _distribution(),
        "cpu": told.get("model name"),
        "cores": len(os.sched_getaffinity(0)),
        "features": [name for name in CPU_FEATURES if name in flags],
    }


def _cpu_info() -> dict[str, str]:
    """What the kernel says of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit that a CI service names (a checkout may have no history there), else what git says of the folder."""
    named = next((os.environ[name] for name in ("GITHUB_SHA", "CI_COMMIT_SHA") if os.environ.get(name)), None)
    if named:
        return named
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
