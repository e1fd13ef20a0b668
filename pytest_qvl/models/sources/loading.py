"""What a load found: tensors that the checkpoint lacks, holds in another shape, or holds for nobody.

``from_pretrained`` fills what is missing with random values and logs a table; such a model answers, trains and
generates.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.anatomy import Group, Parts, anatomy
from pytest_qvl.models.backends import ModelLoadError, one_line
from pytest_qvl.models.quantized import LinearState, linear_states
from pytest_qvl.models.renamed import in_todays_layout
from pytest_qvl.models.skip_rules import skipped_by
from pytest_qvl.models.skips import cause_of_misfits, skip_list
from pytest_qvl.models.sources.hub import model_folder
from pytest_qvl.models.sources.model_source import ModelSource, StoredTensor, stored_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Shape = tuple[int, ...]

_NAMED = 3
_KEPT_AS = "_qvl_loading_report"
# Buffers that earlier releases saved and this one computes (`PreTrainedModel._adjust_missing_and_unexpected_keys`).
_COMPUTED = re.compile(r"(rotary_emb|rotary_pos_emb)\.inv_freq$|(^|\.)position_ids$")
_QUANT_STATE = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$")


@dataclass(frozen=True)
class LoadingReport:
    """Which tensors of a loaded model its checkpoint lacks, holds in another shape, or holds for no module.

    Attributes:
        checkpoint: What was loaded, in words.
        missing: Tensors of the model that the checkpoint does not hold; tied heads are not among them.
        unexpected: Tensors of the checkpoint that the model has no place for.
        mismatched: Tensors that both have, with their shape in the checkpoint and in the model.
        folder: Where its files are; ``None`` where nothing was loaded.
    """

    checkpoint: str
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    folder: Path | None = field(default=None, compare=False)

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each kind of tensors that do not fit, with the usual cause."""
        found = []
        if self.missing:
            found.append(
                f"{self.checkpoint} lacks {_counted(self.missing, 'tensor')} of the model, which Transformers fills "
                f"with random values{self._cause_of_missing()}"
            )
        if self.mismatched:
            _, stored, wanted = self.mismatched[0]
            found.append(
                f"{self.checkpoint} holds {_counted([name for name, *_ in self.mismatched], 'tensor')} in another "
                f"shape than config.json asks for ({_sides(stored)} instead of {_sides(wanted)})"
                f"{self._cause_of_shapes()}"
            )
        if self.unexpected:
            found.append(
                f"{self.checkpoint} holds {_counted(self.unexpected, 'tensor')} that the model has no place for"
                f"{self._cause_of_unexpected()}"
            )
        return tuple(found)

    def _cause_of_missing(self) -> str:
        if self.unexpected and {_tail(n) for n in self.missing} & {_tail(n) for n in self.unexpected}:
            return (
                f": it holds them under other names ({self.unexpected[0]}), as an older or wrapped layout has them; "
                "save it again with the installed Transformers"
            )
        if self.missing == ("lm_head.weight",):
            return (
                ': if the head is meant to be the embeddings, set "tie_word_embeddings": true at the top of '
                "config.json (in text_config alone it does not tie); otherwise save the checkpoint again with its head"
            )
        return ": an upload or a save that is not complete; download or save the checkpoint again"

    def _cause_of_shapes(self) -> str:
        names = {name.rpartition(".")[0].rpartition(".")[2] for name, *_ in self.mismatched}
        if names <= {"embed_tokens", "lm_head"}:
            rows = self.mismatched[0][1][0]
            return f': the vocabulary was changed; set "vocab_size" to {rows} in config.json and in its text_config'
        return ": config.json belongs to another model"

    def _cause_of_unexpected(self) -> str:
        if any(".lora_" in name or ".base_layer." in name for name in self.unexpected):
            return ": these are an adapter's; load it onto its base with --qvl-adapter, or merge it before saving"
        if self.missing:
            return ""
        return ": config.json describes a smaller or another model, and they are dropped"


def _counted(names: Iterable[str], noun: str) -> str:
    names = sorted(names, key=_natural)
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({', '.join(names[:_NAMED])}{more})"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _tail(name: str) -> str:
    """The end of a name that every layout has: from the layer's number on, or the last two parts."""
    match = re.search(r"\.\d+\..*", name)
    return match[0] if match else ".".join(name.split(".")[-2:])


