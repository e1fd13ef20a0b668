"""The numbers in memory against the checkpoint: every weight, every block statistic, every value of the config."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.config_values import compared_config
from pytest_qvl.checks.support.initialised import drawn_units
from pytest_qvl.checks.support.lora import rewrites_base
from pytest_qvl.checks.support.resized_vocabulary import Resized, lost_rows, resized_vocabulary, resizing_notes
from pytest_qvl.checks.support.stored_values import (
    Difference,
    Routes,
    dequantized_difference,
    packed_differences,
    plain_difference,
    quantized_differences,
    usual_cause,
)
from pytest_qvl.checks.support.unpacked_weights import repacked_sentence
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import adapted_layers, adapter_configs, base_modules, is_merged, original_module
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.quantized import dtype_name, linear_states
from pytest_qvl.models.sources.digests import altered_files
from pytest_qvl.models.sources.loading import has_tied_head
from pytest_qvl.models.training import asked_biases, trained_on_purpose

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from pytest_qvl.models.sources.stored import Stored

NAMED = 3
TWINS = 40  # tensors that are tried for "two layers changed places"


@check(promise=1)
def weights_as_stored(
    model: Any, checkpoint: str | Path | None = None, policy: AdapterPolicy | None = None
) -> Evidence:
    """Prove that every tensor in memory is, bit for bit, what the checkpoint holds, and computes with its values.

    Read tensor by tensor beside the model, large ones in pieces; nothing is run. There are no limits but one:

    - *16 and 32 bits*: the stored tensor, cast to the dtype in memory (rounded to the nearest), has the same bits.
    - *4 bits*: the stored tensor, quantized once more by bitsandbytes with the layer's own type and block size, where
      the layer is or else on the CPU, has the same packed data, block statistics and double quantization. The code
      book is that of the QLoRA paper. The offset of double quantization is a mean, whose last bits depend on the order
      of summation: it is held to the float64 mean within 64 roundings of float32. Of a checkpoint saved in 4 bits,
      every stored byte is compared.
    - *values*: epsilons, rotary frequencies and sections, attention scaling and heads, windows, tied head, token ids
      in the live modules are those of ``config.json``.
    - *files*: of the embedded model and of the Hugging Face hub's cache, which names each file by its SHA-256, the
      content has that digest.
    - *never trained*: no layer, block or merger of a trained checkpoint has weights as they were drawn. Rows and
      columns of independent draws have norms within six deviations of what chance allows; where everything has, the
      weights are random on purpose, and a note says so.

    Of embeddings and head that were resized after the load, the rows that both have are compared. A trimmed vocabulary
    is noted; rows that were added are a finding, unless the adapter holds them: no checkpoint does.

    What is trained on purpose is compared with nothing, and noted: parts that the policy names, biases that the
    adapter trains, layers that the adapter's initialisation has rewritten. Synthetic weights are drawn again from their
    seed.

    Args:
        model: The model, bare or wrapped by PEFT, quantized or not. Adapters are not looked at.
        checkpoint: Folder of the checkpoint; the one that the model was loaded from if not given.
        policy: What may be trained beside adapters; nothing if not given.

    Raises:
        CheckFailed: Names the tensors, the first element that differs, how many do, and the usual cause; or tables of
            the vocabulary with rows that no file holds.
        CannotJudge: Nobody knows what the model was loaded from, a CPU kernel has rewritten the quantized weights, or
            an adapter is merged into them.
        ValueError: The checkpoint is no folder with safetensors files, or they are not readable.
    """
    parts = anatomy(model)
    _refuse_rewritten(parts)
    stored = _stored(parts, checkpoint)
    judge = Judge("weights_as_stored", "every number is the checkpoint's")
    altered = () if stored.folder is None else altered_files(stored.folder)
    judge.equal("files that were altered", len(altered), 0, else_say="; ".join(altered))
    report = stored.misfits(parts)
    resized = resized_vocabulary(parts, report, stored.config)
    misfits = replace(report, mismatched=tuple(each for each in report.mismatched if each[0] not in resized)).problems
    judge.equal("kinds of tensors that do not fit", len(misfits), 0, else_say="; ".join(misfits))
    comparison = _Comparison(parts, stored, policy or AdapterPolicy(), resized)
    comparison.run()
    judge.report("tensors compared", comparison.compared)
    judge.equal("tensors that differ", len(comparison.wrong), 0, else_say=comparison.story())
    _judge_added_rows(judge, comparison)
    config = compared_config(parts, stored.config)
    judge.report("values of config.json compared", config.compared)
    judge.equal(
        "values that differ from config.json",
        len(config.problems),
        0,
        else_say=f"not as config.json has it: {some(config.problems, '; ')}; was it set after the load, or is the "
        "library patched or broken?",
    )
    _judge_drawn(judge, stored, comparison.matrices)
    for note in (
        *comparison.notes(),
        *resizing_notes(parts, [*comparison.tables.values()]),
        *config.notes,
        f"of {stored.what}",
    ):
        judge.note(note)
    return judge.verdict()


def _refuse_rewritten(parts: Parts) -> None:
    repacked = [state.name for state in linear_states(parts) if state.repacked]
    if repacked:
        raise CannotJudge(repacked_sentence(repacked))
    if is_merged(parts):
        raise CannotJudge(
            "an adapter is merged into the weights, so they are not the checkpoint's: call unmerge_adapter() first"
        )


def _stored(parts: Parts, checkpoint: str | Path | None) -> Stored:
    from pytest_qvl.models.sources.stored import StoredFolder, StoredSynthetic, loaded_from
    from pytest_qvl.models.sources.synthetic import kept_drawn

    drawn = kept_drawn(parts)
    if checkpoint is None and drawn is not None:
        return StoredSynthetic(parts, drawn)
    folder = loaded_from(parts) if checkpoint is None else Path(checkpoint).expanduser()
    if folder is None or not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        if checkpoint is not None:
            raise InputError(
                f"{str(checkpoint)!r} is no folder with config.json and *.safetensors: give the model's checkpoint"
            )
        raise CannotJudge(
            "nobody knows which files this model was loaded from: pass the checkpoint's folder as `checkpoint`, or "
            "load it by a backend of this package"
        )
    return StoredFolder(folder)


@dataclass
class _Wrong:
    """A tensor that is not what was stored."""

    name: str
    tensor: torch.Tensor
    found: list[Difference | str]


@dataclass
class _Comparison:
    """Every parameter and persistent buffer of the base model against what was stored."""

    parts: Parts
    stored: Stored
    policy: AdapterPolicy
    resized: Mapping[str, Resized]
    compared: int = 0
    tables: dict[str, Resized] = field(default_factory=dict)
    wrong: list[_Wrong] = field(default_factory=list)
    matrices: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What the model's dtypes allow a tensor to have passed on its way."""
        self.through = _dtypes(self.parts)
        self.routes = Routes(self.through)

    def run(self) -> None:
        purposely = self._left_out_on_purpose()
        done: set[int] = set()
        for place, module in base_modules(self.parts).items():
            volatile: set[str] = module._non_persistent_buffers_set
            buffers = [(key, b) for key, b in module.named_buffers(recurse=False) if key not in volatile]
            for key, tensor in (*module.named_parameters(recurse=False), *buffers):
                name = f"{place}.{key}" if place else key
                if id(tensor) in done:
                    continue  # tied
                stored = self._stored_name(name)
                if stored is None:
                    continue  # missing: told with the names that do not fit
                done.add(id(tensor))
                if reason := purposely.get(id(tensor)) or _cannot_compare(module, tensor):
                    self.left_out.setdefault(reason, []).append(name)
                    continue
                self._compare(name, stored, module, tensor)

    def _stored_name(self, name: str) -> str | None:
        """Under which name a tensor is stored: a tied head may be there under either of its names."""
        if name in self.stored:
            return name
        pair = [f"{self.parts.roots[group]}.weight" for group in ("embeddings", "lm_head")]
        if name in pair and has_tied_head(self.parts):
            return next((other for other in pair if other in self.stored), None)
        return None

    def _compare(self, name: str, stored: str, module: Any, tensor: Any) -> None:
        self.compared += 1
        packed = self.stored.packed(stored)
        found: list[Difference | str | None]
        if getattr(tensor, "quant_state", None) is not None:
            shape = (module.out_features, module.in_features)
            if packed is not None:
                found = [*packed_differences(name, tensor, packed)]
            else:
                found = [*quantized_differences(name, tensor, shape, self.stored, self.routes)]
        elif packed is not None:
            found = [dequantized_difference(name, tensor, packed)]
        elif (table := self.resized.get(stored)) is None and self.stored.shape(stored) != tuple(tensor.shape):
            found = [f"{name}: its shape is {tuple(tensor.shape)} instead of {self.stored.shape(stored)}"]
        else:
            if table is not None:
                self.tables[stored] = table
            rows = tensor if table is None else tensor.detach()[: table.common]
            difference, between = plain_difference(stored, rows, self.stored, self.through)
            found = [difference]
            if between is not None:
                reason = f"rounded to {dtype_name(between)} on the way, as after a load in it"
                self.left_out.setdefault(reason, []).append(name)
        if tensor.ndim > 1 and packed is None and self.parts.group_of(name) not in self.policy.trained:
            self.matrices.append(stored)
        if real := [each for each in found if each is not None]:
            self.wrong.append(_Wrong(stored, tensor, real))

    def story(self) -> str:
        """The first tensors that differ, each with the usual cause."""
        if not self.wrong:
            return ""
        told = [self._told(wrong) for wrong in self.wrong[:NAMED]]
        more = f"; and {len(self.wrong) - NAMED:,} more tensors" if len(self.wrong) > NAMED else ""
        return (
            f"{len(self.wrong)} of {self.compared} tensors are not what the checkpoint holds: {'; '.join(told)}{more}"
        )

    def _told(self, wrong: _Wrong) -> str:
        first, *others = wrong.found
        parts = [each.part if isinstance(each, Difference) else each.partition(": ")[2] for each in others]
        beside = f" (beside it: {', '.join(parts)})" if parts else ""
        if isinstance(first, str):
            return f"{first}{beside}"
        rows = next(self.stored.pieces(wrong.name, math.prod(wrong.tensor.shape[1:])))  # whole ones
        cause = usual_cause(first, wrong.tensor, rows, self._twin(wrong))
        return f"{first}{beside}: {cause}"

    def _twin(self, wrong: _Wrong) -> str:
        """Another tensor that differs too, and whose stored values this one holds."""
        kind = _kind(wrong.name)
        others = [each for each in self.wrong if each is not wrong and _kind(each.name) == kind][:TWINS]
        for other in others:
            if other.tensor.shape != wrong.tensor.shape or other.tensor.dtype != wrong.tensor.dtype:
                continue
            if getattr(wrong.tensor, "quant_state", None) is None:
                same = (
                    self.stored.packed(other.name) is None
                    and not plain_difference(other.name, wrong.tensor, self.stored, self.through)[0]
                )
            else:
                packed = self.stored.packed(other.name)
                shape = tuple(wrong.tensor.quant_state.shape)  # type: ignore[attr-defined]
                same = not (
                    packed_differences(other.name, wrong.tensor, packed)
                    if packed is not None
                    else quantized_differences(other.name, wrong.tensor, shape, self.stored, self.routes)
                )
            if same:
                return other.name
        return ""

    def _left_out_on_purpose(self) -> dict[int, str]:
        """Tensors that training or an adapter changes on purpose, with the reason."""
        found: dict[int, str] = {}
        for parameter in trained_on_purpose(self.parts, self.policy).values():
            found[id(parameter)] = "trained on purpose, as the policy names them"
        for parameter in asked_biases(self.parts).values():
            if parameter.requires_grad:
                found[id(parameter)] = "trained with the adapter (its bias setting)"
        if any(rewrites_base(config) for config in adapter_configs(self.parts).values()):
            for layer in adapted_layers(self.parts).values():
                weight = original_module(layer)._parameters.get("weight")
                found[id(weight)] = "rewritten by the adapter's initialisation"
        return found

    def notes(self) -> list[str]:
        """What was not compared, or only after a second cast."""
        return [f"{len(names)} tensors {reason} (first: {names[0]})" for reason, names in self.left_out.items()]


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _cannot_compare(module: Any, tensor: Any) -> str:
    import bitsandbytes as bnb

    if tensor.device.type == "meta":
        return "not compared: they are on the meta device and have no data"
    if isinstance(module, bnb.nn.Linear8bitLt) and tensor is module._parameters.get("weight"):
        return "not compared: they are stored in 8 bits"
    return ""


