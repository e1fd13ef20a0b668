"""The adapter: its configuration and the headers of its file; and how PEFT puts it on the model without data."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.adapters import ADAPTER_FILE
from pytest_qvl.models.attaching import check_lora_config
from pytest_qvl.models.sources.model_source import ADAPTER_CONFIG, ModelSourceError, check_adapter
from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.files.headers import Tensor, read_header
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.refusals import BrokenFileError, SettingError, UnsafeFileError

if TYPE_CHECKING:
    from pytest_qvl.models.anatomy import Parts

# Fields by which a configuration has modules imported, or data and models loaded, when PEFT attaches the adapter.
_NOT_FOR_STRANGERS = (
    *("megatron_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "arrow_config"),
    *("megatron_core", "runtime_config", "auto_mapping"),
)
_TABLES = ("rank_pattern", "alpha_pattern")
_EDITED = "the configuration was edited by hand, or written by a tool that writes it otherwise than PEFT"
# Files of weights that PEFT, or who saves a state_dict of its model, writes.
_ADAPTER_WEIGHTS = re.compile(r"adapter_model.*\.(safetensors|bin|pt)(\.index\.json)?")
_MOST_LAYERS = 4096  # of layer_replication, which copies modules


@dataclass(frozen=True)
class Adapter:
    """An adapter, or one that is still to be made.

    Attributes:
        label: What to call it.
        fields: Content of ``adapter_config.json``, or of the file that ``--lora`` names.
        folder: Where its files are; ``None`` for one that is still to be made.
        tensors: Its tensors by the header of its file; empty for one that is still to be made.
    """

    label: str
    fields: Mapping[str, Any]
    folder: Folder | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def init(self) -> Any:
        """``init_lora_weights`` as it was saved, which :meth:`lora_config` leaves out."""
        return self.fields.get("init_lora_weights")

    def lora_config(self) -> Any:
        """The ``peft.LoraConfig`` that PEFT makes of it, without what would import modules or load other data.

        Raises:
            SettingError: PEFT cannot make one of it, or a field has a value that means nothing.
        """
        from peft import LoraConfig

        if self.folder is None and (foreign := sorted(self.fields.keys() - LoraConfig.__dataclass_fields__.keys())):
            raise SettingError(
                f"{self.label} has {neutral(', '.join(foreign), 200)}, which peft.LoraConfig does not know",
                cause="a name is mistyped, or it is another release's or another tool's",
                fix="write the fields of peft.LoraConfig: r, lora_alpha, target_modules and others",
            )
        known = {name for name in LoraConfig.__dataclass_fields__ if name not in _NOT_FOR_STRANGERS}
        fields = {key: value for key, value in self.fields.items() if key in known}
        # How A and B start decides nothing of where they are, and some starts need the base's values.
        fields |= {"init_lora_weights": False}
        for name in _TABLES:
            if not isinstance(fields.get(name) or {}, Mapping):
                raise SettingError(
                    f"{name} of {self.label} is {neutral(repr(fields[name]), 80)} and no table from names to numbers",
                    cause=_EDITED,
                    fix=f"put back the {name} of the training",
                )
        replication = fields.get("layer_replication")
        if replication and _copies(replication) > _MOST_LAYERS:
            raise UnsafeFileError(f"layer_replication of {self.label} asks for more than {_MOST_LAYERS:,} layers")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig(**fields)
            check_lora_config(config)
        except Exception as error:
            raise SettingError(
                f"PEFT makes no LoRA of {self.label}: {neutral(error, 300)}",
                cause=_EDITED,
                fix="put back what the training had, or save the adapter again with PeftModel.save_pretrained",
            ) from None
        return config


def _copies(replication: Any) -> float:
    try:
        return sum(int(end) - int(start) for start, end in replication)
    except (TypeError, ValueError):
        return float("inf")


def find_adapter(path: Path) -> Adapter:
    """The adapter in a folder.

    Raises:
        ModelSourceError: There is no such folder, or no adapter in it.
        RefusedError: There is one, and a file of it is missing, broken, or could do harm.
        CannotJudge: It was made by another method than LoRA.
    """
    if not path.expanduser().is_dir():
        if path.expanduser().is_file():
            raise ModelSourceError(f"the adapter {neutral(repr(str(path)))} is a file; give the folder that it is in")
        check_adapter(path.expanduser())  # one clear error: there is no such folder
    folder = Folder(path)
    label = f"adapter {neutral(str(path))}"
    if not folder.has(ADAPTER_CONFIG):
        if any(_ADAPTER_WEIGHTS.fullmatch(entry.name) for entry in folder.path.iterdir()):
            raise BrokenFileError(
                f"{neutral(str(path))} holds an adapter's weights without {ADAPTER_CONFIG}",
                cause="it was not saved or not copied, and without it nobody knows alpha, rank and targets",
                fix=f"copy {ADAPTER_CONFIG} from the training's output beside them",
            )
        check_adapter(folder.path)  # says which folder below has one
    fields = folder.json(ADAPTER_CONFIG)
    _check_method(fields.get("peft_type"), label)
    if not folder.has(ADAPTER_FILE):
        if pickled := folder.pickles():
            raise UnsafeFileError(
                f"{neutral(pickled[0], 160)} in {neutral(str(path))} is a pickle, which can run code when it is read; "
                "it is not opened"
            )
        raise BrokenFileError(
            f"{neutral(str(path))} has no {ADAPTER_FILE}",
            cause="its weights were not saved, or not copied or downloaded with its configuration",
            fix="save the adapter again with PeftModel.save_pretrained, or copy the file beside its configuration",
        )
    tensors = read_header(folder, ADAPTER_FILE)
    if not tensors:
        raise BrokenFileError(
            f"{ADAPTER_FILE} in {neutral(str(path))} holds no tensor",
            cause="what saved it gathered nothing (DeepSpeed's ZeRO-3 keeps matrices in parts), or found no adapter",
            fix="save the adapter again with its weights gathered (stage3_gather_16bit_weights_on_model_save), or turn "
            "the training's global_step folder into one with zero_to_fp32.py",
        )
    return Adapter(label, fields, folder, tensors)


def _check_method(kind: Any, label: str) -> None:
    if kind is None:
        raise SettingError(
            f"{ADAPTER_CONFIG} of {label} names no peft_type", cause=_EDITED, fix='"peft_type": "LORA", if it is a LoRA'
        )
    _refuse_other_methods(kind, f"its {ADAPTER_CONFIG}")


def _refuse_other_methods(kind: Any, where: str) -> None:
    if kind != "LORA":
        said = neutral(repr(str(getattr(kind, "value", kind))), 80)
        raise CannotJudge(f"the adapter is not judged: {where} says peft_type {said}, and this package tests LoRA")


def planned_adapter(source: Path | Mapping[str, Any]) -> Adapter:
    """An adapter that is still to be made, from a JSON file with the fields of ``peft.LoraConfig`` or from a mapping.

    Raises:
        ModelSourceError: There is no such file, or it is no JSON object.
        CannotJudge: It is a configuration of another method than LoRA.
    """
    if isinstance(source, Mapping):
        adapter = Adapter("the LoRA configuration", dict(source))
    else:
        file = source.expanduser()
        if not file.is_file():
            raise ModelSourceError(f"--lora: there is no file {neutral(repr(str(source)))}")
        adapter = Adapter(f"--lora {neutral(str(source))}", Folder(file.parent).json(file.name))
    _refuse_other_methods(adapter.fields.get("peft_type") or "LORA", adapter.label)
    return adapter


def attach(parts: Parts, config: Any) -> Any:
    """Put an adapter on a model without data, as PEFT does; returns the ``PeftModel``.

    Raises:
        ValueError: PEFT refuses the configuration; the message is PEFT's.
    """
    import copy

    import torch
    from peft import PeftModel

    # PEFT makes each matrix in memory before it drops its data: of a rank of millions that alone is too much.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return PeftModel(parts.base, copy.deepcopy(config), low_cpu_mem_usage=True)
