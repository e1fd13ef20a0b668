"""Vision attention that sees too much or too little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, attribute, before, on_first
from pytest_qvl.models.anatomy import anatomy

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.faults.case import Case

_MOVED = ("visual features", "moved away from full precision", "its weights are not those of the reference")


@fault(
    "pictures-see-each-other",
    "Vision attention runs over all images of the batch at once.",
    target="model",
    check="image_isolation",
    expected_words=("does vision attention mix images?", "changing row 0, image 0"),
    source="vllm-project/vllm#15200, vllm-project/vllm-gaudi#831",
)
def _see_each_other(case: Case) -> Iterator[None]:
    def join(_module: Any, args: Any, kwargs: Any) -> Any:
        bounds = kwargs["cu_seqlens"][[0, -1]]
        longest = {"max_seqlen": int(bounds[-1])} if "max_seqlen" in kwargs else {}
        return args, {**kwargs, "cu_seqlens": bounds, **longest}

    with before(list(anatomy(case.model).blocks), join):
        yield


@fault(
    "pictures-leak-into-each-other",
    "One vision attention adds a faint mean over all images of the batch.",
    target="model",
    check="image_isolation",
    expected_words=("does vision attention mix images?", "changing row 0, image 0"),
    source="EvolvingLMMs-Lab/lmms-eval#648",
)
def _leak(case: Case) -> Iterator[None]:
    block: Any = anatomy(case.model).blocks[3]
    with after([block.attn], lambda _m, _a, out: out + out.mean(dim=0) / 64):
        yield


@fault(
    "pictures-attend-both-ways",
    "In one language layer, tokens of an image see the next token of the image.",
    target="model",
    check="causality",
    expected_words=("it must move no output before it; is attention causal?",),
)
def _both_ways(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    inside: list[Any] = [None]

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        places = None if ids is None else ids == parts.image_token_id
        inside[0] = None if places is None else (places & places.roll(-1, dims=1))[..., None]

    def peek(_module: Any, _args: Any, output: Any) -> Any:
        def change(hidden: torch.Tensor) -> torch.Tensor:
            if inside[0] is None or hidden.shape[1] == 1:
                return hidden
            peeked: torch.Tensor = hidden + inside[0] * hidden.roll(-1, dims=1) / 32
            return peeked

        return on_first(output, change)

    with before([parts.core], note), after([parts.language_backbone.layers[1]], peek):
        yield


@fault(
    "windows-never-applied",
    "Every vision block attends over the whole image, as if there were no windows.",
    target="model",
    check="vision_stability",
    expected_words=("vision block 0: it attends outside its window",),
    source="nvidia-cosmos/cosmos-rl#171, sgl-project/sglang-jax#1289",
    requires=("window attention",),
)
def _no_windows(case: Case) -> Iterator[None]:
    tower: Any = anatomy(case.model).vision_tower
    with attribute(tower, "fullatt_block_indexes", list(range(len(tower.blocks)))):
        yield


@fault(
    "windows-everywhere",
    "The blocks with full attention are not recognised: every block stays inside its window.",
    target="model",
    check="vision_stability",
    expected_words=("which attends over the whole image by the configuration", "stay inside a window"),
    source="sgl-project/sglang-jax#1289",
    requires=("window attention",),
)
def _windows_everywhere(case: Case) -> Iterator[None]:
    with attribute(anatomy(case.model).vision_tower, "fullatt_block_indexes", []):
        yield


@fault(
    "vision-positions-lost",
    "The tower's rotary embedding is not applied: it cannot tell left from right.",
    target="model",
    check="vision_stability",
    expected_words=_MOVED,
    source="huggingface/transformers#35749",
)
def _no_rotary(case: Case) -> Iterator[None]:
    def drop(_module: Any, args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos * 0 + 1, sin * 0)}

    with before(list(anatomy(case.model).blocks), drop):
        yield