def _sides(shape: Shape) -> str:
    return "x".join(map(str, shape))


def reported_by_transformers(info: dict[str, Any], model: Any, source: ModelSource) -> LoadingReport:
    """From what ``from_pretrained(..., output_loading_info=True)`` returns beside the model.

    ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys`` are lists in Transformers 4.57 and sets in 5;
    tied heads and buffers that are computed anew are left out of them already. A mismatched key is a bare name in 4.57,
    and a name with both shapes in 5. Shapes are compared once more with the files' headers: where it quantizes,
    Transformers 5 takes a tensor of any shape for what is not quantized.
    """
    checkpoint = f"the checkpoint of {source}"
    folder = model_folder(source)
    with_shapes = [entry for entry in info["mismatched_keys"] if not isinstance(entry, str)]
    reported = {(str(name), tuple(old), tuple(new)) for name, old, new in with_shapes}
    return LoadingReport(
        checkpoint,
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(name for name in info["unexpected_keys"] if not _harmless(name))),
        tuple(sorted(reported.union(() if folder is None else compared_with(model, folder).mismatched))),
        folder,
    )


def compared_with(model: Any, folder: Path, checkpoint: str = "") -> LoadingReport:
    """Compare a model's tensors with the headers of a checkpoint's files; nothing is loaded.

    Names of before Transformers 4.52 count as today's, as ``from_pretrained`` takes them.

    Args:
        model: The model, bare or wrapped by PEFT, quantized or not.
        folder: The checkpoint's folder.
        checkpoint: What to call it; the folder by default.

    Raises:
        ModelSourceError: A file of the checkpoint is not readable.
    """
    parts = anatomy(model)
    stored = {in_todays_layout(name): tensor for name, tensor in stored_tensors(folder).items()}
    wanted = wanted_tensors(parts)
    mismatched = sorted(
        (name, stored[name].shape, wanted[name])
        for name in wanted
        if name in stored and not _fits(stored[name], wanted[name])
    )
    return _report(checkpoint or f"checkpoint {str(folder)!r}", parts, stored, mismatched, folder)


def compared_with_drawn(parts: Parts, drawn: Mapping[str, Shape], what: str) -> LoadingReport:
    """Compare a model's tensors with those that were drawn when it was built.

    Args:
        parts: The model.
        drawn: What :func:`wanted_tensors` gave then.
        what: What to call them.
    """
    wanted = wanted_tensors(parts)
    mismatched = sorted(
        (name, drawn[name], wanted[name]) for name in wanted if name in drawn and drawn[name] != wanted[name]
    )
    return _report(what, parts, drawn, mismatched, None)


def _report(
    what: str, parts: Parts, stored: Iterable[str], mismatched: list[tuple[str, Shape, Shape]], folder: Path | None
) -> LoadingReport:
    wanted, names = set(wanted_tensors(parts)), set(stored)
    return LoadingReport(
        what,
        tuple(sorted(wanted - names - _tied(parts, names))),
        tuple(sorted(name for name in names - wanted if not (_harmless(name) or _left_out(parts, name)))),
        tuple(mismatched),
        folder,
    )


def _fits(stored: StoredTensor, wanted: Shape) -> bool:
    if stored.is_4bit:
        return 2 * stored.nbytes == math.prod(wanted)  # packed: two weights a byte
    return stored.shape == wanted


def _harmless(name: str) -> bool:
    return _COMPUTED.search(name) is not None or _QUANT_STATE.search(name) is not None


