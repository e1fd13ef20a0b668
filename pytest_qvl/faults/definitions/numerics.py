"""Numbers that overflow, or weights that are not the checkpoint's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import all_of, values
from pytest_qvl.models.adapters import original_module
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers, vision_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.faults.case import Case


@fault(
    "vision-nan",
    "One weight of the tower is NaN.",
    target="model",
    check="vision_stability",
    expected_words=(
        "visual features are not finite",
        "begins at model.visual.blocks.1.{tower_up}, whose own weight is not finite",
    ),
    source="vllm-project/vllm#14126",
)
def _vision_nan(case: Case) -> Iterator[None]:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = float("nan")
        return weight

    with values(vision_blocks(anatomy(case.model))[1].mlp.up.weight, spoil):
        yield


def _half_tower(case: Case, factor: float) -> Iterator[None]:
    import torch

    case.model = case.load(dtype="float16")
    case.policy = type(case.policy)(compute_dtype="float16")
    down = vision_blocks(anatomy(case.model))[3].mlp.down
    peak = [0.0]
    handle = down.register_forward_hook(lambda _m, _a, out: peak.append(float(out.abs().max())))
    with torch.no_grad():
        for start in range(0, len(case.probes), 10):
            case.model(**case.batch(case.probes[start : start + 10]))
    handle.remove()
    down.weight.data.mul_(factor * torch.finfo(torch.float16).max / max(peak))
    down.bias.data.mul_(factor * torch.finfo(torch.float16).max / max(peak))
    yield


@fault(
    "float16-overflow",
    "A vision activation exceeds 65,504 in float16 and becomes infinite.",
    target="load",
    check="vision_stability",
    expected_words=(
        "visual features are not finite",
        "model.visual.blocks.3.{tower_down}",
        "whose dtype ends at 65504",
    ),
    source="ggml-org/llama.cpp#17534, huggingface/transformers#33294",
)
def _overflow(case: Case) -> Iterator[None]:
    yield from _half_tower(case, 4.0)


@fault(
    "float16-near-overflow",
    "A vision activation reaches three quarters of what float16 holds: other images will overflow it.",
    target="load",
    check="vision_stability",
    expected_words=("other images can overflow", "model.visual.blocks.3"),
    source="ggml-org/llama.cpp#17534",
)
def _near_overflow(case: Case) -> Iterator[None]:
    yield from _half_tower(case, 0.75)


@fault(
    "language-overflow",
    "A norm of the language backbone overflows: NaN logits, a reply of token 0.",
    target="model",
    check="generation_wellformed",
    expected_words=("are not finite from step 0 on", "begins at model.language_model.layers.2"),
    source="huggingface/transformers#33294",
)
def _language_overflow(case: Case) -> Iterator[None]:
    norm = anatomy(case.model).language_backbone.layers[2].input_layernorm
    with values(norm.weight, lambda w: w * 1e38):
        yield


@fault(
    "vision-weights-lost",
    "The weights of one vision block were not found in the checkpoint and are random.",
    target="model",
    check="vision_stability",
    expected_words=("moved away from full precision", "its weights are not those of the reference"),
    source="2U1/Qwen-VL-Series-Finetune#37, QwenLM/Qwen3-VL#1033",
)
def _vision_lost(case: Case) -> Iterator[None]:
    import torch

    generator = torch.Generator().manual_seed(0)
    block = anatomy(case.model).blocks[2]

    def random(weight: torch.Tensor) -> torch.Tensor:
        return torch.randn(weight.shape, generator=generator, device="cpu").mul(0.02).to(weight.dtype)

    with all_of([values(p, random) for p in block.parameters() if p.ndim == 2]):
        yield


@fault(
    "language-weights-lost",
    "The statistics of one quantized layer belong to another layer.",
    target="model",
    check="alignment",
    expected_words=("answers are right",),
    source="huggingface/transformers#38489",
    unshared="a reference is not quantized",
)
def _language_lost(case: Case) -> Iterator[None]:
    state = original_module(language_layers(anatomy(case.model))[0].output).weight
    with values(state, lambda w: w.flip(0)):
        yield


@fault(
    "head-rows-shifted",
    "The head's rows are off by one against the vocabulary.",
    target="model",
    check="alignment",
    expected_words=("answers are right", "text-only control"),
    source="hiyouga/LlamaFactory#8823",
)
def _head_shifted(case: Case) -> Iterator[None]:
    head: Any = anatomy(case.model).lm_head
    with values(head.weight, lambda w: w.roll(1, dims=0)):
        yield
