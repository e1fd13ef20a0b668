"""What is in an adapter's file is what is in the model."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.adapter_effect import judge_effect, judge_finite, judge_numbers
from pytest_qvl.checks.support.bitwise import bits_of
from pytest_qvl.checks.support.lora import (
    RANK_COUNT,
    foreign_types,
    heads_are_tied,
    no_adapter,
    rewrites_base,
    zero_initialised_matrices,
)
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import (
    AdapterSlot,
    active_adapters,
    adapted_layers,
    adapter_configs,
    adapter_parameters,
    adapter_tensors,
    chosen_adapter,
    is_merged,
    remove_peft_layers,
    save_adapter,
    saved_tensors,
)
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import base_tensors
from pytest_qvl.models.sources.base_names import name_of_base, other_base
from pytest_qvl.models.sources.model_source import adapter_config, check_adapter
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import asked_biases, checkpointing, weights_restored

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn

    from pytest_qvl.models.anatomy import Parts

SECOND = "qvl_loaded_back"
_SEED = 20_311
# PEFT starts matrices that are not zero at about this size; what is saved has to tell itself from zeros, no more.
_DEVIATION = 0.02
_STACKS = (".layers.", ".blocks.")


@check(promise=2)
def adapter_roundtrip(model: Any, folder: str | Path | None = None) -> Evidence:
    """Prove that the adapter in the model is, bit for bit, the adapter in a folder; or that saving and loading keep it.

    Where names in the file and in the model do not meet, PEFT leaves the adapter as it was initialised (B = 0: it
    does nothing) and only warns (huggingface/transformers#38627, illuin-tech/colpali#424: Transformers moved the
    language backbone in 4.52, and adapters saved before load as zeros on several releases since). So tensors are
    compared, not messages:

    - every tensor of the file has its place in the model, and every adapter tensor of the model is in the file;
    - each pair has one shape and, once the file's is cast to the model's dtype, the same bits;
    - all of them are finite.

    Tensors are paired by name; where a name is not found, by its end from the last ``.layers.`` or ``.blocks.`` on, so
    that an adapter saved under another layout passes exactly if something mapped it. Base weights that PEFT saved
    beside the adapter (``save_embedding_layers``, which is its default where embeddings or head are adapted) are held
    against the base model's.

    With `folder`, its file is held against the model, and has to be worth loading: it does something
    (:func:`pytest_qvl.checks.support.adapter_effect.judge_effect`) and was trained for this base model
    (:func:`pytest_qvl.models.sources.base_names.other_base`). Without, the adapter is given random values (put back
    bitwise), saved into a temporary folder, held against that file, and loaded from it onto the bare base model, as a
    new process would; what was loaded is dropped. This needs the adapter's size on disk and once more on the device
    (160 MB for rank 16 on the language backbone of a 7B model). A merged adapter stays merged.

    Args:
        model: The model wrapped by PEFT, or adapted by Transformers' ``add_adapter``.
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, which the model's adapter
            should have come from.

    Raises:
        CheckFailed: Tensors without a place, tensors that the file lacks, other values, values that are not finite;
            with `folder`, also an adapter without any effect, or one of another base model.
        CannotJudge: The adapter is no LoRA.
        ValueError: The model has no adapter, or the folder holds none.
    """
    parts = anatomy(model)
    if not adapter_parameters(parts):
        raise InputError(no_adapter(parts))
    if foreign := foreign_types(parts):
        raise CannotJudge(
            f"the adapter on the model is {', '.join(foreign)}; the names in a file are known of LoRA only"
        )
    adapter = chosen_adapter(parts)
    if folder is not None:
        return _judge_folder(parts, adapter, Path(folder))
    judge = Judge("adapter_roundtrip", "saving and loading keep the adapter")
    judge_finite(judge, _held(parts, adapter), "the model")
    with tempfile.TemporaryDirectory(prefix="qvl-adapter-") as name, preserved(model), _random(parts, adapter):
        saved_in = save_adapter(model, Path(name))
        saved = saved_tensors(saved_in)
        kept = _compare(judge, parts, saved, _held(parts, adapter), "what was saved")
        if rewrites_base(adapter_configs(parts)[adapter]):
            judge.note("not loaded back: an adapter of this initialisation writes into the base weights once more")
        elif kept:
            with _loaded(parts, adapter, saved_in) as again:
                _compare(judge, again, saved, _held(again, chosen_adapter(again)), "what was loaded back")
            _note_beside(judge, parts, saved, saved_in)
    if is_merged(parts):
        judge.note("the adapter is merged into the base weights, and stayed merged")
    _note_ranks(judge, parts, adapter)
    return judge.verdict()


def _judge_folder(parts: Parts, adapter: str, folder: Path) -> Evidence:
    check_adapter(folder)
    judge = Judge("adapter_roundtrip", "the adapter in the model is the one in the folder")
    saved, held = saved_tensors(folder), _held(parts, adapter)
    judge_numbers(judge, saved, str(folder))
    judge_finite(judge, held, str(folder))
    _compare(judge, parts, saved, held, str(folder))
    judge_effect(judge, parts, adapter, str(folder))
    said = other_base(adapter_config(folder), name_of_base(parts), parts.config)
    if said.certain:
        judge.problem(said.sentence)
    elif said.sentence:
        judge.note(said.sentence)
    _note_ranks(judge, parts, adapter)
    return judge.verdict()


def _note_ranks(judge: Judge, parts: Parts, adapter: str) -> None:
    """Say what PEFT does not save of AdaLoRA: each layer's count of ranks, and how ranks are allotted."""
    counts = {name: getattr(layer, RANK_COUNT, {}) for name, layer in adapted_layers(parts).items()}
    ranks = {
        name: (counts[name][adapter], layer.r[adapter])
        for name, layer in adapted_layers(parts).items()
        if adapter in counts[name]
    }
    if not ranks:
        return
    trainable = sum(number.requires_grad for number, _ in ranks.values())
    off = [f"{name} ({number.item():g}, loaded as {rank})" for name, (number, rank) in ranks.items() if number != rank]
    judge.note(
        f"AdaLoRA: PEFT does not save {RANK_COUNT} and the importance of each rank: a loaded adapter divides by its "
        "layers' own ranks, and rank allocation starts again"
        + (f"; {trainable} of {len(ranks)} {RANK_COUNT} require grad, so an optimizer moves them" if trainable else "")
        + (f"; {len(off)} are no longer their layer's rank: {some(off)}" if off else "")
    )


