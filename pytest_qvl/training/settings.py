"""What a user may set about the guard."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_qvl.evidence import InputError

if TYPE_CHECKING:
    from pytest_qvl.checks.quantization import QuantizationPolicy
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers

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
    quantized_layers: QuantizedLayers | None
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
        share = self.overhead if isinstance(self.overhead, int | float) else 0
        if isinstance(share, bool) or not 0 < share <= 1:
            raise InputError(
                f"Guard: overhead is a share of the training's time, a number above 0 and up to 1 such as 0.01, "
                f"got {self.overhead!r}"
            )
        self._check_objects()

    def _check_objects(self) -> None:
        from pytest_qvl.checks.quantization import QuantizationPolicy

        if self.quantization is not None and not isinstance(self.quantization, QuantizationPolicy):
            raise InputError(
                "Guard: quantization is a pytest_qvl QuantizationPolicy, such as QuantizationPolicy(quant_type='nf4'), "
                f"got {self.quantization!r}"
            )
        if self.quantization is not None and self.quantized_layers is not None:
            raise InputError(
                "Guard: a QuantizationPolicy names its layers itself (quantized, kept): give it or quantized_layers, "
                "not both"
            )
        if self.lora_config is not None and not hasattr(self.lora_config, "target_modules"):
            raise InputError(f"Guard: lora_config is a peft.LoraConfig, got {self.lora_config!r}")
        if self.processor is not None and not callable(self.processor):
            raise InputError(
                f"Guard: processor is the object that makes the batches, AutoProcessor.from_pretrained(...), "
                f"got {self.processor!r}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the record."""
        return {
            "every": self.every,
            "batches": self.batches,
            "policy": str(self.policy),
            "quantization": None if self.quantization is None else vars(self.quantization),
            "quantized_layers": None if self.quantized_layers is None else str(self.quantized_layers),
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


def declared_layers(given: QuantizedLayers | str | None) -> QuantizedLayers | None:
    """Layers in 4 bits from what a user may write for them.

    Raises:
        InputError: No layers, or an entry that can name nothing.
    """
    from pytest_qvl.models.quantized_layers import QuantizedLayers

    if isinstance(given, str):
        return QuantizedLayers.parse(given)
    if given is not None and not isinstance(given, QuantizedLayers):
        raise InputError(
            f"Guard: quantized_layers is a QuantizedLayers or text such as 'language, in_proj_a:16bit', got {given!r}"
        )
    return given


def record_path(given: str | Path | bool) -> Path | bool:
    """Where the record goes, from what a user may write for it.

    Raises:
        InputError: No path, or one without a name.
    """
    if isinstance(given, bool):
        return given
    if not isinstance(given, str | PathLike) or not Path(given).name:
        raise InputError(f"Guard: record is the path of a file, True for the output_dir, or False, got {given!r}")
    return Path(given)


def size_limit(given: str | int | None) -> int | None:
    """A limit of memory in bytes from what a user may write for it."""
    from pytest_qvl.vram.units import parse_bytes

    if given is None:
        return None
    try:
        return parse_bytes(given)
    except ValueError as error:
        raise InputError(f"Guard: vram_limit: {error}") from None
