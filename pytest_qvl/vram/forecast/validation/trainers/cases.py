"""The cases that real trainers are measured on, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_qvl.vram.forecast.request import DTYPE_OF, Request, Sample

# The schemas of the two files: what was predicted, and what was measured.
PREDICTED = "pytest-qvl/forecast-trainer-predictions/1"
MEASURED = "pytest-qvl/forecast-trainer-measured/1"
# Caps under which "fits" is judged. The allocator of the measuring GPU gets what the card would leave it; kernels stay
# those of the measuring GPU.
CARDS = ("t4", "l4", "a100-40gb")
# Of the GPU that the cases are measured on (H100, H200).
CAPABILITY = (9, 0)

Size = tuple[int, int]
# Model, trainer, dtype, batch, images of each sample, text tokens, rank, optimizer, accumulation, checkpointing.
Row = tuple[str, str, str, int, tuple[Size, ...], int, int, str, int, bool]
_ROWS: tuple[Row, ...] = (
    ("qwen2.5-vl-3b", "hf", "bf16", 1, ((1008, 756),), 300, 16, "paged_adamw_8bit", 1, False),
    ("qwen2.5-vl-3b", "hf", "bf16", 1, ((1008, 756),), 300, 16, "paged_adamw_8bit", 1, True),
    ("qwen2.5-vl-3b", "hf", "bf16", 2, ((644, 644),), 128, 8, "adamw_torch_fused", 1, True),
    ("qwen2.5-vl-3b", "hf", "bf16", 4, ((448, 448),), 96, 32, "adamw_torch", 4, True),
    ("qwen2.5-vl-3b", "hf", "bf16", 8, ((336, 560),), 200, 64, "adamw_8bit", 1, True),
    ("qwen2.5-vl-3b", "hf", "bf16", 2, ((448, 672), (896, 560)), 180, 128, "paged_adamw_32bit", 1, True),
    ("qwen2.5-vl-3b", "hf", "bf16", 1, ((560, 560),) * 4, 512, 16, "adamw_bnb_8bit", 4, False),
    ("qwen2.5-vl-3b", "hf", "bf16", 4, ((392, 588),), 64, 16, "adamw_8bit", 1, False),
    ("qwen2.5-vl-3b", "hf", "fp16", 1, ((868, 868),), 250, 32, "adamw_torch", 1, True),
    ("qwen2.5-vl-3b", "hf", "fp16", 2, ((504, 504), (504, 504)), 140, 16, "paged_adamw_8bit", 4, True),
    ("qwen2.5-vl-3b", "hf", "fp16", 2, ((476, 700),), 100, 64, "adamw_8bit", 1, False),
    ("qwen2.5-vl-3b", "trl", "bf16", 1, ((1008, 756),), 300, 16, "paged_adamw_8bit", 1, True),
    ("qwen2.5-vl-3b", "trl", "bf16", 1, ((1008, 756),), 300, 16, "adamw_torch_fused", 1, False),
    ("qwen2.5-vl-3b", "trl", "bf16", 4, ((616, 448),), 220, 64, "adamw_8bit", 4, True),
    ("qwen2.5-vl-3b", "trl", "bf16", 2, ((700, 700), (448, 448), (420, 840)), 400, 8, "adamw_torch", 1, True),
    ("qwen2.5-vl-3b", "trl", "bf16", 8, ((448, 448),), 80, 128, "paged_adamw_32bit", 1, True),
    ("qwen2.5-vl-7b", "hf", "bf16", 1, ((1204, 784),), 350, 16, "paged_adamw_8bit", 1, True),
    ("qwen2.5-vl-7b", "hf", "bf16", 1, ((1204, 784),), 350, 16, "paged_adamw_8bit", 1, False),
    ("qwen2.5-vl-7b", "hf", "bf16", 2, ((672, 672), (672, 672)), 150, 64, "adamw_torch_fused", 4, True),
    ("qwen2.5-vl-7b", "hf", "bf16", 4, ((560, 420),), 256, 32, "adamw_8bit", 1, True),
    ("qwen2.5-vl-7b", "hf", "bf16", 8, ((448, 448),), 72, 8, "adamw_torch", 1, True),
    ("qwen2.5-vl-7b", "hf", "bf16", 1, ((1624, 1624),), 100, 128, "paged_adamw_32bit", 1, True),
    ("qwen2.5-vl-7b", "hf", "bf16", 1, ((840, 616), (448, 952), (560, 560)), 600, 16, "adamw_bnb_8bit", 1, True),
    ("qwen2.5-vl-7b", "hf", "bf16", 2, ((392, 392),), 120, 64, "adamw_torch", 4, False),
    ("qwen2.5-vl-7b", "hf", "fp16", 1, ((756, 756),), 200, 16, "paged_adamw_8bit", 1, True),
    ("qwen2.5-vl-7b", "hf", "fp16", 2, ((588, 784),), 90, 32, "adamw_8bit", 4, True),
    ("qwen2.5-vl-7b", "trl", "bf16", 1, ((1204, 784),), 350, 16, "paged_adamw_8bit", 1, True),
    ("qwen2.5-vl-7b", "trl", "bf16", 2, ((728, 560), (728, 560)), 300, 32, "adamw_torch_fused", 4, True),
    ("qwen2.5-vl-7b", "trl", "bf16", 4, ((644, 476),), 128, 128, "adamw_8bit", 1, True),
    ("qwen2.5-vl-7b", "trl", "bf16", 1, ((616, 616),), 500, 64, "paged_adamw_32bit", 1, False),
    ("qwen3-vl-2b", "hf", "bf16", 1, ((768, 1024),), 200, 16, "adamw_torch_fused", 1, True),
    ("qwen3-vl-2b", "hf", "bf16", 4, ((512, 512),), 150, 32, "paged_adamw_8bit", 4, True),
    ("qwen3-vl-2b", "hf", "bf16", 8, ((384, 640),), 100, 8, "adamw_8bit", 1, False),
    ("qwen3-vl-2b", "hf", "fp16", 2, ((640, 640), (512, 768)), 250, 64, "adamw_torch", 1, True),
    ("qwen3-vl-2b", "trl", "bf16", 2, ((736, 736), (480, 640)), 180, 16, "adamw_8bit", 1, True),
    ("qwen3-vl-2b", "trl", "bf16", 4, ((576, 448),), 300, 128, "adamw_torch", 4, False),
    ("qwen3-vl-4b", "hf", "bf16", 1, ((1120, 864),), 280, 64, "paged_adamw_8bit", 1, True),
    ("qwen3-vl-4b", "hf", "bf16", 2, ((608, 608),), 160, 16, "adamw_torch", 4, False),
    ("qwen3-vl-4b", "hf", "bf16", 1, ((512, 512), (704, 480), (320, 960), (512, 640)), 420, 32, "adamw_8bit", 1, True),
    ("qwen3-vl-4b", "trl", "bf16", 2, ((800, 640),), 220, 32, "paged_adamw_32bit", 4, True),
    ("qwen3-vl-8b", "hf", "bf16", 1, ((896, 1152),), 320, 16, "paged_adamw_8bit", 1, True),
    ("qwen3-vl-8b", "hf", "bf16", 4, ((544, 544),), 110, 64, "adamw_torch_fused", 1, True),
    ("qwen3-vl-8b", "hf", "bf16", 2, ((448, 608), (640, 384)), 240, 8, "adamw_8bit", 4, True),
    ("qwen3-vl-8b", "hf", "bf16", 1, ((704, 512),), 180, 128, "adamw_torch", 1, False),
    ("qwen3-vl-8b", "trl", "bf16", 1, ((896, 1152),), 320, 16, "paged_adamw_8bit", 1, True),
    ("qwen3-vl-8b", "trl", "bf16", 4, ((480, 480),), 130, 32, "adamw_8bit", 1, True),
)
# Batches of samples that differ, padded to the longest: model, trainer, samples.
_MIXED: tuple[tuple[str, str, tuple[Sample, ...]], ...] = (
    ("qwen2.5-vl-3b", "hf", (Sample(((1008, 756),), 90), Sample(((448, 448), (336, 504)), 260))),
    ("qwen2.5-vl-7b", "hf", (Sample(((756, 560),), 310), Sample(((448, 448),), 40), Sample(((560, 560),), 120))),
    ("qwen3-vl-2b", "trl", (Sample(((896, 640),), 64), Sample(((512, 512), (320, 448)), 200))),
)
# Settings beside those of a row: model, and what differs from the first row of it with checkpointing.
_OTHERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2.5-vl-3b", {"lora_dropout": 0.05, "gradient_checkpointing": False}),
    ("qwen2.5-vl-3b", {"lora_targets": ("q_proj", "v_proj"), "optimizer": "adamw_torch_fused"}),
    ("qwen2.5-vl-3b", {"evaluation": 4}),
    ("qwen2.5-vl-7b", {"lora_targets": "all-linear", "lora_dropout": 0.05}),
    ("qwen2.5-vl-7b", {"modules_to_save": ("lm_head",), "optimizer": "adamw_8bit"}),
    ("qwen2.5-vl-7b", {"trainer": "trl", "evaluation": 2, "batch": 2}),
    ("qwen3-vl-4b", {"lora_targets": "all-linear", "optimizer": "adamw_torch"}),
)
# Settings that came after the first table was measured, in a file of their own: as above.
_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2.5-vl-3b", {"use_dora": True}),
    ("qwen2.5-vl-3b", {"use_dora": True, "gradient_checkpointing": False, "lora_dropout": 0.05}),
    ("qwen2.5-vl-7b", {"use_dora": True, "trainer": "trl"}),
    ("qwen3-vl-4b", {"use_dora": True, "lora_targets": ("q_proj", "v_proj"), "optimizer": "adamw_torch"}),
    ("qwen2.5-vl-3b", {"reentrant": True}),
    ("qwen2.5-vl-7b", {"reentrant": True, "trainer": "trl", "batch": 2}),
    ("qwen3-vl-2b", {"reentrant": True, "optimizer": "adamw_8bit"}),
    ("qwen2.5-vl-3b", {"evaluation": 2, "evaluation_batches": 6, "compute_metrics": True}),
    (
        "qwen2.5-vl-7b",
        {"evaluation": 1, "evaluation_batches": 6, "compute_metrics": True, "eval_accumulation_steps": 2},
    ),
    (
        "qwen2.5-vl-3b",
        {"evaluation": 2, "evaluation_batches": 4, "compute_metrics": True, "preprocess_logits": "argmax"},
    ),
    ("qwen3-vl-2b", {"trainer": "trl", "evaluation": 2, "evaluation_batches": 5, "compute_metrics": True}),
    ("qwen2.5-vl-3b", {"samples": (Sample((), 180, ((16, 364, 644),)),)}),
    ("qwen2.5-vl-3b", {"samples": (Sample((), 120, ((8, 448, 448),)),) * 2, "gradient_checkpointing": False}),
    ("qwen2.5-vl-3b", {"samples": (Sample(((448, 336),), 150, ((7, 252, 448),)), Sample(((560, 560),), 60))}),
    ("qwen2.5-vl-7b", {"samples": (Sample((), 240, ((24, 308, 532),)),), "optimizer": "adamw_torch_fused"}),
    ("qwen2.5-vl-7b", {"samples": (Sample((), 90, ((12, 392, 392),)),) * 2, "trainer": "trl"}),
)
_UNSLOTH: dict[str, Any] = {"trainer": "unsloth", "checkpoint": "nf4"}
# What came after those: Unsloth's trainer, 8-bit bases, DDP, and videos of Qwen3-VL.
_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2.5-vl-3b", _UNSLOTH),
    ("qwen2.5-vl-3b", {**_UNSLOTH, "compiled": False}),
    ("qwen2.5-vl-3b", {**_UNSLOTH, "batch": 4}),
    ("qwen2.5-vl-3b", {**_UNSLOTH, "compiled": False, "image": (560, 560), "gradient_checkpointing": False}),
    (
        "qwen2.5-vl-3b",
        {
            **{**_UNSLOTH, "compiled": False, "image": (644, 448), "images": 2, "batch": 2},
            **{"lora_r": 64, "optimizer": "adamw_8bit", "accumulation": 4},
        },
    ),
    (
        "qwen2.5-vl-3b",
        {
            **{**_UNSLOTH, "compiled": False},
            "samples": (Sample(((756, 560),), 90), Sample(((448, 448), (336, 504)), 260)),
        },
    ),
    ("qwen2.5-vl-3b", {"base_bits": 8}),
    ("qwen2.5-vl-3b", {"base_bits": 8, "reentrant": True}),
    ("qwen2.5-vl-3b", {"base_bits": 8, "trainer": "trl", "batch": 2, "image": (560, 560)}),
    ("qwen2.5-vl-3b", {"base_bits": 8, "gradient_checkpointing": False, "image": (560, 420)}),
    ("qwen3-vl-2b", {"base_bits": 8, "optimizer": "adamw_8bit"}),
    ("qwen3-vl-4b", {"base_bits": 8, "reentrant": True}),
    ("qwen2.5-vl-7b", {"base_bits": 8, "trainer": "trl", "images": 2, "image": (448, 616)}),
    ("qwen2.5-vl-3b", {"ddp": True, "lora_r": 64, "optimizer": "adamw_torch"}),
    ("qwen2.5-vl-3b", {"ddp": True, "trainer": "trl", "lora_r": 128, "accumulation": 4}),
    ("qwen3-vl-2b", {"samples": (Sample((), 180, ((16, 352, 640),)),)}),
    ("qwen3-vl-2b", {"samples": (Sample(((448, 320),), 100, ((9, 448, 448),)), Sample((), 60, ((4, 640, 480),)))}),
)

# The largest dense models of Qwen3.5 and Qwen3-VL that people train on one card, in a file of their own: rows, samples
# that differ, and a video. Linear attention is Transformers' PyTorch code, as on a machine without its kernels.
_FAMILIES: tuple[Row, ...] = (
    ("qwen3.5-9b", "hf", "bf16", 1, ((1024, 1024),), 256, 16, "paged_adamw_8bit", 1, True),
    ("qwen3.5-9b", "hf", "bf16", 1, ((448, 448),), 100, 16, "adamw_torch", 1, False),
    ("qwen3.5-9b", "hf", "bf16", 2, ((512, 768), (640, 480)), 150, 64, "adamw_8bit", 4, True),
    ("qwen3.5-9b", "trl", "bf16", 4, ((640, 640),), 180, 32, "adamw_torch_fused", 1, True),
)
_FAMILIES_MIXED: tuple[tuple[str, str, tuple[Sample, ...]], ...] = (
    ("qwen3.5-9b", "hf", (Sample(((896, 672),), 120), Sample(((512, 512), (448, 320)), 300))),
    ("qwen3-vl-8b", "hf", (Sample((), 180, ((16, 352, 640),)), Sample(((640, 640),), 90))),
)


# With ``use_liger_kernel``, in a file of their own.
_LIGER: tuple[Row, ...] = (
    ("qwen2.5-vl-3b", "hf", "bf16", 1, ((1008, 756),), 300, 16, "paged_adamw_8bit", 1, False),
    ("qwen2.5-vl-3b", "trl", "bf16", 4, ((616, 448),), 220, 64, "adamw_8bit", 1, True),
    ("qwen3-vl-2b", "hf", "bf16", 2, ((768, 1024),), 200, 16, "adamw_torch_fused", 1, False),
)


# Trainings that go on, packed rows, first values of PEFT's own, and Qwen2-VL, in a file of their own.
_BEGUN: dict[str, Any] = {
    **{"image": (560, 560), "tokens": 300, "lora_r": 64},
    "optimizer": "paged_adamw_32bit",
}
_PACKED_ROWS = (Sample(((560, 420),), 120), Sample(((448, 448),), 260), Sample((), 400))
_LATER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2.5-vl-3b", _BEGUN),
    ("qwen2.5-vl-3b", {**_BEGUN, "resume": True}),
    ("qwen2.5-vl-3b", {**_BEGUN, "resume": True, "optimizer": "adamw_torch", "gradient_checkpointing": False}),
    ("qwen2.5-vl-3b", {**_BEGUN, "trainer": "trl"}),
    ("qwen2.5-vl-3b", {**_BEGUN, "trainer": "trl", "resume": True}),
    ("qwen2.5-vl-3b", {**_BEGUN, "evaluation": 2, "load_best": True}),
    ("qwen2.5-vl-3b", {"samples": _PACKED_ROWS, "packed": True}),
    ("qwen2.5-vl-3b", {"samples": _PACKED_ROWS, "packed": True, "gradient_checkpointing": False}),
    ("qwen2.5-vl-3b", {**_BEGUN, "init_lora_weights": "olora"}),
    ("qwen2.5-vl-3b", {**_BEGUN, "init_lora_weights": "pissa_niter_4", "base_bits": 16}),
    ("qwen2-vl-2b", {}),
    ("qwen2-vl-2b", {"trainer": "trl", "images": 2, "batch": 2, "lora_r": 64, "gradient_checkpointing": False}),
)

# Of Qwen3.5 by flash-linear-attention's kernels, in a file of their own: they change what the others would be run by.
_KERNELS: tuple[Row, ...] = (
    ("qwen3.5-9b", "hf", "bf16", 1, ((1024, 1024),), 256, 16, "paged_adamw_8bit", 1, True),
    ("qwen3.5-4b", "hf", "bf16", 2, ((512, 768),), 150, 32, "adamw_torch", 1, False),
    ("qwen3.5-2b", "trl", "bf16", 4, ((448, 448),), 200, 64, "adamw_8bit", 1, True),
)

# Of OLoRA once more, in a file of their own: without what the harness held of the base at first.
_OLORA: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2.5-vl-3b", {"init_lora_weights": "olora"}),
    ("qwen3-vl-4b", {"init_lora_weights": "olora", "trainer": "trl"}),
    ("qwen2.5-vl-7b", {"init_lora_weights": "olora"}),
)


def olora_cases() -> list[Request]:
    """The cases of OLoRA after the first, by both trainers."""
    return _changed(_OLORA)


def kernels_cases() -> list[Request]:
    """The cases of linear attention by flash-linear-attention."""
    return [Request(**_alike(row), linear_attention="fla") for row in _KERNELS]


def later_cases() -> list[Request]:
    """The cases of trainings that go on from a checkpoint, packed rows, OLoRA and PiSSA, and Qwen2-VL."""
    return _changed(_LATER)


def liger_cases() -> list[Request]:
    """The cases of Liger's kernels, by both trainers that have them."""
    return [Request(**_alike(row), liger=True) for row in _LIGER]