def _held(parts: Parts, adapter: str) -> dict[str, nn.Parameter]:
    """Tensors of one adapter, and the biases trained with it, by their names on disk."""
    return {**adapter_tensors(parts, adapter), **asked_biases(parts)}


@contextmanager
def _random(parts: Parts, adapter: str) -> Iterator[None]:
    """Random values in place of the zeros of a fresh adapter, so that a lost tensor shows."""
    import torch

    tensors = adapter_tensors(parts, adapter)
    # MiCA's A is zero too, as any matrix may be that has learned nothing.
    zeros = {**zero_initialised_matrices(tensors), **{name: p for name, p in tensors.items() if not bool(p.any())}}
    with weights_restored([*zeros.values(), *asked_biases(parts).values()]), torch.no_grad():
        generator = torch.Generator().manual_seed(_SEED)
        for parameter in zeros.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(_DEVIATION))
        yield


@contextmanager
def _loaded(parts: Parts, adapter: str, folder: Path) -> Iterator[Parts]:
    """The saved adapter on the bare base model, loaded the way the model's own was made; all is put back."""
    import torch
    from peft import PeftModel

    slot, biases = AdapterSlot.of(parts.wrapped), list(asked_biases(parts).values())
    slot.detach()
    try:
        with torch.no_grad():
            for bias in biases:  # part of the base model: not to be found there already
                bias.zero_()
        with checkpointing(parts, False):  # with it, PEFT hooks the embeddings for gradients
            if parts.is_peft:
                yield anatomy(PeftModel.from_pretrained(parts.base, folder, adapter_name=adapter))
            else:
                parts.base.load_adapter(folder, adapter_name=adapter)
                yield anatomy(parts.base)
    finally:
        remove_peft_layers(parts.base)
        slot.attach()


