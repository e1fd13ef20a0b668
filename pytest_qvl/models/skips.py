"""Skip lists as the installed Transformers understands them: to explain a census, never to make one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import TOWER
from pytest_qvl.models.skip_advice import meant_by
from pytest_qvl.models.skip_rules import installed_rule, skipped_by

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pytest_qvl.models.anatomy import Group, Parts
    from pytest_qvl.models.skip_advice import Meant

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


def saved_quantized(parts: Parts) -> bool:
    """Whether the checkpoint itself was saved in 4 bits, so that its own configuration decided."""
    return bool(getattr(getattr(parts.base, "hf_quantizer", None), "pre_quantized", False))


def idle_entries(parts: Parts) -> dict[str, Meant]:
    """The skip list's entries that match no linear layer, each with what it was meant to name and what to write."""
    linears = [name for name, _ in parts.named_linears()]
    given, rule = skip_list(parts) or [], installed_rule()
    idle = [entry for entry in given if not any(skipped_by(entry, name) for name in linears)]
    return {entry: meant_by(entry, parts, [each for each in given if each != entry], rule) for entry in idle}


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
    for entry, meant in idle_entries(parts).items():
        left = [name for name in meant.linears if name in quantized]
        if not left and (meant.linears or entry in GENERIC or saved_quantized(parts)):
            continue
        undone = f"{len(left)} linears with {meant.name!r} in their path are quantized"
        fix = f"; write {', '.join(map(repr, meant.instead))} to keep them" if meant.instead else ""
        said.append(
            f"the entry {entry!r} of the skip list matches no linear layer on Transformers {transformers.__version__}: "
            + (f"{undone}{fix}" if left else "none has it in its path")
        )
    return said


def list_to_keep(parts: Parts, kept: Collection[str], names: Sequence[str], others: Sequence[str]) -> list[str]:
    """A skip list for tower and head, and for what else must stay in 16 bits.

    Args:
        parts: The model.
        kept: The parts of it that stay in 16 bits.
        names: Linear layers that the list has to keep.
        others: Linear layers that it must not keep.
    """
    roots: list[str] = []
    for group in ("vision", "merger", "lm_head"):
        root = parts.roots[group]
        if group in kept and not any(_is_below(root, one) for one in roots):
            roots += [] if any(_is_below(other, root) for other in others) else [root]
    left = [name for name in names if not any(_is_below(name, root) for root in roots)]
    return [*roots, *(entries_to_keep(left, others) if left else ())]


def _is_below(name: str, root: str) -> bool:
    return f"{name}.".startswith(f"{root}.")


def entries_to_keep(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The shortest ends of paths, or else whole paths, that keep linear layers in 16 bits.

    Args:
        names: The layers' dotted names in the base model.
        others: Those of layers that must not be kept with them.
    """
    for length in (1, 2):
        ends = sorted({".".join(name.split(".")[-length:]) for name in names})
        kept = all(any(skipped_by(end, name) for end in ends) for name in names)
        if kept and not any(skipped_by(end, other) for end in ends for other in others):
            return ends
    return [*names]


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
    return named_by_path(skip_list(parts) or (), parts, names) if saved_quantized(parts) else []


def named_by_path(entries: Sequence[str], parts: Parts, names: Sequence[str]) -> list[str]:
    """Those of the linear layers that entries of a skip list name by their full path, or a parent's."""
    paths = [entry for entry in entries if "." in entry and entry != parts.roots["language"]]
    return [name for name in names if any(_is_below(name, path) for path in paths)]


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
    idle = {entry: meant.instead for entry, meant in idle_entries(parts).items() if meant.instead}
    if saved_quantized(parts) and idle:
        written = ", ".join(f"{entry!r} (write {', '.join(map(repr, better))})" for entry, better in idle.items())
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
