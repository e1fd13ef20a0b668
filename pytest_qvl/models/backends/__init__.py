"""Ways to load, quantize and adapt a model; each behind the same contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pytest_qvl.models.weights import ModelSource

if TYPE_CHECKING:
    from pytest_qvl.models.adapters import AdapterSlot

BACKENDS = ("transformers", "unsloth")


class ModelLoadError(RuntimeError):
    """A model could not be loaded; the message names the source, the cause and, where known, the mend."""


@dataclass(frozen=True)
class LoadRequest:
    """What to load.

    Attributes:
        source: Where the weights come from.
        quantization_config: A ``transformers.BitsAndBytesConfig``, or ``None`` for full precision.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Dtype of everything that is not quantized, such as ``"bfloat16"``.
    """

    source: ModelSource
    quantization_config: Any
    device: str
    dtype: str


class Backend(Protocol):
    """Loads models and attaches adapters; stateless."""

    name: str

    def load(self, request: LoadRequest) -> Any:
        """Load a frozen base model in eval mode.

        Raises:
            ModelLoadError: One clear error; nothing half-built stays alive.
        """

    def attach(self, model: Any, lora_config: Any, adapter: str | None) -> AdapterSlot:
        """Wrap the base model in place with a fresh adapter, or with the one saved in the folder ``adapter``."""

    def prepare_training(self, model: Any, *, gradient_checkpointing: bool) -> None:
        """Put an adapted model into the state this backend trains in, the vision tower out of autograd's way."""


def backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: No such backend.
    """
    if name == "transformers":
        from pytest_qvl.models.backends.transformers import TransformersBackend

        return TransformersBackend()
    raise ValueError(f"backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
