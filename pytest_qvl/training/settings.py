"""What a user may set about the guard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_qvl.evidence import InputError

if TYPE_CHECKING:
    from pytest_qvl.checks.quantization import QuantizationPolicy
    from pytest_qvl.models.policy import AdapterPolicy

OnFinding = Literal["stop", "warn"]
VisionGradients = Literal["warn", "stop", "spare"]
Learned = Literal["answers", "everything"]
RECORD_NAME = "qvl_guard.json"
_CHOICES = {
    "on_finding": get_args(OnFinding),
    "vision_gradients": get_args(VisionGradients),
    "learned": get_args(Learned),
}


@dataclass(frozen=True)
class Settings:
    """The arguments of :class:`pytest_qvl.training.Guard`, checked; see there."""

    processor: Any
    every: int
    batches: int
    policy: AdapterPolicy
    quantization: QuantizationPolicy | None
    lora_config: Any
    learned: Learned
    vision_gradients: VisionGradients
    vram_limit: int | None
    overhead: float
    on_finding: OnFinding
    record: Path | bool

    def __post_init__(self) -> None:
        """Refuse values that would guard nothing."""
        for name, value, least in (("every", self.every, 1), ("batches", self.batches, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"Guard: {name} is a whole number of at least {least}, got {value!r}")
        for name, known in _CHOICES.items():
            if (chosen := getattr(self, name)) not in known:
                raise InputError(f"Guard: {name} is one of {', '.join(map(repr, known))}, got {chosen!r}")
        if not 0 < self.overhead <= 1:
            raise InputError(f"Guard: overhead is a share of the training's time, above 0 and up to 1: {self.overhead}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the record."""
        return {
            "every": self.every,
            "batches": self.batches,
            "policy": str(self.policy),
            "quantization": None if self.quantization is None else vars(self.quantization),
            "learned": self.learned,
            "vision_gradients": self.vision_gradients,
            "vram_limit": self.vram_limit,
            "overhead": self.overhead,
            "on_finding": self.on_finding,
        }


def adapter_policy(given: AdapterPolicy | str | None) -> AdapterPolicy:
    """A policy from what a user may write for it.

    Raises:
        InputError: No policy, or a part that no model has.
    """
    from pytest_qvl.models.policy import AdapterPolicy

    if given is None:
        return AdapterPolicy()
    if isinstance(given, str):
        return AdapterPolicy.parse(given)
    if not isinstance(given, AdapterPolicy):
        raise InputError(f"Guard: policy is an AdapterPolicy or text such as 'language, vision', got {given!r}")
    return given


def size_limit(given: str | int | None) -> int | None:
    """A limit of memory in bytes from what a user may write for it."""
    from pytest_qvl.vram.units import parse_bytes

    if given is None:
        return None
    try:
        return parse_bytes(given)
    except ValueError as error:
        raise InputError(f"Guard: vram_limit: {error}") from None