def families_cases() -> list[Request]:
    """The cases of Qwen3.5-9B, and one of Qwen3-VL-8B with a video beside an image."""
    alike = [_alike(row) for row in _FAMILIES]
    usual = {"qwen3.5-9b": alike[0], "qwen3-vl-8b": {**alike[0], "model": "qwen3-vl-8b"}}
    mixed = [
        {**_without_shapes(usual[model]), "trainer": trainer, "samples": samples}
        for model, trainer, samples in _FAMILIES_MIXED
    ]
    return [Request(**fields) for fields in (*alike, *mixed)]


def settings_cases() -> list[Request]:
    """The cases of DoRA, reentrant checkpointing, evaluations with metrics, and videos."""
    return _changed(_SETTINGS)


def kinds_cases() -> list[Request]:
    """The cases of Unsloth's trainer, 8-bit bases, DDP, and videos of Qwen3-VL."""
    return _changed(_KINDS)


def _changed(cases: tuple[tuple[str, dict[str, Any]], ...]) -> list[Request]:
    usual = {fields["model"]: fields for fields in map(_alike, reversed(_ROWS)) if fields["gradient_checkpointing"]}
    usual["qwen2-vl-2b"] = {**usual["qwen2.5-vl-3b"], "model": "qwen2-vl-2b"}
    bare = {model: _without_shapes(fields) for model, fields in usual.items()}
    return [Request(**{**(bare if "samples" in changes else usual)[model], **changes}) for model, changes in cases]


