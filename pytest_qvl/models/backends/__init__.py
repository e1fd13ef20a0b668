"""Ways to load, quantize and adapt a model; each behind the same contract, and found by name.

Standard library only, so that a mistyped name is refused while pytest starts.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pytest_qvl.models.sources.model_source import ModelSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.models.adapters import AdapterSlot

BASELINE = "transformers"


class ModelLoadError(RuntimeError):
    """A model could not be loaded; the message names the source, the cause and, where known, the fix."""


@dataclass(frozen=True)
class LoadRequest:
    """A model to load and the form to load it in.

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
    """The contract of every backend: how models are loaded, adapted and put into the modes of tests and training."""

    name: str

    def load(self, request: LoadRequest) -> Any:
        """Load a frozen base model in eval mode.

        Raises:
            ModelLoadError: One clear error; nothing half-built stays alive.
        """

    def attach(self, model: Any, lora_config: Any, adapter: str | None) -> AdapterSlot:
        """Wrap the base model in place with a fresh adapter, or with the one saved in the folder ``adapter``."""

    def reset(self, model: Any) -> None:
        """Put a model, adapted or not, into the mode that tests start from: eval, without checkpointing of its own."""

    def prepare_training(self, model: Any, *, gradient_checkpointing: bool) -> None:
        """Put an adapted model into the state this backend trains in, the vision tower out of autograd's way."""

    def free_buffers(self) -> None:
        """Give back what the backend itself keeps on the device from one training to the next."""


@dataclass(frozen=True)
class Registration:
    """How a backend is found without importing it; every name is ``"module:attribute"``.

    Attributes:
        made_by: The class, or whatever makes a :class:`Backend` without arguments.
        devices: Where it runs.
        problem: A function that says why it cannot be used with what is installed; ``""`` from it, or here, for no
            problem.
        first: A function for a process that runs this backend alone, called before any conftest, with a function
            that shows a sentence; for what has to be imported before everything else.
    """

    made_by: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    problem: str = ""
    first: str = ""


BACKENDS: dict[str, Registration] = {
    BASELINE: Registration("pytest_qvl.models.backends.transformers:TransformersBackend"),
    "unsloth": Registration(
        "pytest_qvl.models.backends.unsloth:UnslothBackend",
        devices=("cuda",),
        problem="pytest_qvl.models.backends.unsloth_start:problem",
        first="pytest_qvl.models.backends.unsloth_start:import_first",
    ),
}


def registered(name: str) -> Registration:
    """The entry of :data:`BACKENDS` for the backend called ``name``.

    Raises:
        ValueError: No such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"{name!r} is not one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def check_usable(name: str) -> None:
    """Refuse a backend that is unknown, or cannot be used with what is installed.

    Raises:
        ValueError: Names it and the fix.
    """
    function = registered(name).problem
    said = pkgutil.resolve_name(function)() if function else ""
    if said:
        raise ValueError(said)


def start_first(name: str, say: Callable[[str], None]) -> None:
    """Import what the backend needs to have imported before everything else, if there is such a thing.

    Raises:
        RuntimeError: It cannot be; says why.
    """
    function = registered(name).first
    if function:
        pkgutil.resolve_name(function)(say)


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of what it says; the second too where the first only announces it."""
    first, *more = str(error).strip().splitlines() or [""]
    if first.endswith(":") and more:
        first = f"{first} {more[0].strip()}"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: No such backend.
    """
    make: Callable[[], Backend] = pkgutil.resolve_name(registered(name).made_by)
    return make()
