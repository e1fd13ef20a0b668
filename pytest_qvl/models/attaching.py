"""Why an adapter cannot be attached, before and after PEFT tries: one sentence with the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pytest_qvl.models.backends import one_line
from pytest_qvl.models.sources.model_source import adapter_config, check_adapter

_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[([\d, ]*)\]\) from checkpoint, "
    r"the shape in current model is torch\.Size\(\[([\d, ]*)\]\)"
)


def adapter_folder(value: Any) -> Path | None:
    """The value of the fixture ``qvl_adapter`` as a checked folder.

    Raises:
        ValueError: It is neither ``None`` nor a folder with a LoRA adapter.
    """
    if value is None:
        return None
    if not isinstance(value, str | Path):
        raise ValueError(f"qvl_adapter gives {value!r}; expected the folder of a saved adapter, or None")
    check_adapter(Path(value))
    return Path(value)


def saved_lora_config(folder: Path) -> Any:
    """The ``peft.LoraConfig`` of a saved adapter.

    Raises:
        ValueError: PEFT cannot make one of its ``adapter_config.json``.
    """
    from peft import LoraConfig

    try:
        return LoraConfig.from_pretrained(str(folder))
    except Exception as error:
        raise ValueError(f"{folder / 'adapter_config.json'} is no LoRA configuration: {one_line(error)}") from None


def check_lora_config(config: Any) -> None:
    """Refuse a configuration that PEFT would stumble over somewhere inside.

    Raises:
        ValueError: It is no ``peft.LoraConfig``, or a field of it has a value that means nothing.
    """
    kind = getattr(config, "peft_type", "")
    kind = getattr(kind, "value", kind)
    if kind not in ("LORA", "ADALORA"):
        hint = "; write peft.LoraConfig(**...) for it" if isinstance(config, dict) else ""
        raise ValueError(
            f"qvl_lora_config gives a {type(config).__name__}; this package tests LoRA, peft.LoraConfig{hint}"
        )
    ranks = {"r": config.r, **{f"rank_pattern[{key!r}]": value for key, value in (config.rank_pattern or {}).items()}}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"{name} of the LoRA config is {rank!r}; expected a whole number of at least 1")
    for name in ("lora_alpha", "lora_dropout"):
        value = getattr(config, name)
        if not isinstance(value, int | float):
            raise ValueError(f"{name} of the LoRA config is {value!r}; expected a number")
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(
                f"{name} of the LoRA config is {value!r}, which is no regular expression: {error}"
            ) from None


def why_not_attached(error: Exception, config: Any, adapter: str | None) -> str:
    """What PEFT's error means for whoever gave the configuration or the folder `adapter`, in one sentence."""
    mismatch = _MISMATCH.search(str(error))
    if mismatch and adapter is not None:
        return _does_not_fit(mismatch, config, Path(adapter))
    if said := _cannot_start(error, config):
        return said
    if isinstance(error, KeyError) and adapter is not None:
        return f"the file of {adapter} lacks {error.args[0]!r}, which its adapter_config.json asks for: save it again"
    return one_line(error)


def _cannot_start(error: Exception, config: Any) -> str:
    """Why an adapter cannot be initialised as its configuration asks, with the fix; empty if that is not the cause."""
    start, text = getattr(config, "init_lora_weights", True), str(error)
    if isinstance(error, TypeError) and isinstance(start, str) and "initialize" in text:
        return (
            f"init_lora_weights={start!r} starts from the singular values of the base weights, which 4-bit weights do "
            "not have: use init_lora_weights=True, or make such an adapter on the 16-bit model and save it"
        )
    if start == "orthogonal" and "can require gradients" in text:
        return (
            "init_lora_weights='orthogonal' makes A and B in the dtype of the base weights, which is an integer where "
            "they are packed in 4 bits: use init_lora_weights=True"
        )
    if start == "orthogonal" and "to be even" in text:
        return f"init_lora_weights='orthogonal' pairs the rows of A, so the rank has to be even: r={config.r}"
    if "Unknown initialization" in text:
        return f"init_lora_weights={start!r} is none that the installed PEFT knows: use init_lora_weights=True"
    return ""


def _does_not_fit(mismatch: re.Match[str], config: Any, folder: Path) -> str:
    name = re.sub(r"^base_model\.model\.|\.weight$", "", mismatch[1])
    saved, here = (tuple(int(n) for n in mismatch[i].split(",") if n.strip()) for i in (2, 3))
    sentence = f"the adapter in {folder} does not fit: {name} is {saved} in its file and {here} in this model"
    rank_axis = 1 if "lora_B" in name else 0
    width_axis = 1 - rank_axis
    if ".lora_" in name and len(saved) == len(here) == 2 and saved[width_axis] == here[width_axis]:
        return f"{sentence}; the file has rank {saved[rank_axis]}, its configuration asks for r={config.r}"
    named = adapter_config(folder).get("base_model_name_or_path")
    return f"{sentence}; it was trained for {named!r}, which is of another size"
