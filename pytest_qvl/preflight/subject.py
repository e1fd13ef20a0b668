"""What a preflight is asked, and what its questions share: each thing is read or built once, when first asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.anatomy import GROUPS
from pytest_qvl.models.quantized import KEEP_16BIT
from pytest_qvl.preflight import naming
from pytest_qvl.preflight.adapter import Adapter, attach
from pytest_qvl.preflight.base import Base
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.refusals import SettingError
from pytest_qvl.preflight.timing import patience

if TYPE_CHECKING:
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers
    from pytest_qvl.preflight.survey import Surveyed
    from pytest_qvl.preflight.updates import Updates
    from pytest_qvl.preflight.weights import Weights

Runtime = Literal["transformers", "unsloth", "vllm"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


@dataclass(frozen=True)
class Asked:
    """What the user asked for, as it was given.

    Attributes:
        base: Released name, folder or hub id.
        adapter: Folder of a saved adapter.
        merged: Folder of a checkpoint into which the adapter is said to be merged.
        runtime: What will load the adapter.
        skip: ``llm_int8_skip_modules`` of the quantization; ``None`` for that of the base, or this package's default.
        skip_from: Who gave it, in words.
        lora: Fields of ``peft.LoraConfig``, or a JSON file with them, of an adapter that is still to be made; with an
            adapter, what was asked for when it was made.
        processor: Folder of the processor that will be used, where it is not beside the adapter.
        card: GPU to judge the memory for.
        policy: Parts of the model that are adapted on purpose; ``None``: by what ``target_modules`` names.
        layers: Layers that are in 4 bits on purpose; ``None``: those of the language backbone that no entry of the skip
            list keeps.
    """

    base: str
    adapter: Path | None = None
    merged: Path | None = None
    runtime: Runtime = "transformers"
    skip: tuple[str, ...] | None = None
    skip_from: str = "--skip"
    lora: Path | Mapping[str, Any] | None = None
    processor: Path | None = None
    card: str | None = None
    policy: AdapterPolicy | None = None
    layers: QuantizedLayers | None = None


@dataclass(frozen=True)
class Subject:
    """What the questions are about.

    Attributes:
        asked: As the user gave it.
        base: The base model.
        adapter: The adapter, saved or planned; ``None`` for none.
        plan: What ``--lora`` asks for; ``None`` if it was not given.
        merged: The merged checkpoint; ``None`` if none was given, or it was not read.
    """

    asked: Asked
    base: Base
    adapter: Adapter | None = None
    plan: Adapter | None = None
    merged: Base | None = None

    def saved_adapter(self) -> Adapter:
        """The adapter, which has been saved.

        Raises:
            CannotJudge: None was given, or it was not read, or it is still to be made.
        """
        if self.adapter is None:
            raise CannotJudge(self.no_adapter)
        if not self.adapter.tensors:
            raise CannotJudge("the adapter is still to be made")
        return self.adapter

    @property
    def no_adapter(self) -> str:
        """Why there is no adapter, in words."""
        if self.asked.adapter is None and self.asked.lora is None:
            return "no adapter was given"
        return "the adapter is not judged (question 0)"

    @cached_property
    def parts(self) -> Parts:
        """The base model without data and without adapter; not to be changed.

        Raises:
            ModelSourceError: It cannot be built.
        """
        return self.base.skeleton()

    @cached_property
    def lora(self) -> Any:
        """The adapter's ``peft.LoraConfig``.

        Raises:
            ModelSourceError: There is none to be made of its fields.
        """
        assert self.adapter is not None
        return self.adapter.lora_config()

    @property
    def adapted(self) -> Any:
        """A second model without data with the adapter put on by the installed PEFT, a ``PeftModel``.

        Raises:
            ValueError: PEFT refuses the configuration.
            UnsafeFileError: Its regular expressions take for ever.
        """
        if isinstance(self._attached, Exception):
            raise self._attached
        return self._attached

    @cached_property
    def _attached(self) -> Any:
        """The same, or why there is none: the next question does not wait for it again."""
        try:
            parts = self.base.skeleton()
            with patience("target_modules of the adapter"):
                return attach(parts, self.lora)
        except Exception as error:
            return error

    @cached_property
    def placed(self) -> dict[str, naming.Placed]:
        """Every key of the adapter's file, with the module that it means."""
        assert self.adapter is not None
        modules = {name for name, _ in self.parts.base.named_modules() if name}
        return naming.place_all(self.adapter.tensors, modules)

    @cached_property
    def updates(self) -> Updates:
        """What the adapter's tensors mean, by their headers.

        Raises:
            ModelSourceError: No LoRA configuration can be made of the adapter's fields.
        """
        from pytest_qvl.preflight.updates import find_updates

        return find_updates(self)

    @cached_property
    def lonely_biases(self) -> list[str]:
        """What biases of B would be added to, where the layers have no bias: PEFT does not merge such an adapter."""
        return [name for name in self.updates.biases if name not in self.weights]

    @cached_property
    def weights(self) -> Weights:
        """The base's weights, of which any part can be read; empty where only headers are here."""
        from pytest_qvl.preflight.weights import Weights

        return Weights(self.base.tensors)

    @cached_property
    def survey(self) -> dict[str, Surveyed]:
        """A sample of the rows of every adapted weight that is here.

        Raises:
            ModelSourceError: A file has become shorter, or a quantization state is not what bitsandbytes writes.
        """
        from pytest_qvl.preflight.survey import survey

        return survey(self)

    def by_group(self, names: Iterable[str]) -> str:
        """How many of some modules or tensors belong to each part of the model, in words."""
        counts = Counter(map(self.parts.group_of, names))
        return ", ".join(f"{group} {counts[group]}" for group in GROUPS if counts[group])

    @property
    def skip(self) -> tuple[tuple[str, ...] | None, str]:
        """The skip list of the quantization, and who gave it, in words; ``None`` for Transformers' own default.

        Raises:
            SettingError: What the base was saved with is no list of names.
        """
        if self.asked.skip is not None:
            return self.asked.skip, self.asked.skip_from
        saved = self.base.quantization
        if saved is not None:
            return self.saved_skip, "the config.json of the base"
        return KEEP_16BIT, "this package's default, since no --skip was given"

    @property
    def saved_skip(self) -> tuple[str, ...] | None:
        """The skip list that the base was saved with; ``None`` for Transformers' own default.

        Raises:
            SettingError: It is no list of names.
        """
        entries = (self.base.quantization or {}).get("llm_int8_skip_modules")
        if entries is None:
            return None
        if not (isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
            raise SettingError(
                f"llm_int8_skip_modules of {self.base.label} is {neutral(repr(entries), 80)} and no list of names",
                cause="config.json was edited, and BitsAndBytesConfig takes a list only",
                fix="write a list, such as " + json.dumps(list(KEEP_16BIT)),
            )
        return tuple(entries)
