"""Skip lists as the installed Transformers understands them: to explain a census, never to make one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import TOWER

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pytest_qvl.models.anatomy import Group, Parts

# Entries of lists that are meant for every family at once (Unsloth's ``SKIP_QUANTIZATION_MODULES``, PEFT's docs).
GENERIC = frozenset(
    {
        *("multi_modal_projector", "modality_projection", "mm_projector", "router", "vision_tower", "vision_model"),
        *("merger", "visual", "audio_tower", "embed_vision", "mamba", "linear_attn", "score", "classifier", "gate"),
    }
)


def skip_list(parts: Parts) -> list[str] | None:
    """``llm_int8_skip_modules`` as the model's configuration has it; ``None`` if none was given."""
    config: Any = getattr(parts.config, "quantization_config", None)
    given = config.get("llm_int8_skip_modules") if isinstance(config, dict) else None
    if config is not None and not isinstance(config, dict):
        given = getattr(config, "llm_int8_skip_modules", None)
    return None if given is None else list(given)


def skipped_by(pattern: str, module_name: str) -> bool:
    """Whether the installed Transformers keeps a module out of the quantization because of this pattern.

    Transformers 5 matches the pattern, a regular expression, from the start of the module's full name, or
    takes it as the end of the name. Transformers 4 (``_replace_with_bnb_linear``) takes it as the module's
    own name, or as a parent's name anywhere in the full name.
    """
    try:
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:
        return f"{pattern}." in module_name or pattern in (module_name, module_name.rpartition(".")[2])
    return not should_convert_module(module_name, [pattern])


def saved_quantized(parts: Parts) -> bool:
    """Whether the checkpoint itself was saved in 4 bits, so that its own configuration decided."""
    return bool(getattr(getattr(parts.base, "hf_quantizer", None), "pre_quantized", False))


def idle_entries(parts: Parts) -> dict[str, str]:
    """The skip list's entries that match no linear layer, each with the entry that would, or ``""``."""
    linears = [name for name, _ in parts.named_linears()]
    idle = [entry for entry in skip_list(parts) or () if not any(skipped_by(entry, name) for name in linears)]
    return {entry: _entry_that_would(entry, parts) for entry in idle}


def unheeded_entries(parts: Parts, quantized: Collection[str]) -> list[str]:
    """What the skip list's idle entries leave undone, a sentence each.

    Left out is an entry whose layers are kept anyway, and one that names nothing here but is of a list for all families
    or of a checkpoint that was saved in 4 bits with it.

    Args:
        parts: The model.
        quantized: Names of the linear layers that are quantized.
    """
    import transformers

    said = []
    for entry in idle_entries(parts):
        named = [name for name, _ in parts.named_linears() if f".{entry.strip('.')}." in f".{name}."]
        left = [name for name in named if name in quantized]
        if not left and (named or entry in GENERIC or saved_quantized(parts)):
            continue
        undone = f"{len(left)} linears with it in their path are quantized" if left else "none has it in its path"
        # A backslash would be doubled where the entry is shown as Python writes it.
        would = f".*[.]{entry.strip('.').replace('.', '[.]')}([.]|$)"
        fix = f"; {would!r} keeps them" if left and all(skipped_by(would, name) for name in left) else ""
        said.append(
            f"the entry {entry!r} of the skip list matches no linear layer on Transformers {transformers.__version__}: "
            f"{undone}{fix}"
        )
    return said


def _entry_that_would(entry: str, parts: Parts) -> str:
    modules = [name for name, _ in parts.base.named_modules() if name]
    today = re.sub(r"^model\.(?!language_model|visual)", "model.language_model.", entry)
    fitting = [name for name in modules if name == today or name.endswith(f".{entry}")]
    return min(fitting, key=len, default="")


def entries_keeping(parts: Parts, names: Sequence[str]) -> str:
    """Which entries of the skip list keep these linear layers out of the quantization, in words; empty if none does."""
    said = []
    for entry in skip_list(parts) or ():
        kept = [name for name in names if skipped_by(entry, name)]
        if not kept:
            continue
        wide = [name for name in kept if not f".{name}.".count(f".{entry}.")]
        more = f", {wide[-1]} among them: it is a regular expression, matched from the start of a name" if wide else ""
        said.append(f"{entry!r} keeps {len(kept)} of them out{more}")
    return "; ".join(said)


def chosen_by_name(parts: Parts, names: Sequence[str]) -> list[str]:
    """Those of the linear layers that a checkpoint saved in 4 bits names in its own skip list, by their full path."""
    if not saved_quantized(parts):
        return []
    paths = [entry for entry in skip_list(parts) or () if "." in entry and entry != parts.roots["language"]]
    return [name for name in names if any(f"{name}.".startswith(f"{path}.") for path in paths)]


def cause_of_misfits(parts: Parts, groups: Collection[Group]) -> str:
    """Why the class and the weight of layers do not belong together, and the fix.

    Args:
        parts: The model.
        groups: The parts of it that these layers are in.
    """
    import transformers

    head = parts.lm_head
    if getattr(head, "weight", None) is parts.embeddings.weight and type(head).__name__ == "Linear4bit":
        return (
            f"the head is tied to the embeddings, which are not quantized: add {parts.roots['lm_head']!r} to "
            "llm_int8_skip_modules"
        )
    idle = {entry: better for entry, better in idle_entries(parts).items() if better}
    if saved_quantized(parts) and idle:
        written = ", ".join(f"{entry!r} (write {better!r})" for entry, better in idle.items())
        return (
            f"the checkpoint holds them in 16 bits, but in its skip list entries match no module on Transformers "
            f"{transformers.__version__}: {written} in its config.json"
        )
    if saved_quantized(parts) and set(groups) <= {*TOWER, "lm_head"}:
        entries = [parts.roots[group] for group in (*TOWER, "lm_head") if group in groups]
        outer = [entry for entry in entries if not any(entry.startswith(f"{other}.") for other in entries)]
        return (
            f"the checkpoint holds them in 16 bits, but the skip list in its config.json ({skip_list(parts)}) does not "
            f"keep them so: add {', '.join(map(repr, outer))} to llm_int8_skip_modules in its quantization_config"
        )
    return (
        "the class was exchanged, or the weight was put in, without quantizing: load the model with "
        "from_pretrained(..., quantization_config=...)"
    )
