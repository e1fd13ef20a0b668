"""What a trainer has saved, held against the adapter in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl import checks
from pytest_qvl.checks.support.lora import peft_type_of
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence, Judge
from pytest_qvl.models.adapters import ADAPTER_FILE, adapter_configs, chosen_adapter
from pytest_qvl.models.sources.model_source import (
    ADAPTER_CONFIG,
    ModelSourceError,
    adapter_config,
    check_adapter,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qvl.models.anatomy import Parts

# What decides how the matrices of a file are applied, and to what.
_FIELDS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "modules_to_save",
    "fan_in_fan_out",
)


def adapter_folder(parts: Parts, folder: Path) -> Path:
    """Where in a checkpoint the adapter's files are: PEFT puts one that is not called ``default`` into its own folder.

    Raises:
        CannotJudge: The checkpoint is no longer there, holds a whole model and no adapter, or one in another format or
            of another kind.
        CheckFailed: It holds neither.
    """
    if not folder.is_dir():
        raise CannotJudge(f"{folder} is not there (any more)")
    adapter = chosen_adapter(parts)
    kind = peft_type_of(adapter_configs(parts).get(adapter))
    if kind not in ("", "LORA"):
        raise CannotJudge(f"the adapter is {kind}; the files of LoRA are known only")
    for place in (folder, folder / adapter):
        if (place / ADAPTER_CONFIG).is_file() and (place / ADAPTER_FILE).is_file():
            return place
    there = sorted(path.name for path in folder.iterdir())
    if others := [name for name in there if name.startswith("adapter_model.") and name != ADAPTER_FILE]:
        raise CannotJudge(f"{folder} holds the adapter as {some(others)}; safetensors are read only")
    if any(name.startswith("model") for name in there):
        raise CannotJudge(f"{folder} holds a whole model and no adapter")
    judge = Judge("adapter_roundtrip", "a checkpoint holds the adapter")
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_FILE) if not (folder / name).is_file()]
    judge.problem(
        f"the checkpoint {folder} does not hold the adapter {adapter!r}: {' and '.join(missing)} missing, there are "
        f"{some(there) or 'no files'}; save with trainer.save_model or model.save_pretrained, in safetensors"
    )
    raise CheckFailed(judge.close())


def adapter_as_saved(parts: Parts, folder: Path, *, written: bool) -> Evidence:
    """Hold the adapter in a checkpoint to be, bit for bit, the one in memory, in files that PEFT loads.

    Args:
        parts: Of the model.
        folder: The checkpoint.
        written: Whether it was just written; one to resume from may be of another release, whose names are mapped.

    Raises:
        CheckFailed: Says what is broken.
        CannotJudge: See :func:`adapter_folder`.
    """
    place = adapter_folder(parts, folder)
    judge_readable(place)
    if written:
        judge_names(parts, place)
    return checks.adapter_roundtrip(parts.wrapped, place)


def judge_readable(folder: Path) -> None:
    """Hold the files of an adapter to be whole: a configuration that is JSON, and tensors as long as their header says.

    Raises:
        CheckFailed: Names the file.
    """
    judge = Judge("adapter_roundtrip", "a checkpoint holds the adapter")
    try:
        check_adapter(folder)
    except ModelSourceError as error:
        judge.problem(f"what the trainer saved cannot be loaded: {error}")
    judge.verdict()


def judge_names(parts: Parts, folder: Path) -> None:
    """Hold the tensors in a file that was just written to have the names that the installed PEFT writes.

    PEFT finds them by these names alone: what has another is left as it was initialised, with a warning.

    Raises:
        CheckFailed: Names the tensors without their names.
    """
    from peft.utils import get_peft_model_state_dict

    if not parts.is_peft:
        return  # what Transformers' add_adapter made is named by Transformers
    model = parts.wrapped
    # The whole state_dict() would unpack the statistics of every 4-bit weight.
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    written = get_peft_model_state_dict(model, own, adapter_name=chosen_adapter(parts), save_embedding_layers=False)
    there = names_in(folder / ADAPTER_FILE)
    missing = [name for name in written if name not in there]
    others = [name for name in there if name not in written]
    judge = Judge("adapter_roundtrip", "a checkpoint holds the adapter under the names that PEFT loads")
    judge.every(
        "tensors under the names that PEFT writes",
        written,
        missing,
        else_say=lambda off: (
            f"{off} of {len(written)} adapter tensors are not in {folder / ADAPTER_FILE} under the names by which PEFT "
            f"loads them: {some(missing)}; the file has {some(others) or 'no others'}, and whoever loads it gets an "
            "adapter as it was initialised; save with trainer.save_model or model.save_pretrained"
        ),
    )
    judge.verdict()


def names_in(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def config_as_saved(parts: Parts, folder: Path) -> Evidence:
    """Hold the saved configuration to say what the adapter in memory is, field by field.

    Args:
        parts: Of the model.
        folder: The checkpoint.

    Raises:
        CheckFailed: Names the fields.
        CannotJudge: See :func:`adapter_folder`.
    """
    folder = adapter_folder(parts, folder)
    saved = adapter_config(folder)
    config = adapter_configs(parts)[chosen_adapter(parts)]
    judge = Judge("saved_config", "the saved configuration is that of the adapter in memory")
    off = [
        f"{field} {_plain(saved[field])!r} instead of {_plain(getattr(config, field))!r}"
        for field in _FIELDS
        if field in saved and hasattr(config, field) and _plain(saved[field]) != _plain(getattr(config, field))
    ]
    judge.equal(
        "fields that differ",
        len(off),
        0,
        else_say=f"{folder / ADAPTER_CONFIG} is not the configuration of the adapter in memory: {some(off)}; whoever "
        "loads it applies the same matrices in another way",
    )
    return judge.verdict()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set) else value or None