def cases() -> list[Request]:
    """Every case: samples that are alike, samples that differ, k-bit preparation, no vision hook, and others.

    Without those whose settings the forecast does not follow; :func:`refused` says which.
    """
    return [request for request in map(_request, _fields()) if isinstance(request, Request)]


def refused() -> list[str]:
    """Why the forecast does not follow some of the cases, a sentence each."""
    return [why for why in map(_request, _fields()) if isinstance(why, str)]


def _request(fields: dict[str, Any]) -> Request | str:
    try:
        return Request(**fields)
    except ValueError as error:
        return f"{fields['model']} {fields['trainer']}: {error}"


def _fields() -> list[dict[str, Any]]:
    alike = [_alike(row) for row in _ROWS]
    usual = {fields["model"]: fields for fields in reversed(alike) if fields["gradient_checkpointing"]}
    bare = {model: _without_shapes(fields) for model, fields in usual.items()}
    mixed = [{**bare[model], "trainer": trainer, "samples": samples} for model, trainer, samples in _MIXED]
    upcast = [{**usual[model], "kbit_upcast": True} for model in ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-4b")]
    unhooked = [{**usual[model], "vision_hook": False} for model in ("qwen2.5-vl-3b", "qwen2.5-vl-7b")]
    others = [{**usual[model], **changes} for model, changes in _OTHERS]
    return [*alike, *mixed, *upcast, *unhooked, *others]


def _without_shapes(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those whose place samples take."""
    return {name: value for name, value in fields.items() if name not in {"image", "images", "batch", "tokens"}}


def _alike(row: Row) -> dict[str, Any]:
    model, trainer, precision, batch, images, tokens, rank, optimizer, accumulation, checkpointing = row
    shapes: dict[str, Any] = {"samples": (Sample(images, tokens),) * batch}
    if len(set(images)) == 1:
        shapes = {"image": images[0], "images": len(images), "batch": batch, "tokens": tokens}
    return {
        "model": model,
        "trainer": trainer,
        "precision": precision,
        "compute_dtype": DTYPE_OF[precision],
        "lora_r": rank,
        "optimizer": optimizer,
        "accumulation": accumulation,
        "gradient_checkpointing": checkpointing,
        "checkpoint": "synthetic",
        "capability": CAPABILITY,
        **shapes,
    }


def name_of(request: Request) -> str:
    """Short, and unique among the cases: model, trainer, precision, samples, rank, optimizer and what is unusual."""
    samples = request.batch_of_samples
    kinds = list(dict.fromkeys(samples))
    words = [Path(request.model).name, request.trainer, request.precision or request.compute_dtype]
    shapes = [f"{_images(sample)}+{sample.tokens}" for sample in kinds]
    words += [f"{len(samples)}x{shapes[0]}"] if len(kinds) == 1 else ["_".join(shapes)]
    words += [f"r{request.lora_r}", request.optimizer]
    words += [f"accumulate{request.accumulation}"] if request.accumulation > 1 else []
    words += [] if request.gradient_checkpointing else ["kept"]
    targets = request.lora_targets
    words += [] if targets == "language" else [targets if isinstance(targets, str) else "+".join(targets)]
    words += [f"saves {'+'.join(request.modules_to_save)}"] if request.modules_to_save else []
    words += [f"dropout{request.lora_dropout}"] if request.lora_dropout else []
    words += [f"evaluates{request.evaluation}"] if request.evaluation else []
    words += [f"metrics{request.evaluation_batches}"] if request.keeps_logits else []
    words += [request.preprocess_logits] if request.preprocess_logits else []
    words += [f"host{request.eval_accumulation_steps}"] if request.eval_accumulation_steps else []
    words += ["dora"] if request.use_dora else []
    words += [] if request.base_bits == 4 else [f"{request.base_bits}bit"]
    words += [] if request.compiled else ["not compiled"]
    words += ["ddp"] if request.ddp else []
    words += ["liger"] if request.liger else []
    words += ["packed"] if request.packed else []
    words += [request.init_lora_weights] if request.init_lora_weights else []
    words += ["resumed"] if request.resume else []
    words += ["loads best"] if request.load_best else []
    words += [] if request.linear_attention == "torch" else [request.linear_attention]
    words += ["reentrant"] if request.reentrant else []
    words += ["upcast"] if request.kbit_upcast else []
    words += ["unhooked"] if request.gradient_checkpointing and request.vision_hook is False else []
    return " ".join(words)


def _images(sample: Sample) -> str:
    sizes = list(dict.fromkeys(sample.images))
    if len(sizes) == 1 and len(sample.images) > 1:
        return f"{len(sample.images)}*{sizes[0][0]}x{sizes[0][1]}"
    videos = [f"video{frames}x{height}x{width}" for frames, height, width in sample.videos]
    return ",".join([*(f"{height}x{width}" for height, width in sample.images), *videos])