def _dtypes(parts: Parts) -> list[torch.dtype]:
    """The dtypes that the model was loaded, or computes, in: a tensor may have been cast to them on its way."""
    import torch

    kept = "dtype" if hasattr(parts.config, "dtype") else "torch_dtype"  # Transformers 4's name, which 5 warns about
    named = [str(getattr(parts.config, kept, None) or "")]
    named += [state.compute_dtype or "" for state in linear_states(parts)]
    found = [getattr(torch, name.removeprefix("torch."), None) for name in dict.fromkeys(named) if name]
    return [dtype for dtype in found if isinstance(dtype, torch.dtype)]


def _judge_added_rows(judge: Judge, comparison: _Comparison) -> None:
    """Rows that a resize has added to embeddings or head since the load are in no checkpoint."""
    lost = {name: each for name, each in comparison.tables.items() if each.rows > each.stored and not each.kept_by}
    if not lost:
        return
    as_stored = not any(wrong.name in lost for wrong in comparison.wrong)
    judge.equal(
        "rows that no file holds",
        sum(each.rows - each.stored for each in lost.values()),
        0,
        else_say=lost_rows(comparison.parts, [*lost.values()], as_stored=as_stored, what=comparison.stored.what),
    )


def _judge_drawn(judge: Judge, stored: Stored, names: list[str]) -> None:
    units = drawn_units(stored, names)
    everything = bool(units.drawn) and not units.others
    if everything:
        judge.note("all layers are as they were drawn: random weights, which answer nothing")
    judge.equal(
        "layers that were never trained",
        0 if everything else len(units.drawn),
        0,
        else_say=f"{len(units.drawn)} of {len(units.drawn) + len(units.others)} layers have weights as they were drawn "
        f"({some(units.drawn)}), beside trained ones: was the checkpoint saved from a model of which a part was "
        "initialised anew? Download or save it again",
    )