def _left_out(parts: Parts, name: str) -> bool:
    """Whether the model's class leaves a tensor out on purpose, as Qwen3.5's does multi-token prediction."""
    patterns = getattr(parts.base, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def wanted_tensors(parts: Parts) -> dict[str, Shape]:
    """The shape of every tensor that a checkpoint of the base model holds, by name; adapters are left out."""
    # As declared, which packed or wrongly loaded data does not show.
    wide: dict[str, Shape] = {f"{s.name}.weight": (s.out_features, s.in_features) for s in linear_states(parts)}
    wide[f"{parts.roots['embeddings']}.weight"] = (parts.vocabulary, parts.text_config.hidden_size)
    found: dict[str, Shape] = {}
    for name, module in base_modules(parts).items():
        volatile: set[str] = module._non_persistent_buffers_set
        buffers = [(key, b) for key, b in module.named_buffers(recurse=False) if key not in volatile]
        for key, tensor in (*module.named_parameters(recurse=False), *buffers):
            full = f"{name}.{key}" if name else key
            found[full] = wide.get(full, tuple(tensor.shape))
    return found


def _tied(parts: Parts, stored: set[str]) -> set[str]:
    """The head's name where the model shares it with the embeddings and the checkpoint holds one of them."""
    pair = {f"{parts.roots['lm_head']}.weight", f"{parts.roots['embeddings']}.weight"}
    return pair if has_tied_head(parts) and pair & stored else set()


def has_tied_head(parts: Parts) -> bool:
    """Whether head and embeddings share one tensor; of the base model, whatever copy an adapter trains of either."""
    modules = base_modules(parts)
    head, table = (modules[parts.roots[group]] for group in ("lm_head", "embeddings"))
    return head._parameters.get("weight") is table._parameters.get("weight")


def why_not_loaded(source: ModelSource, error: BaseException) -> str:
    """What an error of ``from_pretrained`` means: tensors that do not fit, or else what the error says.

    Missing tensors of quantized layers end in errors of many kinds (Transformers 4.57: "`weight` is not an nn.Module").
    """
    try:
        folder = model_folder(source)
        said = "" if folder is None else _misfit_on_disk(folder, "the checkpoint")
    except Exception:  # the configuration or a file is broken too: the first error says so
        said = ""
    return said or one_line(error)


def _misfit_on_disk(folder: Path, checkpoint: str) -> str:
    import transformers

    skeleton = _skeleton(folder)
    problems = compared_with(skeleton, folder, checkpoint).problems
    packed = [
        in_todays_layout(name).removesuffix(".weight")
        for name, tensor in stored_tensors(folder).items()
        if tensor.is_4bit
    ]
    kept = [(name, entry) for entry in skip_list(anatomy(skeleton)) or () for name in packed if skipped_by(entry, name)]
    if kept and not problems:
        (name, entry), *_ = kept
        return (
            f"{checkpoint} holds {len(kept)} layers in 4 bits (first: {name}) that its own skip list keeps out of the "
            f"quantization on Transformers {transformers.__version__} (entry {entry!r}): take the entry out of its "
            "config.json, or quantize the 16-bit base again"
        )
    return "; ".join(problems)


def _skeleton(folder: Path) -> Any:
    """The 16-bit model that a folder's configuration describes, without data."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):  # `from_config` quantizes nothing
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model


def keep_report(model: Any, report: LoadingReport) -> None:
    """Keep a report with the model that it is about."""
    setattr(anatomy(model).base, _KEPT_AS, report)


def kept_report(model: Any) -> LoadingReport | None:
    """The report that a backend kept with the model."""
    report: LoadingReport | None = getattr(anatomy(model).base, _KEPT_AS, None)
    return report


def refuse_unfit(model: Any) -> None:
    """Refuse a model that is not what its checkpoint holds, or cannot run, before anything judges it.

    Raises:
        ModelLoadError: Names the tensors or layers and the usual cause.
    """
    report = kept_report(model)
    # Layers that got no values cannot compute either: one cause, one sentence.
    if said := ("; ".join(report.problems) if report else "") or unusable_layers(anatomy(model)):
        raise ModelLoadError(said)


def unusable_layers(parts: Parts) -> str:
    """Names linear layers whose class and weight do not belong together, so that they compute nothing; or empty."""
    misfits = [state for state in linear_states(parts) if state.misfit]
    if not misfits:
        return ""
    groups: dict[Group, list[LinearState]] = {}
    for state in misfits:
        groups.setdefault(state.group, []).append(state)
    said = [f"{group}: {len(s)} linears ({s[0].name}, ...)" if len(s) > 1 else s[0].name for group, s in groups.items()]
    first = misfits[0]
    cause = cause_of_misfits(parts, groups)
    return f"{', '.join(said)} cannot compute: {first.module}, and {first.misfit}; {cause}"