def _note_beside(judge: Judge, parts: Parts, saved: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Say what a second copy on the same model would lose, where embeddings and head are tied.

    PEFT ties copies, rows and matrices of the head to those of the embeddings when the first adapter is attached
    (``ensure_weight_tying``), and on Transformers 5 not again for the next (huggingface/peft#2864).
    """
    model: Any = parts.wrapped
    active = active_adapters(parts)
    asked = getattr(adapter_configs(parts)[chosen_adapter(parts)], "ensure_weight_tying", False)
    alone = parts.is_peft and len(active) == 1 and not is_merged(parts)  # another one would undo a merge
    if not (asked and alone and heads_are_tied(parts)):
        return
    try:
        model.load_adapter(folder, adapter_name=SECOND, is_trainable=False)
        _, homeless = _pair(saved, _held(parts, SECOND))
    finally:
        if SECOND in model.peft_config:
            model.delete_adapter(SECOND)
        model.set_adapter(active[0])
    if homeless:
        judge.note(
            f"a fresh base model gets all of it, but beside another adapter PEFT's load_adapter() loses "
            f"{some(homeless)}: embeddings and head are tied, and PEFT ties the first adapter's only"
        )


def _compare(
    judge: Judge, parts: Parts, saved: Mapping[str, torch.Tensor], held: Mapping[str, nn.Parameter], what: str
) -> bool:
    pairs, homeless = _pair(saved, held)
    homeless = _judge_base_weights(judge, parts, saved, homeless, what)
    placed = set(pairs.values())
    absent = [name for name in held if name not in placed]
    judge.equal(
        f"{what}: tensors without a place in the model",
        len(homeless),
        0,
        else_say=(
            f"{len(homeless)} of {len(saved)} tensors of {what} have no place in the model, so what they hold is "
            f"lost: {some(homeless)}; were they saved by another release, or for other target modules?"
        ),
    )
    judge.equal(
        f"{what}: adapter tensors it does not have",
        len(absent),
        0,
        else_say=(
            f"{len(absent)} of {len(held)} adapter tensors of the model are not in {what}, so they keep the values "
            f"they were initialised with: {some(absent)}"
        ),
    )
    other = [name for name, home in pairs.items() if not _same(saved[name], held[home])]
    renamed = [name for name in other if pairs[name] != name]
    judge.equal(
        f"{what}: adapter tensors with other values",
        len(other),
        0,
        else_say=f"{len(other)} of {len(held)} adapter tensors are not bitwise those of {what}: {some(other)}"
        + _told(saved, held, {name: pairs[name] for name in other})
        + (
            f"; the model calls it {pairs[renamed[0]]}: this release does not map the old name, and the adapter was "
            "never loaded"
            if renamed
            else ""
        ),
    )
    judge.report(f"{what}: adapter tensors compared", len(pairs))
    return not (homeless or absent or other)


def _judge_base_weights(
    judge: Judge, parts: Parts, saved: Mapping[str, torch.Tensor], homeless: list[str], what: str
) -> list[str]:
    """Hold base weights that were saved beside the adapter against the model's.

    Returns:
        The names that are no base weights either.
    """
    base = {name.removesuffix(".weight"): tensor for name, tensor in base_tensors(parts)}
    beside = {name: base.get(name.replace(".base_layer", "")) for name in homeless}
    found = {name: tensor for name, tensor in beside.items() if tensor is not None}
    other = [name for name, tensor in found.items() if not _same(saved[name], tensor)]
    if other:
        judge.problem(
            f"{what} holds base weights beside the adapter, and {len(other)} of {len(found)} are not bitwise those of "
            f"this base model: {some(other)}"
        )
    elif found:
        judge.report(f"{what}: base weights beside the adapter, compared", len(found))
    return [name for name in homeless if name not in found]


def _pair(saved: Mapping[str, Any], held: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Names in the file with their names in the model, and those that have none."""
    pairs = {name: name for name in saved if name in held}
    ends: dict[str, list[str]] = {}
    for name in held:
        if name not in pairs:
            ends.setdefault(_end(name), []).append(name)
    homeless = []
    for name in saved:
        if name in pairs:
            continue
        homes = ends.get(_end(name), [])
        if len(homes) == 1:
            pairs[name] = homes.pop()
        else:
            homeless.append(name)
    return pairs, homeless


def _end(name: str) -> str:
    start = max(name.rfind(stack) for stack in _STACKS)
    return name if start < 0 else name[start:]


def _same(saved: torch.Tensor, held: torch.Tensor) -> bool:
    import torch

    if saved.shape != held.shape:
        return False
    return bool(torch.equal(bits_of(saved.to(held.dtype)), bits_of(held.detach().cpu())))


def _told(saved: Mapping[str, torch.Tensor], held: Mapping[str, nn.Parameter], other: Mapping[str, str]) -> str:
    """What is most unlike: a shape, or the largest value."""
    for name, home in other.items():
        if saved[name].shape != held[home].shape:
            return f" ({name} is {tuple(saved[name].shape)} there and {tuple(held[home].shape)} in the model)"
    largest = {name: (_largest(saved[name]), _largest(held[home])) for name, home in other.items()}
    if not largest:
        return ""
    name = max(largest, key=lambda n: abs(largest[n][0] - largest[n][1]))
    there, here = largest[name]
    return f" (the largest value of {name} is {there:.3g} there and {here:.3g} in the model)"


def _largest(values: torch.Tensor) -> float:
    return float(values.detach().abs().amax()) if values.numel() else 0.0
