"""What the faults are made on: which model, on which device, in which dtype, loaded by which backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.backends import BASELINE, LoadRequest
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.model_source import ModelSource, parse_model

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Subject:
    """A model on a device, in a dtype, loaded by a backend, as the suite would load it.

    Attributes:
        source: Where the weights come from.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Load dtype, and compute dtype of the 4-bit layers.
        backend: A name in :data:`pytest_qvl.models.backends.BACKENDS`.
    """

    source: ModelSource
    device: str = "cpu"
    dtype: str = "bfloat16"
    backend: str = BASELINE

    @classmethod
    def of(cls, model: str, device: str = "cpu", dtype: str = "bfloat16") -> Subject:
        """The subject that a user names.

        Args:
            model: As for ``--qvl-model``.
            device: One of :data:`DEVICES`.
            dtype: One of :data:`DTYPES`.

        Raises:
            ValueError: No such model, device or dtype.
        """
        for what, value, known in (("device", device, DEVICES), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
        return cls(parse_model(model), device, dtype)

    def __str__(self) -> str:
        return f"{self.source} on {self.device} in {self.dtype}"

    @property
    def label(self) -> str:
        """Short enough for the head of a column."""
        return f"{self.source.label} × {self.device.upper()}"

    @property
    def is_default(self) -> bool:
        """Whether it is the embedded model on the CPU in bfloat16: what the whole matrix is published for."""
        return self == embedded()

    def with_dtype(self, dtype: str) -> Subject:
        """The same model on the same device, in another dtype."""
        return replace(self, dtype=dtype)

    def request(self, quantization_config: Any, dtype: str | None = None) -> LoadRequest:
        """What a backend has to load.

        Args:
            quantization_config: A ``transformers.BitsAndBytesConfig``, or ``None`` for full precision.
            dtype: Load dtype, if it is not :attr:`dtype`.
        """
        return LoadRequest(self.source, quantization_config, self.device, dtype or self.dtype)

    def random_devices(self) -> list[torch.device]:
        """Devices whose random state is to be kept beside the CPU's; for ``torch.random.fork_rng``."""
        import torch

        return [torch.device(self.device)] if self.device == "cuda" else []


def embedded(dtype: str = "bfloat16") -> Subject:
    """The embedded model on the CPU: in bfloat16, what the published matrix is made on."""
    return Subject(ModelSource("embedded", str(embedded_model_dir())), dtype=dtype)
