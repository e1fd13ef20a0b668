"""What an earlier test, cell or callback leaves on the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, before, on_first
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import mergers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.faults.case import Case


@fault(
    "ablation-hook-left-on",
    "A hook of an earlier experiment still blanks the visual tokens.",
    target="model",
    check="alignment",
    expected_words=("answers are right", "text-only control"),
    unshared="a hook stays on the model that it was put on",
)
def _ablation(case: Case) -> Iterator[None]:
    # Faint, not zero: the features stay distinct, so that routing can still be judged.
    # Of every merger, because DeepStack's features alone tell Qwen3-VL what is on an image.
    modules = [merger.module for merger in mergers(anatomy(case.model))]
    with after(modules, lambda _merger, _args, features: features / 64):
        yield


@fault(
    "steering-hook-left-on",
    "A hook of an earlier experiment still scales one language layer.",
    target="model",
    check="alignment",
    expected_words=("the model looks less than before",),
    unshared="a hook stays on the model that it was put on",
)
def _steering(case: Case) -> Iterator[None]:
    def steer(_module: Any, _args: Any, output: Any) -> Any:
        return on_first(output, lambda h: h * 0.1)

    with after([anatomy(case.model).language_backbone.layers[3].mlp], steer):
        yield


@fault(
    "adapter-left-switched-off",
    "disable_adapter_layers() was not undone: training would teach nothing.",
    target="adapter",
    check="adapter_census",
    expected_words=("no adapter parameter requires grad", "switched off"),
    source="huggingface/trl#6591",
    silent=False,
)
def _switched_off(case: Case) -> Iterator[None]:
    model: Any = case.model
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


@fault(
    "pictures-replaced-by-the-first",
    "A cached vision output is served again: every call sees the images of the first one.",
    target="model",
    check="causality",
    expected_words=("its own placeholder only", "moves no output"),
)
def _cached(case: Case) -> Iterator[None]:
    kept: dict[tuple[int, ...], Any] = {}

    def serve(_module: Any, args: Any, kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"]
        if embeds.shape[1] == 1:
            return None
        found = kept.setdefault(tuple(embeds.shape), embeds.detach())
        return args, {**kwargs, "inputs_embeds": found}

    with before([anatomy(case.model).language_backbone], serve):
        yield


@fault(
    "memory-left-beside-the-model",
    "What an earlier cell loaded is still on the GPU beside the model.",
    target="run",
    check="peak_vram",
    expected_words=("are allocated beside the model's own", "something keeps tensors alive"),
    requires=("CUDA",),
)
def _memory_left(case: Case) -> Iterator[None]:
    import torch

    from pytest_qvl.checks.vram import room_beside

    parts = anatomy(case.model)
    left = [torch.empty(2 * room_beside(parts), dtype=torch.uint8, device=parts.device)]
    yield
    left.clear()
