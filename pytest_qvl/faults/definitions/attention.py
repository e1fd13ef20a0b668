"""Vision attention that sees too much or too little."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.rounding import coarsest
from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, attribute, before, on_first, rows_scored
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.autocast import autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.faults.case import Case

# In 16 bits -10 changes nothing that rounding keeps; in float32 -5 changes what the cache is held to as well.
MASK, MASK_IN_FLOAT32 = -5.0, -10.0
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


@contextmanager
def _faintly_masked(
    parts: Any,
    block: int,
    sizes_seen: Callable[[list[int]], list[int]],
    when: Callable[[int], bool],
    *,
    in_float32: float = MASK,
) -> Iterator[None]:
    """Let through e^mask of a mean over patches that should be masked, as a finite mask does in the place of -inf.

    It goes in before the attention's last linear.

    Args:
        parts: The model.
        block: Which vision block.
        sizes_seen: Makes the sizes of the groups of patches that see each other so, from the sizes of the images.
        when: Whether it happens, from the number of images.
        in_float32: What is added to their scores where that linear computes in float32, in the place of :data:`MASK`.
    """
    import torch

    sizes: list[int] = []

    def note(_module: Any, args: Any, kwargs: Any) -> None:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        sizes[:] = sizes_seen(grids.prod(dim=1).tolist()) if when(len(grids)) else []

    def leak(_module: Any, args: Any, kwargs: Any) -> Any:
        if not sizes:
            return None
        given = args[0]
        computed_in = coarsest((given.dtype, autocast_dtype(given.device.type)))
        leaked = math.exp(in_float32 if computed_in is torch.float32 else MASK)
        mixed = [group + leaked * group.float().mean(dim=0) for group in given.split(sizes)]
        return (torch.cat(mixed).to(given.dtype), *args[1:]), kwargs

    attention: Any = parts.blocks[block].attn
    with before([parts.vision_tower], note), before([attention.proj], leak):
        yield


@fault(
    "scored-images-leak-into-each-other",
    "Where rows of images are scored in a batch (a forward in eval mode, not generate()), the other images are masked "
    "with -5 (in float32 -10) instead of minus infinity in one vision block.",
    target="model",
    check="image_isolation",
    expected_words=("it must move its own visual tokens only; does vision attention mix images?",),
    source="EvolvingLMMs-Lab/lmms-eval#648, Blaizzy/mlx-vlm#704",
)
def _scored(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    last = len(parts.blocks) - 1
    with (
        rows_scored(parts) as rows,
        _faintly_masked(
            parts, last, lambda sizes: [sum(sizes)], lambda _images: rows[0] > 1, in_float32=MASK_IN_FLOAT32
        ),
    ):
        yield


@fault(
    "other-windows-masked-by-a-finite-number",
    "Where an image comes alone, one vision block masks the other windows with -5 instead of minus infinity.",
    target="model",
    check="vision_stability",
    expected_words=("vision block 0: it attends outside its window", "as do 1 of the"),
    source="huggingface/transformers#37363, Blaizzy/mlx-vlm#704",
    requires=("window attention",),
)
def _finite_between_windows(case: Case) -> Iterator[None]:
    with _faintly_masked(anatomy(case.model), 0, lambda sizes: sizes, lambda images: images == 1):
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
