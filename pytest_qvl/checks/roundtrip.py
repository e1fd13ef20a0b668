"""What is in an adapter's file is what is in the model."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.adapter import gates, rewrites_base
from pytest_qvl.checks.bitwise import bits_of
from pytest_qvl.checks.entry import check
from pytest_qvl.checks.wording import some
from pytest_qvl.evidence import Evidence, Judge
from pytest_qvl.models.adapters import adapter_parameters, chosen_adapter, name_on_disk, save_adapter, saved_tensors
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import trained_copies, weights_restored
from pytest_qvl.models.weights import check_adapter

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


@check
def adapter_roundtrip(model: Any, folder: str | Path | None = None) -> Evidence:
    """Prove that the adapter in the model is, bit for bit, the adapter in a folder; or that saving and loading keep it.

    Where names in the file and in the model do not meet, PEFT leaves the adapter as it was initialised (B = 0: it
    does nothing) and only warns (huggingface/transformers#38627, illuin-tech/colpali#424: Transformers moved the
    language backbone in 4.52, and adapters saved before load as zeros on several releases since). So tensors are
    compared, not messages:

    - every tensor of the file has its place in the model, and every adapter tensor of the model is in the file;
    - each pair has one shape and, once the file's is cast to the model's dtype, the same bits.

    Tensors are paired by name; where a name is not found, by its end from the last ``.layers.`` or ``.blocks.`` on, so
    that an adapter saved under another layout passes exactly if something mapped it.

    With `folder`, its file is held against the model. Without, the adapter is given random values (put back bitwise),
    saved with ``save_pretrained`` into a temporary folder, held against that file, loaded from it beside itself with
    ``load_adapter`` and held against it again; what was loaded is deleted. This needs the adapter's size on disk and
    once more on the device (160 MB for rank 16 on the language backbone of a 7B model).

    Args:
        model: The model wrapped by PEFT.
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, which the model's adapter
            should have come from.

    Raises:
        CheckFailed: Tensors without a place, tensors that the file lacks, or other values.
        ValueError: The model has no adapter, or the folder holds none.
    """
    parts = anatomy(model)
    if not adapter_parameters(parts):
        raise ValueError("the model carries no adapter; wrap it with peft.get_peft_model first")
    adapter = chosen_adapter(parts)
    if folder is not None:
        check_adapter(Path(folder))
        judge = Judge("adapter_roundtrip", "the adapter in the model is the one in the folder")
        _compare(judge, saved_tensors(Path(folder)), _held(parts, adapter), str(folder))
        return judge.verdict()
    judge = Judge("adapter_roundtrip", "saving and loading keep the adapter")
    with tempfile.TemporaryDirectory(prefix="qvl-adapter-") as name, preserved(model), _random(parts, adapter):
        save_adapter(model, Path(name))
        saved = saved_tensors(Path(name))
        kept = _compare(judge, saved, _held(parts, adapter), "what was saved")
        if rewrites_base(model.peft_config[adapter]):
            judge.note("not loaded back: an adapter of this initialisation writes into the base weights once more")
        elif kept:
            with _loaded(model, Path(name)):
                _compare(judge, saved, _held(parts, SECOND), "what was loaded back")
    return judge.verdict()


def _held(parts: Parts, adapter: str) -> dict[str, nn.Parameter]:
    """Tensors of one adapter, by their names on disk."""
    own = {**adapter_parameters(parts), **trained_copies(parts)}
    marked = {name: p for name, p in own.items() if adapter in name.split(".")}
    return {name_on_disk(name, adapter): parameter for name, parameter in marked.items()}


@contextmanager
def _random(parts: Parts, adapter: str) -> Iterator[None]:
    """Random values in place of the zeros of a fresh adapter, so that a lost tensor shows."""
    import torch

    zeros = {n: p for n, p in gates(adapter_parameters(parts)).items() if adapter in n.split(".")}
    with weights_restored(zeros.values()), torch.no_grad():
        generator = torch.Generator().manual_seed(_SEED)
        for parameter in zeros.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(_DEVIATION))
        yield


@contextmanager
def _loaded(model: Any, folder: Path) -> Iterator[None]:
    """The saved adapter beside the one it was saved from; ``preserved`` puts the rest back."""
    active = model.active_adapter
    try:
        model.load_adapter(folder, adapter_name=SECOND, is_trainable=False)
        yield
    finally:
        if SECOND in model.peft_config:
            model.delete_adapter(SECOND)
        model.set_adapter(active)


def _compare(judge: Judge, saved: Mapping[str, torch.Tensor], held: Mapping[str, nn.Parameter], what: str) -> bool:
    pairs, homeless = _pair(saved, held)
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


def _same(saved: torch.Tensor, held: nn.Parameter) -> bool:
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
