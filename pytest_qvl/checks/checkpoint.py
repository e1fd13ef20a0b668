"""Checkpoint completeness: every tensor of the model came from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.quantized import base_tensors
from pytest_qvl.models.sources.loading import LoadingReport, compared_with, kept_report


@check(promise=1)
def checkpoint_complete(model: Any, checkpoint: str | Path | None = None) -> Evidence:
    """Prove that the checkpoint held every tensor of the model, in its shape, and nothing for which it has no place.

    ``from_pretrained`` gives what is missing random values and drops what is left over; both end in a table in the
    log, and the model answers, trains and generates. Names and shapes are compared exactly, so there is no limit:

    - *missing*: tensors of the model that the checkpoint lacks. A head tied to the embeddings is not missing.
    - *mismatched*: tensors of another shape, as after the vocabulary was changed without config.json.
    - *left over*: tensors without a place in the model. Buffers that are computed anew (``rotary_emb.inv_freq``,
      ``position_ids``) and the statistics of 4-bit weights are none.
    - *without data*: tensors that are still on the meta device.
    - *not finite*: tensors of the base model, statistics of 4-bit weights among them, with NaN or infinity. Full
      precision is then as broken, so nothing that is compared with it can tell.

    Beyond that the values are not compared.

    Args:
        model: The model, bare or wrapped by PEFT, quantized or not.
        checkpoint: Folder of the checkpoint that the model was loaded from. If not given, the report of the backend
            that loaded it counts, or else the folder that the model names itself (``model.name_or_path``).

    Raises:
        CheckFailed: Names the tensors and the usual cause.
        CannotJudge: Nobody knows what the model was loaded from.
        ValueError: The checkpoint is no folder with safetensors files, or they are not readable.
    """
    parts = anatomy(model)
    report = _report(parts, checkpoint)
    empty = [name for name, tensor in parts.base.named_parameters() if tensor.device.type == "meta"]
    judge = Judge("checkpoint_complete", "every tensor comes from the checkpoint")
    sentences = iter(report.problems)
    for words, found in (
        ("missing from the checkpoint", report.missing),
        ("of another shape in the checkpoint", report.mismatched),
        ("left over in the checkpoint", report.unexpected),
    ):
        judge.equal(f"tensors {words}", len(found), 0, else_say=next(sentences) if found else "")
    judge.equal(
        "tensors without data",
        len(empty),
        0,
        else_say=f"{len(empty)} tensors are on the meta device and have no data (first: {empty[0] if empty else ''}): "
        "load the model onto one device",
    )
    wild = _not_finite(parts)
    judge.equal(
        "tensors not finite",
        len(wild),
        0,
        else_say=f"{len(wild)} tensors hold NaN or infinity: {some(wild)}; was the checkpoint saved after training had "
        "diverged, or cast to a dtype that ends below its numbers?",
    )
    judge.note(f"of {report.checkpoint}")
    return judge.verdict()


def _not_finite(parts: Parts) -> list[str]:
    """Names of tensors with NaN or infinity; two reductions each, no copy, one transfer to the host.

    Packed weights are left out: their bits are codes, also where ``bnb_4bit_quant_storage`` stores them as floats.
    """
    import torch

    held = {
        name: tensor
        for name, tensor in base_tensors(parts)
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() and tensor.device.type != "meta"
        if getattr(tensor, "quant_state", None) is None
    }
    if not held:
        return []
    ends = [torch.stack(torch.aminmax(tensor.detach())).double().to(parts.device) for tensor in held.values()]
    finite = torch.stack(ends).isfinite().all(dim=1).tolist()
    return [name for name, fine in zip(held, finite, strict=True) if not fine]


def _report(parts: Parts, checkpoint: str | Path | None) -> LoadingReport:
    kept = kept_report(parts.base)
    if checkpoint is None and kept is not None:
        return kept
    folder = Path(checkpoint or getattr(parts.base, "name_or_path", "") or "").expanduser()
    if not any(folder.glob("*.safetensors")):
        if checkpoint is not None:
            raise InputError(f"{str(checkpoint)!r} is no folder with *.safetensors: give the model's checkpoint")
        raise CannotJudge(
            "nobody knows what this model was loaded from: pass the checkpoint's folder as `checkpoint`, or load it "
            "by a backend of this package"
        )
    return compared_with(parts.base, folder)
