"""The frameworks, and what their environments hold. Standard library only: it runs before there is an environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# What this package and every framework need. The index has CUDA builds of a later torch, hence the exact version.
COMMON = (
    "torch==2.13.0",
    "torchvision==0.28.0",
    "bitsandbytes==0.50.2",
    "av",
    "nvidia-ml-py",
    "pillow",
    "pytest",
)

# The checkpoint whose processor and configuration stand for a family, by ``model_type``.
RELEASES = {"qwen2_vl": "qwen2-vl-2b", "qwen2_5_vl": "qwen2.5-vl-3b", "qwen3_vl": "qwen3-vl-2b"}


@dataclass(frozen=True)
class Framework:
    """One framework.

    Attributes:
        name: Of its record and of its module in ``collating.adapters``.
        title: In prose.
        package: On the package index, whose version the record gives.
        requirements: Installed with their own requirements, beside :data:`COMMON`.
        bare: Installed without their requirements (``--no-deps``), since those hold CUDA-only packages or far more
            than its collator imports; what it does import is in `requirements`, with the versions that it asks for.
        empty: Modules that it imports at its top for audio only and of which the index has CUDA builds only: an empty
            module stands in for each.
        environ: Set while it runs.
        module: What has to be importable to run it; empty where it is `name`.
    """

    name: str
    title: str
    package: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    module: str = ""


_FRAMEWORKS = (
    Framework("trl", "TRL", "trl", ("trl==1.16.0", "transformers==5.24.0", "peft==0.21.2")),
    Framework(
        "unsloth",
        "Unsloth",
        "unsloth_zoo",
        ("unsloth_zoo==2026.10.9", "transformers==5.17.0"),
        environ={"UNSLOTH_ZOO_DISABLE_GPU_INIT": "1"},
        module="unsloth_zoo",
    ),
    Framework("swift", "ms-swift", "ms-swift", ("ms-swift==4.6.0", "qwen-vl-utils==0.0.14")),
    Framework(
        "llamafactory",
        "LLaMA-Factory",
        "llamafactory",
        (
            "transformers==5.6.0",
            "peft==0.18.1",
            "accelerate==1.11.0",
            "datasets==4.0.0",
            "trl==0.24.0",
            "tyro<0.9.0",
            "torchdata==0.11.0",
            "einops",
            "fire",
            "hf-transfer",
            "modelscope",
            "omegaconf",
            "pandas",
            "protobuf",
            "pydantic",
            "pyyaml",
            "safetensors",
            "scipy",
            "sentencepiece",
            "tiktoken",
        ),
        bare=("llamafactory==0.9.5",),
        empty=("torchaudio",),
    ),
    Framework(
        "axolotl",
        "Axolotl",
        "axolotl",
        (
            "transformers==5.16.1",
            "peft==0.20.0",
            "accelerate==1.13.0",
            "datasets==4.8.4",
            "trl==1.9.0",
            "pydantic==2.12.5",
            "addict",
            "colorama",
            "einops",
            "fire",
            "pyyaml",
            "scipy",
        ),
        bare=("axolotl==0.19.0",),
    ),
    Framework(
        "maestro",
        "Maestro",
        "maestro",
        ("transformers==5.17.0", "peft==0.21.2", "accelerate", "qwen-vl-utils==0.0.14"),
        bare=("maestro==1.0.0",),
    ),
    Framework(
        "nemo",
        "NeMo AutoModel",
        "nemo-automodel",
        (
            "transformers==5.18.0",
            "peft==0.21.2",
            "accelerate",
            "datasets",
            "pyyaml",
            "qwen-vl-utils==0.0.14",
            "tiktoken",
            "torchdata",
        ),
        bare=("nemo-automodel==0.7.0",),
        module="nemo_automodel",
    ),
)
FRAMEWORKS: Mapping[str, Framework] = MappingProxyType({each.name: each for each in _FRAMEWORKS})
